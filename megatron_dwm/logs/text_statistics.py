"""Simple statistics of a text to compare weights with, and rank correlations.

They show what a weighting may respond to implicitly: how long a document is, how much of it
repeats, how much of it is not prose.
"""

from __future__ import annotations

import re
import zlib
from itertools import islice

import numpy

_WORD = re.compile(r"\w+")
# Words of a text that count. The share of new words falls with length, so all texts are cut
# equally.
_WORDS, _BYTES = 200, 16384


def type_token_ratio(text: str) -> float:
    """Returns the share of different words among the first 200; NaN without words."""
    words = [match[0].lower() for match in islice(_WORD.finditer(text), _WORDS)]
    return len(set(words)) / len(words) if words else float("nan")


def compression_ratio(text: str) -> float:
    """Returns zlib's bytes divided by UTF-8 bytes, for the first 16 KiB; NaN for an empty text.

    It is low if a text repeats itself. For a text of a few words, zlib's header is a large part.
    """
    data = text.encode("utf-8", errors="replace")[:_BYTES]
    return len(zlib.compress(data, 6)) / len(data) if data else float("nan")


def symbol_share(text: str) -> float:
    """Returns the share of characters that are neither letters, digits nor space; NaN if empty."""
    if not text:
        return float("nan")
    return sum(not (char.isalnum() or char.isspace()) for char in text) / len(text)


def rank_correlation(x: numpy.ndarray, y: numpy.ndarray) -> float:
    """Returns Spearman's rank correlation, with ties at their mean rank.

    Args:
        x: `[n]`; pairs with a NaN are left out.
        y: `[n]`.

    Returns:
        NaN with fewer than 3 pairs, or if one side is constant.
    """
    known = numpy.isfinite(x) & numpy.isfinite(y)
    if known.sum() < 3:
        return float("nan")
    a, b = ranks(x[known]), ranks(y[known])
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(numpy.corrcoef(a, b)[0, 1])


def rank_correlation_within(x: numpy.ndarray, y: numpy.ndarray, groups: numpy.ndarray) -> float:
    """Returns the mean of the rank correlations within groups, weighted by their pairs.

    This is the correlation without the differences between groups.

    Args:
        x: `[n]`.
        y: `[n]`.
        groups: `[n]` integers.

    Returns:
        NaN if no group has one.
    """
    found, counts = [], []
    for group in numpy.unique(groups):
        members = groups == group
        value = rank_correlation(x[members], y[members])
        if numpy.isfinite(value):
            found.append(value)
            counts.append(int(members.sum()))
    return float(numpy.average(found, weights=counts)) if found else float("nan")


def ranks(values: numpy.ndarray) -> numpy.ndarray:
    """Returns `[n]` ranks from 0, with ties at their mean."""
    _, place, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    last = numpy.cumsum(counts)
    return (last - (counts + 1) / 2)[place]


def binned(x: numpy.ndarray, y: numpy.ndarray, bins: int) -> list[tuple[float, float, float, int]]:
    """Returns mean x, mean y, standard deviation of y and count of equally filled bins.

    Args:
        x: `[n]`, the sort key of the pairs; pairs with a NaN are left out.
        y: `[n]`.
        bins: maximum number of bins; equal values of x are never split.
    """
    known = numpy.isfinite(x) & numpy.isfinite(y)
    x, y = x[known], y[known]
    if not len(x):
        return []
    place = (ranks(x) * bins / len(x)).astype(int)
    found = []
    for k in numpy.unique(place):
        inside = place == k
        mean, spread = float(y[inside].mean()), float(y[inside].std())
        found.append((float(x[inside].mean()), mean, spread, int(inside.sum())))
    return found
