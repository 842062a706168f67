"""Every random state that Megatron's layers draw from."""

from __future__ import annotations

from megatron.core.tensor_parallel.random import _get_all_rng_states, _set_all_rng_states


def random_states() -> tuple:
    """Returns the states of the CPU's and the device's generators, and of Megatron's tracker."""
    return _get_all_rng_states()


def restore_random_states(states: tuple) -> None:
    """Puts back random states; copies the tracker's dict, which the tracker goes on to change."""
    cpu, cuda, tracker = states
    _set_all_rng_states(cpu, cuda, dict(tracker))
