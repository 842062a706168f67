"""Sums over a step's samples that are started at its end and waited for in the next."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.core.topology import Topology


class StepSums:
    """What a policy adds up over data parallelism, without waiting for it in the step itself.

    Args:
        topology: which ranks hold which samples.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._pending: tuple[torch.Tensor, Any] | None = None

    def start(self, sums: torch.Tensor) -> None:
        """Starts adding up this rank's sums `[k]`, in place."""
        self._pending = (sums, self.topology.start_sum_over_samples(sums))

    def take(self) -> torch.Tensor | None:
        """Returns the sums that were started last, waiting for them; None the next time."""
        if self._pending is None:
            return None
        sums, handle = self._pending
        self._pending = None
        if handle is not None:
            handle.wait()
        return sums


def share_of_new(age: torch.Tensor | float, decay: float) -> torch.Tensor:
    """Returns how much a step counts in a running average: all alike as long as there are few."""
    age = torch.as_tensor(age)
    return torch.maximum(torch.full_like(age, 1 - decay), 1 / age)
