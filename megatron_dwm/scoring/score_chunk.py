"""Scores the documents of one chunk."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from megatron_dwm.data.token_reader import TokenReader
from megatron_dwm.errors import DWMError
from megatron_dwm.scoring.documents import batches, cut_into_windows, pool_windows


class WindowScorer(Protocol):
    """A weighting model that scores windows of tokens.

    Attributes:
        where: what was loaded, for messages.
        vocab_size: token ids are below it.
        max_length: longest supported window; None for any.
        default_length: default window length; None if it must be given.
        temperature: tau that it was trained with; None if unknown.
        notes: lines that the user should see.
    """

    where: str
    vocab_size: int
    max_length: int | None
    default_length: int | None
    temperature: float | None
    notes: list[str]

    def scores(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Scores a batch.

        Args:
            tokens: `[b, s]` int64 on the CPU, padded on the right.
            lengths: `[b]` int64 on the CPU, tokens of each window without the padding.

        Returns:
            `[b]` float32 on the model's device; no score depends on the padding or on other
            windows.
        """
        ...

    def identity(self) -> str:
        """Returns a digest of everything that the scores depend on: weights, shape, device."""
        ...


@torch.no_grad()
def score_chunk(
    scorer: WindowScorer,
    reader: TokenReader,
    first: int,
    last: int,
    seq_length: int,
    micro_batch_size: int,
) -> np.ndarray:
    """Scores the documents `first` to `last - 1`.

    Args:
        scorer: The weighting model.
        reader: The corpus.
        first: First document.
        last: One after the last document.
        seq_length: Longest window.
        micro_batch_size: Maximum windows of `seq_length` per batch, or as many tokens in shorter
            windows.

    Returns:
        `[last - first]` float32, `EMPTY_SCORE` for a document without tokens.

    Raises:
        DatasetError: A token id is outside the vocabulary.
        DWMError: A score is not finite.
    """
    documents = [reader.document(number) for number in range(first, last)]
    windows = cut_into_windows(np.array([len(d) for d in documents]), seq_length)
    order: list[np.ndarray] = []
    # Fetched from the device at the end, so that it computes while the next batch is prepared.
    found: list[torch.Tensor] = []
    for batch in batches(windows.length, micro_batch_size * seq_length):
        lengths = windows.length[batch]
        tokens = np.zeros((len(batch), int(lengths.max())), np.int64)
        for row, window in enumerate(batch):
            begin = windows.start[window]
            part = documents[windows.document[window]][begin : begin + windows.length[window]]
            tokens[row, : len(part)] = part
        found.append(scorer.scores(torch.from_numpy(tokens), torch.from_numpy(lengths)))
        order.append(batch)
    scores = np.zeros(len(windows.length), np.float32)
    if found:
        scores[np.concatenate(order)] = torch.cat(found).cpu().numpy()
    finite = np.isfinite(scores)
    if not finite.all():
        bad = int(windows.document[np.argmin(finite)])
        raise DWMError(
            f"{scorer.where}: the score of document {first + bad} of {reader.index.prefix} is "
            f"{scores[np.argmin(finite)]}; the model's weights are damaged or have diverged: take "
            "an earlier checkpoint or snapshot",
            this_rank_only=True,
        )
    return pool_windows(scores, windows, last - first)
