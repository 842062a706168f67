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
    """Puts back random states; copies the tracker's dict, which the tracker goes on to change."""
    cpu, cuda, tracker = states
    _set_all_rng_states(cpu, cuda, dict(tracker))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds every generator for what is built inside, and puts all back.

    So the LLM's training does not depend on there being a weighting model.
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
