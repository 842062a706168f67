"""Everything that the trainer's own step changes, so that the step can be undone and repeated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import unwrap_model

from megatron_dwm.core.further_losses import logged, put_back_logged
from megatron_dwm.core.optimizers import leaf_optimizers
from megatron_dwm.core.random_states import random_states, restore_random_states
from megatron_dwm.core.trainee import Trainee

# What the rerun state machine changes even in mode DISABLED.
_MACHINE = ("state", "current_iteration", "validation_counts", "first_iteration_complete")


class TrainerState:
    """A copy of everything that a training step changes.

    It holds parameters and buffers of the model; parameters, state and settings of the optimizer;
    the learning-rate scheduler; every random state; and what the trainer keeps for its log: timers,
    MoE metrics, losses of multi-token prediction, the count of the rerun state machine. Gradient
    buffers are not included, because every step zeroes them first.

    Tensors are kept in host memory: a second copy of the model and its optimizer may not fit on the
    device.

    Args:
        trainee: the LLM, all parameters gathered (`gathered_parameters`).
        scheduler: Megatron's learning-rate scheduler.
    """

    def __init__(self, trainee: Trainee, scheduler: Any) -> None:
        self.tensors = [(t, _kept(t)) for t in _tensors(trainee)]
        self.groups = [
            (group, {k: v for k, v in group.items() if k != "params"}) for group in _groups(trainee)
        ]
        self.states = [(state, dict(state)) for state in _states(trainee)]
        self.without_state = list(_without_state(trainee))
        # Transformer Engine's Adam keeps scales for 16-bit moments, changed in place, beside the
        # state.
        self.scales = [(s, {k: _kept(v) for k, v in s.items()}) for s in _scales(trainee)]
        self.modules = [(module, dict(vars(module))) for module in _modules(trainee)]
        self.scheduler, self.num_steps = scheduler, scheduler.num_steps
        self.rng = random_states()
        self.other_rng = random.getstate(), numpy.random.get_state()
        machine = get_rerun_state_machine()
        self.machine = {name: getattr(machine, name) for name in _MACHINE if hasattr(machine, name)}
        self.timers = [(timer, dict(vars(timer))) for timer in _timers(trainee)]
        self.further = logged()
        self.moe = {name: _kept(e.values) for name, e in get_moe_metrics_tracker().metrics.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Restores everything, bit for bit."""
        for group, values in self.groups:
            group.update(values)
        for state, values in self.states:
            _put_back(state, values)
        for states, param in self.without_state:
            states.pop(param, None)
        for tensor, value in self.tensors:
            tensor.data.copy_(value)
        for scales, kept in self.scales:
            _put_back_scales(scales, kept)
        for module, values in self.modules:
            _put_back(vars(module), values)
        self.scheduler.num_steps = self.num_steps
        restore_random_states(self.rng)
        random.setstate(self.other_rng[0])
        numpy.random.set_state(self.other_rng[1])
        machine = get_rerun_state_machine()
        for name, value in self.machine.items():
            setattr(machine, name, value)
        for timer, values in self.timers:
            vars(timer).update(values)
        put_back_logged(self.further)
        self._restore_moe_metrics()

    def _restore_moe_metrics(self) -> None:
        for name, entry in get_moe_metrics_tracker().metrics.items():
            if name in self.moe:
                entry.values.copy_(self.moe[name])
            else:
                entry.values.zero_()


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _put_back(values: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """Restores a dict without touching values that were not replaced."""
    for name in [name for name in values if name not in kept]:
        del values[name]
    for name, value in kept.items():
        if name not in values or values[name] is not value:
            values[name] = value


def _groups(trainee: Trainee) -> Iterator[dict[str, Any]]:
    for leaf in leaf_optimizers(trainee.optimizer):
        yield from leaf.optimizer.param_groups


def _states(trainee: Trainee) -> Iterator[dict[str, Any]]:
    """Yields the optimizer's state of each tensor that it updates."""
    for leaf in leaf_optimizers(trainee.optimizer):
        for group in leaf.optimizer.param_groups:
            for param in group["params"]:
                # Not with [], which would create an empty one.
                state = leaf.optimizer.state.get(param)
                if state is not None:
                    yield state


def _without_state(trainee: Trainee) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Yields the optimizer's states and each tensor without a state in them yet."""
    for leaf in leaf_optimizers(trainee.optimizer):
        for group in leaf.optimizer.param_groups:
            for param in group["params"]:
                if param not in leaf.optimizer.state:
                    yield leaf.optimizer.state, param


def _scales(trainee: Trainee) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the scales of each tensor's low-precision moments, by the moment's name."""
    for leaf in leaf_optimizers(trainee.optimizer):
        yield from getattr(leaf.optimizer, "_scales", {}).values()


def _put_back_scales(scales: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> None:
    for name, value in kept.items():
        scales[name].copy_(value)


def _modules(trainee: Trainee) -> Iterator[torch.nn.Module]:
    """Yields the model's modules, without their wrappers, which track buffers in flight."""
    for chunk in trainee.model:
        yield from unwrap_model(chunk).modules()


def _tensors(trainee: Trainee) -> Iterator[torch.Tensor]:
    """Yields every tensor that a step changes in place, once."""
    seen: set[int] = set()
    found: list[torch.Tensor] = [p for chunk in trainee.model for p in chunk.parameters()]
    found += [b for module in _modules(trainee) for b in module.buffers(recurse=False)]
    found += [p for group in _groups(trainee) for p in group["params"]]
    for state in _states(trainee):
        found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in found:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _timers(trainee: Trainee) -> Iterator[Any]:
    """Yields the trainer's timers, in which a trial step must not count."""
    yield from getattr(trainee.config.timers, "_timers", {}).values()


def refusal(optimizer: Any) -> str | None:
    """Returns why an optimizer's step cannot be undone; None if it can."""
    for leaf in leaf_optimizers(optimizer):
        if getattr(leaf.config, "optimizer_cpu_offload", False):
            return (
                "--optimizer-cpu-offload updates copies of the parameters that cannot be restored"
            )
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(leaf.config, name, None) == torch.uint8:
                flag = f"--{name.replace('_', '-')}"
                return f"{flag} fp8 keeps scales that cannot be restored"
    return None
