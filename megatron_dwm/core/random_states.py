"""Every random state that Megatron's layers draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from megatron.core.tensor_parallel.random import (
    _get_all_rng_states,
    _set_all_rng_states,
    model_parallel_cuda_manual_seed,
)


def random_states() -> tuple:
    """Returns the states of the CPU's and the device's generators, and of Megatron's tracker."""
    return _get_all_rng_states()


def restore_random_states(states: tuple) -> None:
    """Restores random states; copies the tracker's dict, because the tracker changes it later."""
    cpu, cuda, tracker = states
    _set_all_rng_states(cpu, cuda, dict(tracker))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds every generator for what is built inside, and restores all of them.

    This way the LLM's training does not depend on whether there is a weighting model.
    """
    states = random_states()
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        restore_random_states(states)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
