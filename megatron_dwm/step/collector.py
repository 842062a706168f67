"""Passes the weights of a run's samples on, to be recorded by document."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from megatron_dwm.data.weights_seen import DocumentWeightsSeen
from megatron_dwm.errors import DWMError

_WAIT = 4  # steps after which a step's weights are read: by then the GPU has computed them


class Collector:
    """Reads weights a few steps after they were passed in, so that no step waits for the device.

    Args:
        seen: receives them.
        ranks: number of ranks that have a collector.
    """

    def __init__(self, seen: DocumentWeightsSeen, ranks: int) -> None:
        self.seen, self.ranks = seen, ranks
        self._waiting: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque()

    def note(self, batches: list[Any], weights: torch.Tensor) -> None:
        """Accepts a step's weights.

        Args:
            batches: micro-batches with `document_ids` `[b, s]` and, for a blend, `dataset_id`
                `[b]`.
            weights: `[n]` weights of their samples, in their order.

        Raises:
            DWMError: the batches do not name their documents.
        """
        if not all(isinstance(batch, dict) and "document_ids" in batch for batch in batches):
            raise DWMError(
                "--dwm-document-weights: the data loader's batches have no field 'document_ids' "
                "([micro_batch_size, seq_length]); use Megatron's GPTDataset, or leave it out",
                this_rank_only=True,
            )
        ids = torch.cat([batch["document_ids"] for batch in batches])
        sets = torch.zeros(len(ids), dtype=torch.int64)
        if "dataset_id" in batches[0]:
            sets = torch.cat([batch["dataset_id"].view(-1) for batch in batches])
        self._waiting.append((ids, sets, weights.detach()))
        self.settle(_WAIT)

    def settle(self, left: int = 0) -> None:
        """Reads the weights of all steps but the last `left`."""
        while len(self._waiting) > left:
            found = (values.cpu().numpy() for values in self._waiting.popleft())
            self.seen.add(*found)
