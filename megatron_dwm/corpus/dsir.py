"""Data selection with importance resampling (DSIR): hashed n-grams, importance weights, selection.

Xie et al., "Data Selection for Language Models via Importance Resampling", NeurIPS 2023,
arXiv 2302.03169. A text is lower-cased and cut into words and runs of punctuation; each of its
n-grams, from single words up to n words, falls into one of B buckets by a hash. With p and q the
shares of the buckets in the target and in the raw texts, a document's log importance weight is the
sum over its n-grams of `log(p + 1e-8) - log(q + 1e-8)`. Documents are drawn without replacement in
proportion to their weights by the Gumbel top-k trick: the k largest sums of log weight and noise.
Shapes: B buckets, D documents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain

import numpy as np

# What nltk's WordPunctTokenizer takes for a word.
_WORDS = re.compile(r"\w+|[^\w\s]+")
_EPSILON = 1e-8
# N-grams whose buckets are remembered, of one word and of several: under 100 MB for each process.
_REMEMBERED = 1 << 18


@dataclass(frozen=True)
class Features:
    """What is counted.

    Attributes:
        ngrams: Words of the longest n-grams.
        buckets: Number of buckets B.
    """

    ngrams: int = 2
    buckets: int = 10_000


class _Buckets(dict):
    """Bucket of each n-gram, a word or a tuple of words; forgets all when it is full."""

    def __init__(self, buckets: int):
        super().__init__()
        self._buckets = buckets

    def __missing__(self, ngram: str | tuple[str, ...]) -> int:
        text = ngram if isinstance(ngram, str) else " ".join(ngram)
        bucket = int.from_bytes(sha256(text.encode()).digest()) % self._buckets
        if len(self) >= _REMEMBERED:
            self.clear()
        self[ngram] = bucket
        return bucket


class Hasher:
    """Turns texts into the buckets of their n-grams."""

    def __init__(self, features: Features):
        """Sets what is counted."""
        self._longest = features.ngrams
        self._single = _Buckets(features.buckets)
        self._longer = _Buckets(features.buckets)

    def buckets(self, text: str) -> list[int]:
        """Returns the bucket of every n-gram of a text.

        Raises:
            UnicodeEncodeError: The text has a lone surrogate, which has no UTF-8.
        """
        words = _WORDS.findall(text.lower())
        found = list(map(self._single.__getitem__, words))
        for length in range(2, self._longest + 1):
            ngrams = zip(*(words[first:] for first in range(length)), strict=False)
            found.extend(map(self._longer.__getitem__, ngrams))
        return found


def count(found: Iterable[list[int]], features: Features) -> np.ndarray:
    """Counts the n-grams of several texts.

    Args:
        found: The buckets of each text.
        features: What is counted.

    Returns:
        `[B]` int64.
    """
    together = np.fromiter(chain.from_iterable(found), np.int64)
    return np.bincount(together, minlength=features.buckets)


def log_ratios(target: np.ndarray, raw: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """Returns the log ratio of a bucket's shares in the target and in the raw texts.

    Args:
        target: `[B]` counts, one above 0 at least unless there is smoothing.
        raw: `[B]` counts, one above 0 at least.
        smoothing: Pseudo-count that is added to each count of the target.

    Returns:
        `[B]` float64.
    """
    smoothed = target + smoothing
    p, q = smoothed / smoothed.sum(), raw / raw.sum()
    return np.log(p + _EPSILON) - np.log(q + _EPSILON)


def log_weight(found: Iterable[int], ratios: Sequence[float]) -> float:
    """Returns the log importance weight of a text.

    The sum is rounded once, at its end, so the order of the n-grams leaves no trace.

    Args:
        found: The buckets of its n-grams.
        ratios: `[B]` log ratios; a list is read much faster than an array.
    """
    return math.fsum(map(ratios.__getitem__, found))


def select(log_weights: np.ndarray, eligible: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws documents without replacement, in proportion to their importance weights.

    Args:
        log_weights: `[D]` float64.
        eligible: `[D]` bool, whether a document may be drawn.
        fraction: Share of all D documents, rounded to the nearest whole number of them and at
            least 1; fewer are drawn where fewer are eligible.
        seed: Of the Gumbel noise, which document i gets whatever the others are.

    Returns:
        `[D]` bool, whether a document is drawn.
    """
    wanted = max(1, round(fraction * len(log_weights)))
    keys = np.random.default_rng(seed).gumbel(size=len(log_weights))
    keys += log_weights
    keys[~eligible] = -np.inf
    best = np.argsort(-keys, kind="stable")[: min(wanted, int(np.count_nonzero(eligible)))]
    selected = np.zeros(len(log_weights), bool)
    selected[best] = True
    return selected
