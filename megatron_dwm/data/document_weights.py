"""Computes with document weights: from scores, top fraction, by sequence, sums by domain.

It works in chunks, so that 10^8 documents need little memory beyond the arrays themselves. Shapes:
D documents, K domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dwm.data.index import IndexSummary, documents_of
from megatron_dwm.data.weight_file import WeightFile, document_chunks

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NO_DOMAIN = "(none)"


def weights_from_scores(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Turn scores into weights: `w = exp((s - max s) / T)`, scaled to mean 1.

    Args:
        scores: `[D]` finite floats, higher is better.
        temperature: T > 0; a difference of T in score is a factor of e in weight.

    Returns:
        `[D]` float32; 0 where the factor is too small for float32.

    Raises:
        ValueError: There are no scores, one of them is NaN or infinite, or the temperature is
            not a finite number above 0.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature: expected a finite number above 0, found {temperature}")
    scores = _as_floats(scores, "scores")
    _check(scores, np.isfinite, "score", "scores are finite")
    top = float(max(scores[chunk].max() for chunk in document_chunks(len(scores))))

    def unscaled(chunk: slice) -> np.ndarray:
        # A difference that overflows is -inf, which correctly gives weight 0.
        with np.errstate(over="ignore", under="ignore"):
            return np.exp((scores[chunk].astype(np.float64) - top) / temperature)

    mean = sum(float(unscaled(c).sum()) for c in document_chunks(len(scores))) / len(scores)
    weights = np.empty(len(scores), np.float32)
    for chunk in document_chunks(len(scores)):
        with np.errstate(under="ignore"):
            weights[chunk] = unscaled(chunk) / mean
    return weights


def keep_top_fraction(weights: np.ndarray, fraction: float) -> np.ndarray:
    """Keep the weights of the best documents and set the others to 0.

    Args:
        weights: `[D]` floats that are finite and at least 0.
        fraction: Share of the documents to keep, above 0 and at most 1: `fraction * D`
            rounded to the nearest whole number, at least 1. Of equal weights the document with
            the lower number is kept.

    Returns:
        `[D]` float32.

    Raises:
        ValueError: There are no weights, one of them is NaN, infinite or negative, or the
            fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number above 0 and at most 1, found {fraction}")
    weights = _as_floats(weights, "weights")
    _check(
        weights, lambda w: (w >= 0) & (w < np.inf), "weight", "weights are finite and at least 0"
    )
    kept = max(1, round(fraction * len(weights)))
    place = len(weights) - kept
    threshold = np.partition(weights, place)[place]
    above = weights > threshold
    ties = np.flatnonzero(weights == threshold)[: kept - int(np.count_nonzero(above))]
    result = np.zeros(len(weights), np.float32)
    result[above] = weights[above]
    result[ties] = threshold
    return result


@dataclass(frozen=True)
class Ranks:
    """A number's rank among those of all documents: a table, interpolated between its rows.

    Attributes:
        values: `[k]` ascending numbers.
        places: `[k]` float64 in [0, 1]: the share of all tokens in documents with a smaller number,
            plus half the share of those with the same number.
    """

    values: np.ndarray
    places: np.ndarray

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the ranks of numbers in [0, 1], float64 in their shape."""
        return np.interp(numbers, self.values, self.places)


def ranks_of(numbers: Sequence[np.ndarray], tokens: Sequence[np.ndarray], rows: int) -> Ranks:
    """Returns the ranks of numbers among all documents of several data sets.

    Args:
        numbers: for each data set, `[D]` finite numbers.
        tokens: for each data set, `[D]` lengths of the documents.
        rows: k at most. Exact if there are at most that many distinct numbers, else within 1 / k.
    """
    values = np.concatenate([np.asarray(part, np.float64) for part in numbers])
    sizes = np.concatenate([np.asarray(part, np.float64) for part in tokens])
    distinct, place = np.unique(values, return_inverse=True)
    share = np.bincount(place, weights=sizes, minlength=len(distinct))
    share /= max(share.sum(), 1.0)
    places = np.cumsum(share) - share / 2
    if len(distinct) > rows:
        # Evenly spaced in tokens, including both ends.
        kept = np.searchsorted(places, np.linspace(places[0], places[-1], rows))
        kept = np.unique(kept.clip(max=len(places) - 1))
        distinct, places = distinct[kept], places[kept]
    return Ranks(distinct, places)


def weights_by_sequence(
    weights: np.ndarray, document_indices: np.ndarray, first: int, last: int
) -> np.ndarray:
    """Return the weight of each sequence from `first` up to `last`: that of its document.

    Args:
        weights: `[D]` float32.
        document_indices: `[D + 1]`, see `IndexSummary`.
        first: First sequence.
        last: The sequence after the last one.

    Returns:
        `[last - first]` float32; a slice of `weights` itself if every document is one sequence.
    """
    if _one_sequence_each(document_indices, first, last):
        return weights[first:last]
    result = np.empty(last - first, np.float32)
    begin, end = documents_of(document_indices, np.array([first, last - 1]))
    for chunk in document_chunks(int(end) + 1, int(begin)):
        bounds = np.clip(document_indices[chunk.start : chunk.stop + 1], first, last)
        places = slice(bounds[0] - first, bounds[-1] - first)
        result[places] = np.repeat(weights[chunk], np.diff(bounds))
    return result


def _one_sequence_each(document_indices: np.ndarray, first: int, last: int) -> bool:
    """Whether each of the sequences is the document of the same number."""
    return last < len(document_indices) and all(
        np.array_equal(document_indices[chunk], np.arange(chunk.start, chunk.stop))
        for chunk in document_chunks(last + 1, first)
    )


def distinct_domains(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Return the domains that occur in arrays of domains, ascending and without -1."""
    found = np.zeros(0, np.int32)
    for part in parts:
        found = np.union1d(found, part)
    return found[found >= 0]


def weight_summary(weight_file: WeightFile) -> dict:
    """Sum up the weights of a file.

    Returns:
        `documents`, `sequences`, `tokens`, `digest`; `min`, `mean` and `max` weight;
        `zero_share`, the share of the documents that have the weight 0;
        `effective_sample_size`, `(sum w)^2 / sum w^2 / D`, which is 1 for equal weights and 1/D
        when all weight is on one document; `quantiles`, from the level as text to the smallest
        weight that at least this share of the documents does not exceed.
    """
    weights, documents = weight_file.weights, weight_file.documents
    total = squares = 0.0
    zeros, low, high = 0, np.inf, 0.0
    for chunk in document_chunks(documents):
        values = weights[chunk].astype(np.float64)
        total += float(values.sum())
        squares += float((values * values).sum())
        zeros += len(values) - int(np.count_nonzero(values))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    ranks = [max(int(np.ceil(level * documents)), 1) - 1 for level in QUANTILES]
    quantiles = zip(QUANTILES, _order_statistics(weights, ranks), strict=True)
    return {
        "documents": documents,
        "sequences": weight_file.sequences,
        "tokens": weight_file.tokens,
        "digest": weight_file.digest,
        "min": low,
        "mean": total / documents,
        "max": high,
        "zero_share": zeros / documents,
        "effective_sample_size": total * total / squares / documents,
        "quantiles": {str(level): value for level, value in quantiles},
    }


def domain_summary(weight_file: WeightFile, index: IndexSummary | None) -> list[dict]:
    """Sum up a weight file by domain.

    Args:
        weight_file: The file.
        index: The index of the dataset, or None if not available.

    Returns:
        One dict for each domain in the order of their numbers, last the documents without a
        domain under NO_DOMAIN if there are any; an empty list when the file has no domains.
        `domain`: name, or the number as text; `documents`; `tokens`, None without an index;
        `weight_share`: share of the total weight, which is the share of the draws;
        `expected_token_share`: share of the tokens of an epoch, proportional to the sum of
        weight times tokens, None without an index, 0 everywhere if all drawn documents are empty.
    """
    if weight_file.domains is None:
        return []
    labels, position = _domain_positions(weight_file.domains, weight_file.domain_names)
    bins = len(labels)
    documents = np.zeros(bins, np.int64)
    tokens = np.zeros(bins, np.int64)
    weight = np.zeros(bins)
    expected = np.zeros(bins)
    for chunk in document_chunks(weight_file.documents):
        places = position(weight_file.domains[chunk])
        weights = weight_file.weights[chunk].astype(np.float64)
        documents += np.bincount(places, minlength=bins)
        weight += np.bincount(places, weights, minlength=bins)
        if index is not None:
            lengths = index.document_tokens(chunk.start, chunk.stop)
            np.add.at(tokens, places, lengths)
            expected += np.bincount(places, weights * lengths, minlength=bins)
    rows = [
        {
            "domain": label,
            "documents": int(documents[k]),
            "tokens": None if index is None else int(tokens[k]),
            "weight_share": float(weight[k] / weight.sum()),
            "expected_token_share": (
                None if index is None else float(expected[k] / (expected.sum() or 1.0))
            ),
        }
        for k, label in enumerate(labels)
    ]
    # Entry 0 is for documents without a domain.
    return rows[1:] + rows[:1] if documents[0] else rows[1:]


def _domain_positions(
    domains: np.ndarray, names: Sequence[str]
) -> tuple[list[str], Callable[[np.ndarray], np.ndarray]]:
    """Number the domains without gaps, from 1; 0 means none.

    Bare numbers may be few and far apart, up to 2^31.
    """
    if names:
        return [NO_DOMAIN, *names], lambda values: values.astype(np.int64) + 1
    found = distinct_domains(domains[chunk] for chunk in document_chunks(len(domains)))
    return [NO_DOMAIN, *map(str, found.tolist())], lambda values: np.where(
        values < 0, 0, np.searchsorted(found, values) + 1
    )


def _order_statistics(weights: np.ndarray, ranks: Sequence[int]) -> list[float]:
    """Return the weights of given ranks (0: the smallest) in two passes, without a copy.

    The bits of non-negative float32 numbers, read as integers, sort like the numbers: a histogram
    of the upper 16 bits finds the bin of each rank, one of the lower 16 its value.
    """

    def bits(chunk: slice) -> np.ndarray:
        # Adding 0 turns -0.0, which would sort last because of its sign bit, into 0.0.
        return (weights[chunk] + np.float32(0)).view(np.uint32)

    chunks = list(document_chunks(len(weights)))
    upper = np.zeros(1 << 16, np.int64)
    for chunk in chunks:
        upper += np.bincount(bits(chunk) >> 16, minlength=1 << 16)
    ends = np.cumsum(upper)
    high = {rank: int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
    lower = {place: np.zeros(1 << 16, np.int64) for place in set(high.values())}
    for chunk in chunks:
        values = bits(chunk)
        for place, histogram in lower.items():
            inside = values[(values >> 16) == place] & 0xFFFF
            histogram += np.bincount(inside, minlength=1 << 16)
    found = []
    for rank in ranks:
        place = high[rank]
        before = int(ends[place] - upper[place])
        low = int(np.searchsorted(np.cumsum(lower[place]), rank - before, side="right"))
        found.append(float(np.array(place << 16 | low, np.uint32).view(np.float32)))
    return found


def _as_floats(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{name}: expected one number for each document, found {array.dtype} of shape "
            f"{array.shape}"
        )
    return array


def _check(
    values: np.ndarray, good: Callable[[np.ndarray], np.ndarray], what: str, rule: str
) -> None:
    for chunk in document_chunks(len(values)):
        fine = good(values[chunk])
        if not fine.all():
            bad = chunk.start + int(np.argmin(fine))
            raise ValueError(f"document {bad} has the {what} {values[bad]}; {rule}")
