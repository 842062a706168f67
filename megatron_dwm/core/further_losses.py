"""Losses of multi-token prediction, per sample and weighted, though no loss function sees them.

With `--mtp-num-layers` Megatron adds further losses inside the model's forward pass. For each of
the extra layers `process_mtp_loss` computes token losses `[b, s]`, masked and divided like the
schedule's loss,

    factor / layers * mask * loss / (the mask's sum, shifted)

and passes them to `MTPLossAutoScaler.apply(hidden_states, losses)`. This returns the states
unchanged, and in the backward pass gives each of those losses the gradient of the schedule's loss:
1 / micro-batches, or 1 with `--calculate-per-token-loss`. So sample i's part of the trainer's loss
is

    sum over layers and tokens of row i, / micro-batches / data-parallel size
    the same / tokens of the global batch, with `--calculate-per-token-loss`

and a weight is applied as a factor on the gradient of row i. Weights may be computed after the
forward pass, from its losses and states, because the backward pass comes later. Values stay as they
are, so reported losses stay unweighted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

# Takes the `[b, s]` losses of one extra layer.
type Listener = Callable[[torch.Tensor], None]


class _Now:
    listener: Listener | None = None


def hand_on(losses: torch.Tensor) -> None:
    """Passes the `[b, s]` losses of one extra layer to the listener; called by the host."""
    if _Now.listener is not None:
        _Now.listener(losses)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A context in which `listener` receives the further losses of the forward passes."""
    before, _Now.listener = _Now.listener, listener
    try:
        yield
    finally:
        _Now.listener = before


class WeightLater:
    """Weights one micro-batch's further losses with weights that are set after its forward pass."""

    def __init__(self) -> None:
        self.weights: torch.Tensor | None = None

    def __call__(self, losses: torch.Tensor) -> None:
        """As a listener: attaches the weights to the losses' gradient."""
        if losses.requires_grad:
            losses.register_hook(self._scale)

    def _scale(self, grad: torch.Tensor) -> torch.Tensor:
        assert self.weights is not None, "the loss function runs before the backward pass"
        return grad * self.weights.to(grad.dtype).unsqueeze(1)


class SumLater:
    """Sums one micro-batch's further losses over layers and tokens, sample by sample."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def __call__(self, losses: torch.Tensor) -> None:
        """As a listener: adds `[b, s]` losses, in float64."""
        sums = losses.detach().double().sum(1)
        self.sums = sums if self.sums is None else self.sums + sums


def has_further_losses(config: Any) -> bool:
    """Returns whether a model with this `TransformerConfig` has multi-token prediction losses."""
    return bool(getattr(config, "mtp_num_layers", None))


@contextlib.contextmanager
def without_further_losses(*configs: Any) -> Iterator[None]:
    """Switches them off through their factor, which `process_mtp_loss` reads in each pass.

    Args:
        configs: the `TransformerConfig` of each model chunk, see `configs_of`.
    """
    having = [config for config in configs if has_further_losses(config)]
    factors = [config.mtp_loss_scaling_factor for config in having]
    for config in having:
        config.mtp_loss_scaling_factor = 0.0
    try:
        yield
    finally:
        for config, factor in zip(having, factors, strict=True):
            config.mtp_loss_scaling_factor = factor


def logged() -> dict[str, Any]:
    """Returns a copy of what the trainer has collected about them for its log."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in MTPLossLoggingHelper.tracker.items()
    }


def put_back_logged(kept: dict[str, Any]) -> None:
    """Restores what `logged` returned."""
    tracker = MTPLossLoggingHelper.tracker
    tracker.clear()
    tracker.update(kept)
