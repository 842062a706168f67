"""Splits a corpus into chunks of documents, windows of tokens and batches; pools scores.

Chunks are ranges of documents with about equal numbers of tokens: the unit of work and of resuming.
A document longer than `seq_length` is split into windows. Batches never cross chunks, so a chunk's
scores do not depend on who computes it. Shapes: D documents, C chunks, m documents and n windows in
a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_dwm.data.index import IndexSummary
from megatron_dwm.data.weight_file import document_chunks

# A document's cost beyond its tokens, in tokens: keeps chunks of tiny documents short.
_DOCUMENT_COST = 8
EMPTY_SCORE = -np.inf


@dataclass(frozen=True)
class Windows:
    """The windows of a chunk, in the order of their documents.

    Attributes:
        document: `[n]` int64, which document of the chunk, from 0.
        start: `[n]` int64, first token in the document.
        length: `[n]` int64, tokens, at least 1.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def chunk_bounds(index: IndexSummary, chunk_tokens: int) -> np.ndarray:
    """Splits a corpus into chunks of about `chunk_tokens` tokens.

    Returns:
        `[C + 1]` int64: chunk c has the documents from bound c up to bound c + 1. No chunk is
        empty, and the bounds depend on the index alone.
    """
    bounds, cost, number = [], 0, -1
    for part in document_chunks(index.documents):
        costs = index.document_tokens(part.start, part.stop) + _DOCUMENT_COST
        ends = cost + np.cumsum(costs)
        # Of the documents with the same chunk number, the first one begins the chunk.
        numbers = (ends - costs) // chunk_tokens
        bounds.append(part.start + np.flatnonzero(np.diff(numbers, prepend=number)))
        cost, number = int(ends[-1]), int(numbers[-1])
    return np.append(np.concatenate([np.zeros(0, np.int64), *bounds]), index.documents)


def cut_into_windows(lengths: np.ndarray, seq_length: int) -> Windows:
    """Splits documents into windows of `seq_length` tokens; the last one of each may be shorter.

    Args:
        lengths: `[m]` integers, tokens of each document; one without tokens has no window.
        seq_length: Largest window.
    """
    lengths = np.asarray(lengths, np.int64)
    counts = -(-lengths // seq_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first[document]) * seq_length
    return Windows(document, start, np.minimum(seq_length, lengths[document] - start))


def batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Yields batches of windows of similar length, longest first.

    Args:
        lengths: `[n]` tokens of each window.
        max_tokens: Maximum tokens of a batch, including padding; a longer window is its own batch.

    Yields:
        Numbers of the windows of a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        count = max(1, max_tokens // int(lengths[order[first]]))
        yield order[first : first + count]
        first += count


def pool_windows(scores: np.ndarray, windows: Windows, documents: int) -> np.ndarray:
    """Returns each document's score: the mean of its windows' scores, weighted by their tokens.

    Args:
        scores: `[n]` scores of the windows.
        windows: The windows.
        documents: m.

    Returns:
        `[m]` float32, `EMPTY_SCORE` for a document without tokens.
    """
    sums = np.bincount(
        windows.document, scores.astype(np.float64) * windows.length, minlength=documents
    )
    tokens = np.bincount(windows.document, windows.length, minlength=documents)
    pooled = np.full(documents, EMPTY_SCORE)
    np.divide(sums, tokens, out=pooled, where=tokens > 0)
    return pooled.astype(np.float32)
