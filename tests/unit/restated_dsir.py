"""The n-gram features of DSIR, restated plainly: no cache, hexadecimal digests."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator


def words(text: str) -> list[str]:
    """What nltk's WordPunctTokenizer gives: runs of word characters, runs of other characters."""

    def kind(c: str) -> str:
        return "word" if c.isalnum() or c == "_" else "space" if c.isspace() else "other"

    runs = [(k, "".join(run)) for k, run in itertools.groupby(text.lower(), kind)]
    return [run for k, run in runs if k != "space"]


def buckets_of(text: str, ngrams: int, buckets: int) -> Iterator[int]:
    found = words(text)
    for length in range(1, ngrams + 1):
        for first in range(len(found) - length + 1):
            ngram = " ".join(found[first : first + length])
            yield int(hashlib.sha256(ngram.encode("utf-8")).hexdigest(), 16) % buckets
