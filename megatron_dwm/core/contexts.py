"""Contexts for the extra passes of a meta step, which keep them from disturbing the trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import unwrap_model

from megatron_dwm.core.further_losses import logged, put_back_logged, without_further_losses
from megatron_dwm.core.random_states import random_states, restore_random_states

# Buffers of Megatron's routers that change in each pass or at its end.
_BALANCE = {
    "expert_bias",
    "local_tokens_per_expert",
    "global_tokens_per_expert",
    "ga_steps",
    "qb_beta",
    "qb_beta_accum",
    "qb_beta_count",
}

if TYPE_CHECKING:
    from megatron_dwm.core.trainee import Trainee


@contextlib.contextmanager
def gathered_parameters(trainee: Trainee) -> Iterator[None]:
    """A context in which all parameters are gathered, even with `--overlap-param-gather`.

    With that flag, hooks spread the gathering over the next forward pass, and would overwrite the
    perturbed parameters of pass D.
    """
    overlapping = [c for c in trainee.model if c.ddp_config.overlap_param_gather]
    hooked = [c for c in overlapping if len(c.remove_forward_pre_hook_handles) > 0]
    param_sync_func, trainee.config.param_sync_func = trainee.config.param_sync_func, None
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    if overlapping:
        step = trainee.optimizer.step

        def step_and_gather(*args: Any, **kwargs: Any) -> Any:
            outcome = step(*args, **kwargs)
            for chunk in overlapping:
                chunk.start_param_sync(force_sync=True)
            return outcome

        trainee.optimizer.step = step_and_gather
    try:
        yield
    finally:
        if overlapping:
            del trainee.optimizer.step
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        trainee.config.param_sync_func = param_sync_func


@contextlib.contextmanager
def quiet(trainee: Trainee) -> Iterator[None]:
    """Keeps the extra passes out of the trainer's timers, checks of results, and routers' balance.

    The counts of MoE routers, the biases derived from them, and the logged losses of multi-token
    prediction then come from the trainer's own passes alone. The rerun state machine validates only
    those, and its checks, like DDP's for NaN in gradients, would end the run when a meta step
    should just be skipped.
    """
    machine = get_rerun_state_machine()
    mode, timers = machine.mode, trainee.config.timers
    # Within another `quiet`, the check has already been replaced.
    nested = "validate_result" in vars(machine)
    checks = [(c.ddp_config, c.ddp_config.check_for_nan_in_grad) for c in trainee.model]
    # Not set_mode(), which prints a warning at every call.
    machine.mode = RerunMode.DISABLED
    machine.validate_result = lambda *args, **kwargs: None
    trainee.config.timers = None
    for ddp_config, _ in checks:
        ddp_config.check_for_nan_in_grad = False
    balance = [(buffer, buffer.clone()) for buffer in _balance_of_routers(trainee.model)]
    further = logged()
    try:
        yield
    finally:
        put_back_logged(further)
        for buffer, value in balance:
            buffer.copy_(value)
        for ddp_config, check in checks:
            ddp_config.check_for_nan_in_grad = check
        trainee.config.timers = timers
        if not nested:
            del machine.validate_result
        machine.mode = mode


def _balance_of_routers(model: list[Any]) -> Iterator[torch.Tensor]:
    """Yields the buffers in which routers of MoE layers keep the load of their experts."""
    for chunk in model:
        for module in chunk.modules() if isinstance(chunk, torch.nn.Module) else ():
            if isinstance(module, Router):
                for name, buffer in module.named_buffers(recurse=False):
                    if name in _BALANCE:
                        yield buffer


@contextlib.contextmanager
def deterministic(trainee: Trainee) -> Iterator[None]:
    """A context for the meta loss, a validation loss: no dropout, no auxiliary losses, no MTP.

    Activation recomputation works in training mode only, so a run that needs it to fit in memory
    keeps that mode (and its dropout, if any); auxiliary losses are switched off by their
    coefficients, and the random state is restored afterwards.
    """
    rng = random_states()
    if trainee.config.recompute_granularity is None:
        for chunk in trainee.model:
            chunk.eval()
    try:
        configs = configs_of(trainee.model)
        with without_auxiliary_losses(*configs), without_further_losses(*configs):
            yield
    finally:
        for chunk in trainee.model:
            chunk.train()
        restore_random_states(rng)


@contextlib.contextmanager
def without_gradients(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """A context in which backward passes compute no gradients of these parameters."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def configs_of(model: list[Any]) -> list[Any]:
    """Returns the `TransformerConfig`s of model chunks, each once; a chunk may have its own."""
    configs = [chunk.config for chunk in unwrap_model(model)]
    return list({id(config): config for config in configs}.values())


@contextlib.contextmanager
def without_auxiliary_losses(*configs: Any) -> Iterator[None]:
    """Switches off the auxiliary losses of MoE layers, which no sample's weight scales.

    Args:
        configs: the `TransformerConfig` of each model chunk, which its routers read in each pass.
    """
    having = [config for config in configs if config.num_moe_experts is not None]
    kept = [(config.moe_aux_loss_coeff, config.moe_z_loss_coeff) for config in having]
    for config, (aux, _) in zip(having, kept, strict=True):
        # With several balancing types there is one coefficient for each.
        config.moe_aux_loss_coeff = [0.0] * len(aux) if isinstance(aux, list) else 0.0
        config.moe_z_loss_coeff = None
    try:
        yield
    finally:
        for config, (aux, z) in zip(having, kept, strict=True):
            config.moe_aux_loss_coeff, config.moe_z_loss_coeff = aux, z
