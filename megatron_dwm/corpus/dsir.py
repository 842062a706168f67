"""Data selection with importance resampling (DSIR): hashed n-grams, importance weights, selection.

Xie et al., "Data Selection for Language Models via Importance Resampling", NeurIPS 2023,
arXiv 2302.03169. A text is lower-cased and split into words and runs of punctuation; each of its
n-grams, from single words up to n words, is hashed into one of B buckets. With p and q the shares
of the buckets in the target and in the raw texts, a document's log importance weight is the sum
over its n-grams of `log(p + 1e-8) - log(q + 1e-8)`. Documents are drawn without replacement in
proportion to their weights by the Gumbel top-k trick: the k largest sums of log weight and noise.
Shapes: B buckets, D documents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

# Words as in nltk's WordPunctTokenizer.
_WORDS = re.compile(r"\w+|[^\w\s]+")
_EPSILON = 1e-8
# Cache sizes: words, and as many n-grams of three or more words; slots for pairs. Under 100 MB per
# process.
_REMEMBERED = 1 << 18
_SLOT_BITS = 20
# Multiplier of Fibonacci hashing, which spreads neighbouring keys over the slots.
_MIXER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Features:
    """What is counted.

    Attributes:
        ngrams: Words of the longest n-grams.
        buckets: Number of buckets B.
    """

    ngrams: int = 2
    buckets: int = 10_000


def _bucket(ngram: str, buckets: int) -> int:
    return int.from_bytes(sha256(ngram.encode()).digest()) % buckets


class _Words(dict):
    """Number of each word, counted from 0 as they come.

    Attributes:
        single: Bucket of each word, by its number.
    """

    def __init__(self, buckets: int):
        super().__init__()
        self._buckets = buckets
        self.single: list[int] = []

    def __missing__(self, word: str) -> int:
        bucket = _bucket(word, self._buckets)
        self[word] = number = len(self.single)
        self.single.append(bucket)
        return number


class _Longer(dict):
    """Bucket of each n-gram of more than two words; cleared when it is full."""

    def __init__(self, buckets: int):
        super().__init__()
        self._buckets = buckets

    def __missing__(self, ngram: tuple[str, ...]) -> int:
        bucket = _bucket(" ".join(ngram), self._buckets)
        if len(self) >= _REMEMBERED:
            self.clear()
        self[ngram] = bucket
        return bucket


class _Pairs:
    """Buckets of pairs of words. Each pair has one slot, which keeps the latest pair.

    It uses arrays, because look-ups dominate the time: a dictionary of pairs is hardly faster than
    hashing them again.
    """

    def __init__(self, buckets: int):
        self._buckets = buckets
        self._keys = np.full(1 << _SLOT_BITS, -1, np.int64)
        self._found = np.zeros(1 << _SLOT_BITS, np.int64)

    def of(self, words: Sequence[str], numbers: np.ndarray) -> np.ndarray:
        """Returns the bucket of each pair of neighbours, `[n - 1]` int64 of n words."""
        keys = numbers[:-1] << 32 | numbers[1:]
        slots = (keys.view(np.uint64) * _MIXER >> np.uint64(64 - _SLOT_BITS)).view(np.int64)
        found = self._found[slots]
        missing = np.flatnonzero(self._keys[slots] != keys)
        for first in missing.tolist():
            found[first] = _bucket(f"{words[first]} {words[first + 1]}", self._buckets)
        # Of several pairs for one slot, the same one must write both its key and its bucket.
        taken, which = np.unique(slots[missing], return_index=True)
        self._keys[taken] = keys[missing[which]]
        self._found[taken] = found[missing[which]]
        return found


class Hasher:
    """Turns texts into the buckets of their n-grams."""

    def __init__(self, features: Features):
        """Sets what is counted."""
        self._features = features
        self._longer = _Longer(features.buckets)
        self._forget()

    def buckets(self, text: str) -> np.ndarray:
        """Returns the bucket of every n-gram of a text.

        Returns:
            `[n]` int64.

        Raises:
            UnicodeEncodeError: The text has a lone surrogate, which has no UTF-8.
        """
        if len(self._words) >= _REMEMBERED:
            self._forget()
        words = _WORDS.findall(text.lower())
        numbers = list(map(self._words.__getitem__, words))
        found = [np.array(list(map(self._words.single.__getitem__, numbers)), np.int64)]
        if self._features.ngrams > 1 and len(words) > 1:
            found.append(self._pairs.of(words, np.array(numbers, np.int64)))
        for length in range(3, self._features.ngrams + 1):
            ngrams = zip(*(words[first:] for first in range(length)), strict=False)
            found.append(np.array(list(map(self._longer.__getitem__, ngrams)), np.int64))
        return np.concatenate(found)

    def _forget(self) -> None:
        # Pairs are identified by the numbers of their words.
        self._words = _Words(self._features.buckets)
        self._pairs = _Pairs(self._features.buckets)


def count(found: Iterable[np.ndarray], features: Features) -> np.ndarray:
    """Counts the n-grams of several texts.

    Args:
        found: The buckets of each text.
        features: What is counted.

    Returns:
        `[B]` int64.
    """
    together = np.concatenate([np.zeros(0, np.int64), *found])
    return np.bincount(together, minlength=features.buckets)


def log_ratios(target: np.ndarray, raw: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """Returns the log ratio of a bucket's shares in the target and in the raw texts.

    Args:
        target: `[B]` counts, at least one above 0 unless there is smoothing.
        raw: `[B]` counts, at least one above 0.
        smoothing: Pseudo-count added to each count of the target.

    Returns:
        `[B]` float64.
    """
    smoothed = target + smoothing
    p, q = smoothed / smoothed.sum(), raw / raw.sum()
    return np.log(p + _EPSILON) - np.log(q + _EPSILON)


def log_weight(found: np.ndarray, ratios: np.ndarray) -> float:
    """Returns the log importance weight of a text.

    The sum is rounded once, at its end, so the order of the n-grams does not matter.

    Args:
        found: `[n]` buckets of its n-grams.
        ratios: `[B]` log ratios.
    """
    return math.fsum(ratios[found].tolist())


def select(log_weights: np.ndarray, eligible: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws documents without replacement, in proportion to their importance weights.

    Args:
        log_weights: `[D]` float64.
        eligible: `[D]` bool, whether a document may be drawn.
        fraction: Share of all D documents, rounded to the nearest whole number of them and at
            least 1; fewer are drawn if fewer are eligible.
        seed: Seed of the Gumbel noise; document i's noise does not depend on the others.

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
