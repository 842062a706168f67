"""The step's micro-batches, read once and passed to every pass of the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_dwm.errors import DWMError


class StepBatches:
    """Micro-batches of one step, as each model chunk of this rank sees them.

    Args:
        data_iterator: what the trainer passes to `train_step`: an iterator, None (no data on this
            rank), or, with virtual pipeline stages, a list of these, one per model chunk.
        num_microbatches: how many to read.
    """

    def __init__(self, data_iterator: Any, num_microbatches: int) -> None:
        self._is_list = isinstance(data_iterator, list)
        iterators = data_iterator if self._is_list else [data_iterator]
        self.chunks: list[list[Any] | None] = []
        for iterator in iterators:
            if iterator is None:
                self.chunks.append(None)
                continue
            if hasattr(iterator, "advance"):
                # Megatron's replaying iterator keeps its batches until it advances; the step's own
                # copies are here.
                iterator.advance()
            self.chunks.append([next(iterator) for _ in range(num_microbatches)])
            if hasattr(iterator, "advance"):
                iterator.advance()

    @classmethod
    def like(cls, data_iterator: Any, batches: list[Any] | None) -> StepBatches:
        """Returns the same micro-batches for every chunk that has a data iterator."""
        self = cls.__new__(cls)
        self._is_list = isinstance(data_iterator, list)
        iterators = data_iterator if self._is_list else [data_iterator]
        self.chunks = [None if it is None else batches for it in iterators]
        return self

    def replay(self, wrap: Any = iter) -> Any:
        """Returns fresh iterators in the trainer's own form.

        Args:
            wrap: makes an iterator of a list (Megatron's `RerunDataIterator` for its own step).
        """
        fresh = [None if chunk is None else wrap(_copies(chunk)) for chunk in self.chunks]
        return fresh if self._is_list else fresh[0]

    def first(self) -> list[Any] | None:
        """Returns the micro-batches of the first chunk (the embedding's), None without data."""
        return self.chunks[0]

    def last(self) -> list[Any] | None:
        """Returns the micro-batches of the last chunk (the losses'), None without data."""
        return self.chunks[-1]


def _copies(chunk: list[Any]) -> Iterator[Any]:
    """Yields shallow copies, because `get_batch` functions write device tensors into the dict."""
    for batch in chunk:
        yield dict(batch) if isinstance(batch, dict) else batch


def document_field(setting: str) -> str:
    """Returns the batch field that holds the samples' document numbers for a setting."""
    return f"dwm_{setting}"


def tokens_of(batches: list[Any] | None) -> list[torch.Tensor] | None:
    """Returns the `[b, s]` token ids of each micro-batch; None if this rank has no data."""
    if batches is None:
        return None
    if not all(isinstance(batch, dict) and "tokens" in batch for batch in batches):
        raise DWMError(
            "the data loader's batches have no field 'tokens' ([micro_batch_size, seq_length] "
            "token ids), which the weighting model reads; use Megatron's GPTDataset batches",
            this_rank_only=True,
        )
    return [batch["tokens"] for batch in batches]
