"""Which ranks hold which samples and parts of them: the interface of weighting to the layout.

A sample is on one data-parallel *replica*. Its loss is seen on the replica's last pipeline stage;
its gradient is split over the replica's tensor- and pipeline-parallel ranks, its positions over
tensor-parallel (hidden states under sequence parallelism) and context-parallel ranks.

Shapes: n samples on this replica, N on all of them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megatron_dwm.core import collectives


class Topology(Protocol):
    """The layout of a run as weighting needs it; each method is called on all ranks involved.

    Attributes:
        sees_losses: whether this rank is in the last pipeline stage.
        replicas: number of data-parallel ranks.
    """

    sees_losses: bool
    replicas: int

    # ---------------------------------------------------------------- samples, over replicas

    def gather_samples(self, local: torch.Tensor) -> torch.Tensor:
        """Returns `[N]` from every replica's `[n]`, in the order (replica, micro-batch, sample)."""
        ...

    def own_samples(self, values: torch.Tensor) -> torch.Tensor:
        """Returns this replica's part `[n]` of `[N]`."""
        ...

    def sum_over_samples(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the sum of what each replica computed on its own samples."""
        ...

    def start_sum_over_samples(self, value: torch.Tensor) -> Any:
        """Does the same in place, without waiting; returns a handle or None."""
        ...

    def start_largest_over_samples(self, value: torch.Tensor) -> Any:
        """Starts the elementwise maximum, like `start_sum_over_samples`."""
        ...

    # ---------------------------------------------------------------- parts of a sample

    def sum_over_parts(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the ranks that hold parts of one replica: tensor x pipeline."""
        ...

    def own_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns the positions `[s / tp, ...]` whose hidden states are on this rank."""
        ...

    def gather_parts_of_states(self, part: torch.Tensor) -> torch.Tensor:
        """Returns `[ranks, ...]`: each rank's values for its part of the samples' hidden states."""
        ...

    def gather_parts_of_context(self, part: torch.Tensor) -> torch.Tensor:
        """Returns `[ranks, ...]`: each rank's values for its part of the context."""
        ...

    # ---------------------------------------------------------------- agreement

    def make_equal(self, value: torch.Tensor) -> torch.Tensor:
        """Makes tensor-parallel peers, which computed the same, agree bit for bit, in place."""
        ...

    def any_of_peers(self, flags: torch.Tensor) -> torch.Tensor:
        """Returns which flags are set on any of the tensor-parallel peers."""
        ...


class Megatron:
    """The layout of a Megatron run.

    Args:
        groups: the language model's `ProcessGroupCollection`.
    """

    def __init__(self, groups: Any) -> None:
        self.groups = groups
        self.sees_losses = groups.pp.rank() == groups.pp.size() - 1
        self.replicas = groups.dp.size()

    def gather_samples(self, local: torch.Tensor) -> torch.Tensor:
        """See `Topology.gather_samples`."""
        return collectives.gather_samples(local, self.groups.dp)

    def own_samples(self, values: torch.Tensor) -> torch.Tensor:
        """See `Topology.own_samples`."""
        return values.chunk(self.replicas)[self.groups.dp.rank()]

    def sum_over_samples(self, value: torch.Tensor) -> torch.Tensor:
        """See `Topology.sum_over_samples`."""
        return collectives.sum_over_data_parallel(value, self.groups.dp)

    def start_sum_over_samples(self, value: torch.Tensor) -> Any:
        """See `Topology.start_sum_over_samples`."""
        return collectives.start_sum_over_data_parallel(value, self.groups.dp)

    def start_largest_over_samples(self, value: torch.Tensor) -> Any:
        """See `Topology.start_largest_over_samples`."""
        return collectives.start_largest(value, self.groups.dp)

    def sum_over_parts(self, value: torch.Tensor) -> torch.Tensor:
        """See `Topology.sum_over_parts`."""
        return collectives.sum_over_model_parallel(value, self.groups.mp)

    def own_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """See `Topology.own_positions`."""
        return positions.chunk(self.groups.tp.size())[self.groups.tp.rank()]

    def gather_parts_of_states(self, part: torch.Tensor) -> torch.Tensor:
        """See `Topology.gather_parts_of_states`."""
        return _gathered(part, self.groups.tp)

    def gather_parts_of_context(self, part: torch.Tensor) -> torch.Tensor:
        """See `Topology.gather_parts_of_context`."""
        return _gathered(part, self.groups.cp)

    def make_equal(self, value: torch.Tensor) -> torch.Tensor:
        """See `Topology.make_equal`."""
        return collectives.broadcast_over_tensor_parallel(value, self.groups.tp)

    def any_of_peers(self, flags: torch.Tensor) -> torch.Tensor:
        """See `Topology.any_of_peers`."""
        if self.groups.tp.size() == 1:
            return flags
        return collectives.largest(flags.int(), self.groups.tp).bool()


class OneProcess:
    """One process that holds everything: for tools, tests and custom trainers."""

    sees_losses = True
    replicas = 1

    def gather_samples(self, local: torch.Tensor) -> torch.Tensor:
        """See `Topology.gather_samples`."""
        return local

    def own_samples(self, values: torch.Tensor) -> torch.Tensor:
        """See `Topology.own_samples`."""
        return values

    def sum_over_samples(self, value: torch.Tensor) -> torch.Tensor:
        """See `Topology.sum_over_samples`."""
        return value

    def start_sum_over_samples(self, value: torch.Tensor) -> Any:
        """See `Topology.start_sum_over_samples`."""
        return None

    def start_largest_over_samples(self, value: torch.Tensor) -> Any:
        """See `Topology.start_largest_over_samples`."""
        return None

    def sum_over_parts(self, value: torch.Tensor) -> torch.Tensor:
        """See `Topology.sum_over_parts`."""
        return value

    def own_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """See `Topology.own_positions`."""
        return positions

    def gather_parts_of_states(self, part: torch.Tensor) -> torch.Tensor:
        """See `Topology.gather_parts_of_states`."""
        return part.unsqueeze(0)

    def gather_parts_of_context(self, part: torch.Tensor) -> torch.Tensor:
        """See `Topology.gather_parts_of_context`."""
        return part.unsqueeze(0)

    def make_equal(self, value: torch.Tensor) -> torch.Tensor:
        """See `Topology.make_equal`."""
        return value

    def any_of_peers(self, flags: torch.Tensor) -> torch.Tensor:
        """See `Topology.any_of_peers`."""
        return flags


def _gathered(part: torch.Tensor, group: Any) -> torch.Tensor:
    if group.size() == 1:
        return part.unsqueeze(0)
    return collectives.gather_moments(part, group)
