"""The meta set: Megatron indexed data sets, read in an order that depends only on the position.

The state is one number, the samples consumed so far, so a resumed run continues exactly, at any
data-parallel size. A thread reads the next meta batch ahead while the trainer trains.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy
from torch.utils.data import default_collate


def meta_batch_unit(
    micro_batch_size: int,
    data_parallel_size: int,
    virtual_stages: int = 1,
    together: int | None = None,
) -> int:
    """Returns the number that a meta batch must be a multiple of, for Megatron's schedules.

    Args:
        micro_batch_size: b.
        data_parallel_size: number of replicas.
        virtual_stages: pipeline stages, if they are virtual, else 1.
        together: micro-batches that a virtual stage processes in a row.
    """
    return micro_batch_size * data_parallel_size * max(virtual_stages, together or virtual_stages)


def default_meta_batch_size(batch: int, unit: int) -> int:
    """Returns the allowed size nearest to a quarter of the global batch."""
    return max(1, round(batch / 4 / unit)) * unit


class MetaData:
    """Draws meta batches for this data-parallel rank.

    Args:
        datasets: map-style data sets of samples; empty on ranks that read no data.
        weights: sampling weight of each data set; None for one data set.
        batch_size: samples per meta step over all data-parallel ranks.
        micro_batch_size: b.
        dp_rank: this rank's data-parallel rank.
        dp_size: data-parallel size.
        seed: seed of the order.
        reads_ahead: whether a thread reads the next batch while the trainer trains; not if the data
            sets share something with the trainer's that only one thread may use.
    """

    def __init__(
        self,
        datasets: list[Any],
        weights: list[float] | None,
        batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        reads_ahead: bool = True,
    ) -> None:
        self.datasets, self.weights, self.reads_ahead = datasets, weights, reads_ahead
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.dp_rank, self.dp_size, self.seed = dp_rank, dp_size, seed
        self.num_microbatches = batch_size // (micro_batch_size * dp_size)
        self.consumed_samples = 0
        self._order: tuple[int, numpy.ndarray] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future] | None = None
        # Data sets have internal state, so only one thread may use them at a time.
        self._lock = threading.Lock()

    def next_batches(self) -> list[Any] | None:
        """Returns the next meta batch's micro-batches of this rank, and advances.

        Returns:
            As many collated batches as `num_microbatches`, or None on ranks without data.
        """
        position = self.consumed_samples
        self.consumed_samples += self.batch_size
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position:
            found = ahead[1].result()
        else:
            found = self.batches_at(position)
        self._read_ahead()
        return found

    def _read_ahead(self) -> None:
        """Starts to read the batch at the position; harmless if another one is needed."""
        if not (self.datasets and self.reads_ahead):
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="meta-batch")
        position = self.consumed_samples
        self._ahead = position, self._reader.submit(self.batches_at, position)

    def batches_at(self, position: int) -> list[Any] | None:
        """Returns this rank's micro-batches of the meta batch that starts at `position`."""
        if not self.datasets:
            return None
        with self._lock:
            return self._batches_at(position)

    def _batches_at(self, position: int) -> list[Any]:
        batches = []
        for k in range(self.num_microbatches):
            # The trainer's own order: micro-batch by micro-batch, rank by rank.
            first = position + (k * self.dp_size + self.dp_rank) * self.micro_batch_size
            batches.append(
                default_collate([self.sample(first + j) for j in range(self.micro_batch_size)])
            )
        return batches

    def sample(self, index: int) -> Any:
        """Returns the `index`-th sample of the endless meta stream.

        One data set: epochs, each newly shuffled. Several: independent weighted draws.
        """
        if len(self.datasets) == 1:
            length = len(self.datasets[0])
            epoch, offset = divmod(index, length)
            if self._order is None or self._order[0] != epoch:
                rng = numpy.random.default_rng([self.seed, epoch])
                self._order = (epoch, rng.permutation(length))
            return self.datasets[0][int(self._order[1][offset])]
        rng = numpy.random.default_rng([self.seed, index])
        weights = numpy.asarray(self.weights or [len(d) for d in self.datasets], dtype=float)
        chosen = self.datasets[int(rng.choice(len(self.datasets), p=weights / weights.sum()))]
        return chosen[int(rng.integers(len(chosen)))]

    def state_dict(self) -> dict[str, int]:
        """Returns the position."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Moves to a saved position."""
        self.consumed_samples = int(state["consumed_samples"])
