"""Sums over a step's samples that start at its end and are awaited in the next step."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.core.topology import Topology


class StepSums:
    """A policy's sums over data-parallel ranks, without waiting for them in the step itself.

    Args:
        topology: which ranks hold which samples.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._pending: tuple[torch.Tensor, Any] | None = None

    def start(self, sums: torch.Tensor) -> None:
        """Starts to add up the ranks' sums `[k]`, in place."""
        self._pending = (sums, self.topology.start_sum_over_samples(sums))

    def take(self) -> torch.Tensor | None:
        """Waits for the sums that were started last and returns them; then None until restarted."""
        if self._pending is None:
            return None
        sums, handle = self._pending
        self._pending = None
        if handle is not None:
            handle.wait()
        return sums


def share_of_new(age: torch.Tensor | float, decay: float) -> torch.Tensor:
    """Returns a step's share in a running average: all steps count equally while there are few."""
    age = torch.as_tensor(age)
    return torch.maximum(torch.full_like(age, 1 - decay), 1 / age)
