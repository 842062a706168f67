"""Shared by benchmarks that take a trainer's steps; import it once the host is installed."""

from __future__ import annotations

import gc
import time

import torch

from megatron_dwm.step.plan import StepPlan


class Always:
    """A schedule in which every step is weighted, and takes a meta step or does not."""

    def __init__(self, meta_step: bool) -> None:
        self.meta_step = meta_step

    def plan(self, iteration: int) -> StepPlan:
        """Returns the plan of any step."""
        return StepPlan(0, "meta" if self.meta_step else "frozen", True, self.meta_step, False)


def live_bytes() -> int:
    """Returns the bytes of all tensors that are alive, each storage once."""
    time.sleep(0.05)  # until threads of gloo have let go of what they have sent
    storages = {}
    for thing in gc.get_objects():
        # `isinstance` would ask every object for its class.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
