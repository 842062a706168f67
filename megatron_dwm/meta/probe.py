"""Ground truth for the meta-gradient, by really re-running the trainer's own step.

`brute_force`: change one sample's weight, run the trainer's step from the saved state, measure the
meta loss. `reference`: the loop of per-sample backward passes, with the v of the product's own
passes B and C. Both are far too slow for training; they prove the estimators on real runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.tensor_parallel.random import _get_all_rng_states

from megatron_dwm.batches import StepBatches
from megatron_dwm.guards import gathered_parameters, quiet, restore_rng
from megatron_dwm.meta import reference as reference_estimator
from megatron_dwm.meta.optimizer_view import leaf_optimizers, learning_rates
from megatron_dwm.meta.update import InnerStep, trainable_parameters
from megatron_dwm.train_step import DWMTrainStep, Trainee

StockStep = Callable[[Any], tuple]


class TrainerState:
    """All that a training step changes: parameters, optimizer, scheduler, random states.

    Args:
        trainee: the LLM, after at least one step (the optimizer must have its state).
        scheduler: Megatron's learning-rate scheduler.
    """

    def __init__(self, trainee: Trainee, scheduler: Any) -> None:
        self.tensors = [(t, t.detach().clone()) for t in _tensors(trainee)]
        self.groups = [
            (group, {k: v for k, v in group.items() if k != "params"})
            for leaf in leaf_optimizers(trainee.optimizer)
            for group in leaf.optimizer.param_groups
        ]
        self.scheduler, self.num_steps = scheduler, scheduler.num_steps
        self.rng = _get_all_rng_states()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for tensor, value in self.tensors:
            tensor.data.copy_(value)
        for group, values in self.groups:
            group.update(values)
        self.scheduler.num_steps = self.num_steps
        restore_rng(self.rng)


def _tensors(trainee: Trainee) -> list[torch.Tensor]:
    found = [p for chunk in trainee.model for p in chunk.parameters()]
    for leaf in leaf_optimizers(trainee.optimizer):
        for group in leaf.optimizer.param_groups:
            for param in group["params"]:
                found.append(param)
                state = leaf.optimizer.state[param]
                found += [v for v in state.values() if isinstance(v, torch.Tensor)]
    return found


def brute_force(
    step: DWMTrainStep,
    trainee: Trainee,
    scheduler: Any,
    stock_step: StockStep,
    batches: StepBatches,
    weights: torch.Tensor,
    samples: list[int],
    delta: float,
) -> torch.Tensor:
    """Returns `(L_meta(w_i + delta) - L_meta(w_i - delta)) / (2 delta)` for chosen samples.

    Args:
        step: the modified step; its meta data's next batch measures the meta loss.
        trainee: the LLM, at the state before the step; left there.
        scheduler: Megatron's learning-rate scheduler.
        stock_step: the trainer's own step on a data iterator.
        batches: the step's micro-batches.
        weights: `[N]`, the weights around which one is changed.
        samples: global sample numbers.
        delta: change of the weight.

    Returns:
        `[len(samples)]` float64 on last-stage ranks, zeros elsewhere.
    """
    assert step.meta_data is not None
    position = step.meta_data.consumed_samples
    with gathered_parameters(trainee):
        state = TrainerState(trainee, scheduler)
    found = torch.zeros(len(samples), dtype=torch.float64)
    for k, sample in enumerate(samples):
        losses = []
        for sign in (1.0, -1.0):
            changed = weights.clone()
            changed[sample] += sign * delta
            with gathered_parameters(trainee):
                weighted_step(step, stock_step, batches, changed)
                with quiet(trainee):
                    losses.append(step.meta_loss(trainee, position))
                state.restore()
        found[k] = (losses[0] - losses[1]) / (2.0 * delta)
    return found


def reference(
    step: DWMTrainStep,
    trainee: Trainee,
    scheduler: Any,
    stock_step: StockStep,
    batches: StepBatches,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Returns `c_i = <v, g_i>` `[N]` by per-sample backward passes, float64, on every rank.

    The arguments are those of `brute_force`. The meta data's position is put back.
    """
    assert step.meta_data is not None
    position = step.meta_data.consumed_samples
    lrs = learning_rates(trainee.optimizer)
    with gathered_parameters(trainee):
        state = TrainerState(trainee, scheduler)
        result = weighted_step(step, stock_step, batches, weights)
        inner = InnerStep.capture(trainee.optimizer, lrs, result[5])
        found = _pull_back_and_loop(step, trainee, batches, weights, inner, state)
        state.restore()
    step.meta_data.consumed_samples = position
    return found


def _pull_back_and_loop(
    step: DWMTrainStep,
    trainee: Trainee,
    batches: StepBatches,
    weights: torch.Tensor,
    inner: InnerStep,
    state: TrainerState,
) -> torch.Tensor:
    """Passes C and the reference estimator, at the state before the step."""
    with quiet(trainee):
        step.meta_gradient(trainee)
        inner.pull_back(trainee.model)
        v = [p.main_grad.clone() for p in trainable_parameters(trainee.model)]
        state.restore()
        for parameter, value in zip(trainable_parameters(trainee.model), v, strict=True):
            parameter.main_grad.copy_(value)
        return reference_estimator.estimate(
            trainee.optimizer,
            weights.numel(),
            lambda i: _backward_of_sample(step, trainee, batches, weights, i, state),
        )


def weighted_step(
    step: DWMTrainStep, stock_step: StockStep, batches: StepBatches, weights: torch.Tensor
) -> tuple:
    """Runs the trainer's own step with the given weights `[N]` of the global batch."""
    with step.forward_step.weighted(_local(step, weights)):
        return stock_step(batches.replay(RerunDataIterator))


def _backward_of_sample(
    step: DWMTrainStep,
    trainee: Trainee,
    batches: StepBatches,
    weights: torch.Tensor,
    sample: int,
    state: TrainerState,
) -> None:
    one_hot = torch.zeros_like(weights)
    one_hot[sample] = 1.0
    for chunk in trainee.model:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    restore_rng(state.rng)
    with step.forward_step.weighted(_local(step, one_hot)):
        step.run_passes(trainee, batches, get_num_microbatches(), forward_only=False)


def _local(step: DWMTrainStep, weights: torch.Tensor) -> torch.Tensor | None:
    if not step.sees_losses:
        return None
    return step.local_part(weights).view(get_num_microbatches(), -1)
