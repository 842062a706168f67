"""Ground truth for the meta-gradient, by really re-running the trainer's own step.

`brute_force`: change one sample's weight, run the trainer's step from the saved state, measure the
meta loss. `reference`: the loop of per-sample backward passes, with the v of the product's own
passes B and C. Both are far too slow for training; they prove the estimators on real runs.

As a command it takes a saved run one step on and compares there:

    torchrun --nproc-per-node N -m megatron_dwm.meta.probe --checkpoint RUN [--samples 8]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel.random import _get_all_rng_states

from megatron_dwm.batches import StepBatches
from megatron_dwm.guards import gathered_parameters, quiet, restore_rng
from megatron_dwm.influence import Influence, StockStep
from megatron_dwm.meta import collectives
from megatron_dwm.meta import reference as reference_estimator
from megatron_dwm.meta.optimizer_view import leaf_optimizers, learning_rates
from megatron_dwm.meta.update import (
    InnerStep,
    pull_back_before_step,
    pull_back_identity,
    trainable_parameters,
)
from megatron_dwm.passes import Trainee
from megatron_dwm.train_step import DWMTrainStep


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


@dataclass
class ProbedStep:
    """One training step that can be taken again and again.

    Attributes:
        step: the modified step; its meta data's next batch measures the meta loss.
        trainee: the LLM, at the state before the step; every function here leaves it there.
        scheduler: Megatron's learning-rate scheduler.
        stock_step: the trainer's own step on a data iterator.
        batches: the step's micro-batches.
        weights: `[N]` of the global batch, on every rank (only last-stage ranks use the values).
    """

    step: DWMTrainStep
    trainee: Trainee
    scheduler: Any
    stock_step: StockStep
    batches: StepBatches
    weights: torch.Tensor

    def state(self) -> TrainerState:
        """Returns a copy of all that the step changes."""
        with gathered_parameters(self.trainee):
            return TrainerState(self.trainee, self.scheduler)


def influence(probed: ProbedStep, estimator: str | None = None) -> Influence | None:
    """Returns what the product's own passes B to D find, without taking the step.

    Args:
        probed: the step.
        estimator: instead of the configured one.
    """
    step = probed.step
    assert step.meta_data is not None
    position, state = step.meta_data.consumed_samples, probed.state()
    _, found = step.meta_gradient.step(
        probed.stock_step, probed.trainee, probed.batches, probed.weights, estimator
    )
    with gathered_parameters(probed.trainee):
        state.restore()
    step.meta_data.consumed_samples = position
    return found


def brute_force(probed: ProbedStep, samples: list[int], delta: float) -> torch.Tensor:
    """Returns `(L_meta(w_i + delta) - L_meta(w_i - delta)) / (2 delta)` for chosen samples.

    Args:
        probed: the step.
        samples: global sample numbers.
        delta: change of the weight.

    Returns:
        `[len(samples)]` float64 on last-stage ranks, zeros elsewhere.
    """
    step = probed.step
    assert step.meta_data is not None
    position, state = step.meta_data.consumed_samples, probed.state()
    found = torch.zeros(len(samples), dtype=torch.float64)
    for k, sample in enumerate(samples):
        losses = []
        for sign in (1.0, -1.0):
            changed = probed.weights.clone()
            changed[sample] += sign * delta
            with gathered_parameters(probed.trainee):
                step.meta_gradient.weighted_step(probed.stock_step, probed.batches, changed)
                with quiet(probed.trainee):
                    losses.append(step.passes.meta_loss(probed.trainee, position))
                state.restore()
        found[k] = (losses[0] - losses[1]) / (2.0 * delta)
    return found


def reference(probed: ProbedStep) -> torch.Tensor:
    """Returns `c_i = <v, g_i>` `[N]` by per-sample backward passes, float64, on every rank.

    v is that of the configured lookahead and Jacobian. The meta data's position is put back.
    """
    step, trainee = probed.step, probed.trainee
    assert step.meta_data is not None
    position, state = step.meta_data.consumed_samples, probed.state()
    lrs = learning_rates(trainee.optimizer)
    with gathered_parameters(trainee):
        exact = step.config.jacobian == "exact"
        inner = None
        if step.config.lookahead == "next":
            result, _ = step.meta_gradient.weighted_step(
                probed.stock_step, probed.batches, probed.weights
            )
            inner = InnerStep.capture(trainee.optimizer, lrs, result[5]) if exact else None
        with quiet(trainee):
            step.passes.meta_gradient(trainee)
            if not exact:
                pull_back_identity(max(lrs.values(), default=0.0), trainee.model)
            elif inner is not None:
                inner.pull_back(trainee.model)
            else:
                pull_back_before_step(trainee.optimizer, lrs, trainee.model)
            v = [p.main_grad.clone() for p in trainable_parameters(trainee.model)]
            state.restore()
            for parameter, value in zip(trainable_parameters(trainee.model), v, strict=True):
                parameter.main_grad.copy_(value)
            found = reference_estimator.estimate(
                trainee.optimizer,
                probed.weights.numel(),
                lambda i: _backward_of_sample(probed, i, state),
            )
        state.restore()
    step.meta_data.consumed_samples = position
    return found


def _backward_of_sample(probed: ProbedStep, sample: int, state: TrainerState) -> None:
    step, trainee = probed.step, probed.trainee
    one_hot = torch.zeros_like(probed.weights)
    one_hot[sample] = 1.0
    for chunk in trainee.model:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    restore_rng(state.rng)
    local = None
    if step.sees_losses:
        local = step.passes.local_part(one_hot).view(get_num_microbatches(), -1)
    with step.forward_step.weighted(local):
        step.passes.run(trainee, probed.batches, get_num_microbatches(), forward_only=False)


@dataclass
class Verification:
    """How a step's meta-gradient compares with what a changed weight really does.

    Attributes:
        samples: global sample numbers.
        estimated: `c_i` of the product, for those samples.
        measured: the same by brute force.
        correlation: Pearson's, NaN where one side is constant.
        relative_error: `|estimated - measured| / |measured|`.
    """

    samples: list[int]
    estimated: list[float]
    measured: list[float]
    correlation: float
    relative_error: float


def verify(probed: ProbedStep, count: int, delta: float = 0.25) -> Verification | None:
    """Compares the product's meta-gradient with brute force on a few samples.

    The samples are those with the largest and the smallest estimate, half of each, as the
    others drown first in the rounding of the meta loss.

    Args:
        probed: the step.
        count: number of samples, at most the batch.
        delta: change of a weight.

    Returns:
        The comparison, equal on every rank; None when there is nothing to look ahead from yet.
    """
    found = influence(probed)
    if found is None:
        return None
    count = min(count, probed.weights.numel())
    groups = probed.step.groups
    chosen = torch.zeros(count, dtype=torch.int64, device=found.values.device)
    both = torch.zeros(2, count, dtype=torch.float64, device=found.values.device)
    if probed.step.sees_losses:
        order = torch.argsort(found.values)
        chosen = torch.cat([order[: count // 2], order[len(order) - (count - count // 2) :]])
        both[0] = found.values[chosen].double()
    chosen = collectives.broadcast_from_last_stage(chosen.contiguous(), groups.pp)
    samples = [int(i) for i in chosen.tolist()]
    both[1] = brute_force(probed, samples, delta).to(both.device)
    both = collectives.broadcast_from_last_stage(both, groups.pp)
    estimated, measured = both[0].cpu(), both[1].cpu()
    return Verification(
        samples,
        estimated.tolist(),
        measured.tolist(),
        torch.corrcoef(torch.stack([estimated, measured]))[0, 1].item(),
        (
            torch.linalg.vector_norm(estimated - measured) / torch.linalg.vector_norm(measured)
        ).item(),
    )


if __name__ == "__main__":
    from megatron_dwm.integration.probe_command import main

    raise SystemExit(main())
