"""Ground truth for the meta-gradient, by actually re-running the trainer's own step.

`brute_force`: change one sample's weight, run the trainer's step from the saved state, measure the
meta loss. `reference`: a loop of per-sample backward passes, with the v of the package's own passes
B and C. Both are far too slow for training; they verify the estimators on real runs.

The command `probe` advances a saved run by one step and compares there.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_dwm.core import collectives
from megatron_dwm.core.batches import StepBatches
from megatron_dwm.core.contexts import configs_of, gathered_parameters, quiet
from megatron_dwm.core.further_losses import without_further_losses
from megatron_dwm.core.optimizers import learning_rates
from megatron_dwm.core.random_states import restore_random_states
from megatron_dwm.core.trainee import StepOutcome, Trainee
from megatron_dwm.core.trainer_state import TrainerState
from megatron_dwm.errors import DWMError
from megatron_dwm.meta_gradient import per_sample as reference_estimator
from megatron_dwm.meta_gradient.comparison import (
    TOLERANCE,
    TOLERANCE_BF16,
    Verification,
    compare,
)
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import has_stepped
from megatron_dwm.meta_gradient.pull_back import (
    InnerStep,
    pull_back_before_step,
    pull_back_identity,
    trainable_parameters,
)
from megatron_dwm.step.influence_passes import Influence, StockStep
from megatron_dwm.step.train_step import DWMTrainStep


@dataclass
class ProbedStep:
    """One training step that can be repeated.

    Attributes:
        step: the modified step; its meta data's next batch measures the meta loss.
        trainee: the LLM, in the state before the step; every function here restores that state.
        scheduler: Megatron's learning-rate scheduler.
        stock_step: the trainer's own step on a data iterator.
        batches: the step's micro-batches.
        weights: `[N]` weights of the global batch, on every rank (only last-stage ranks use them).
    """

    step: DWMTrainStep
    trainee: Trainee
    scheduler: Any
    stock_step: StockStep
    batches: StepBatches
    weights: torch.Tensor

    def state(self) -> TrainerState:
        """Returns a copy of everything that the step changes."""
        with gathered_parameters(self.trainee):
            return TrainerState(self.trainee, self.scheduler)

    def quiet_step(self, iterator: Any) -> StepOutcome:
        """Takes the trainer's step without its result checks, which could end the run."""
        with quiet(self.trainee):
            return self.stock_step(iterator)

    def ready(self) -> bool:
        """Returns, the same on every rank, whether there is anything to compare.

        Adam's first step is the gradient's sign, which no weight changes; and at a learning rate
        of 0, as at the start of a warm-up, no step changes anything.
        """
        missing = torch.tensor(float(not self._can_look_ahead()), device=self.weights.device)
        return not collectives.largest(missing, torch.distributed.group.WORLD).item()

    def _can_look_ahead(self) -> bool:
        """Returns whether this rank's optimizer has moments, and will move at all."""
        rates = learning_rates(self.trainee.optimizer).values()
        moves = not rates or any(rate != 0.0 for rate in rates)
        return has_stepped(self.trainee.optimizer) and moves


def influence(probed: ProbedStep, estimator: str | None = None) -> Influence | None:
    """Returns the result of the package's own passes B to D, without taking the step.

    Args:
        probed: the step.
        estimator: estimator to use instead of the configured one.
    """
    step = probed.step
    assert step.meta_data is not None
    position, state = step.meta_data.consumed_samples, probed.state()
    _, found = step.influence.step(
        probed.quiet_step, probed.trainee, probed.batches, probed.weights, estimator
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
        `[len(samples)]` float64 on last-stage ranks, zeros elsewhere; NaN if the trainer skipped
        the step.
    """
    state = probed.state()
    up, down = (_changed(probed, samples, sign * delta, state) for sign in (1.0, -1.0))
    return (up - down) / (2.0 * delta)


def _changed(
    probed: ProbedStep, samples: list[int], delta: float, state: TrainerState
) -> torch.Tensor:
    """Returns the meta loss with each sample's weight changed in turn, float64."""
    losses = []
    for sample in samples:
        weights = probed.weights.clone()
        weights[sample] += delta
        losses.append(_meta_loss_after(probed, weights, state))
    return torch.tensor(losses, dtype=torch.float64)


def _meta_loss_after(probed: ProbedStep, weights: torch.Tensor, state: TrainerState) -> float:
    """Returns the meta loss after the step under `weights`, and undoes the step."""
    step, trainee = probed.step, probed.trainee
    assert step.meta_data is not None
    with gathered_parameters(trainee):
        result, _ = step.influence.weighted_step(probed.quiet_step, probed.batches, weights)
        with quiet(trainee):
            loss = step.passes.meta_loss(trainee, step.meta_data.consumed_samples)
        state.restore()
    return math.nan if result.skipped else loss


def reference(probed: ProbedStep) -> torch.Tensor:
    """Returns `c_i = <v, g_i>` `[N]` by per-sample backward passes, float64, on every rank.

    v is that of the configured lookahead and Jacobian. The position in the meta data is restored.
    """
    step, trainee = probed.step, probed.trainee
    assert step.meta_data is not None
    position, state = step.meta_data.consumed_samples, probed.state()
    lrs = learning_rates(trainee.optimizer)
    with gathered_parameters(trainee):
        exact = step.config.jacobian == "exact"
        inner = None
        if step.config.lookahead == "next":
            result, _ = step.influence.weighted_step(
                probed.quiet_step, probed.batches, probed.weights
            )
            inner = InnerStep.capture(trainee.optimizer, lrs, result.grad_norm) if exact else None
        with quiet(trainee):
            step.passes.meta_loss_gradient(trainee)
            if not exact:
                pull_back_identity(max(lrs.values(), default=0.0), trainee.model)
            elif inner is not None:
                inner.pull_back(trainee.model, step.shape.device)
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
                step.shape.device,
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
    restore_random_states(state.rng)
    local = None
    if step.sees_losses:
        local = step.passes.local_part(one_hot).view(get_num_microbatches(), -1)
    # A loss that no weight scales belongs to no sample.
    plain = not step.forward_step.weighs_further
    configs = configs_of(trainee.model)
    alone = without_further_losses(*configs) if plain else contextlib.nullcontext()
    with step.forward_step.weighted(local), alone:
        step.passes.run(trainee, probed.batches, get_num_microbatches(), forward_only=False)


# How much brute force changes a weight: little where Adam's first steps are curved, much where the
# parameters' rounding would hide the effect of a weight.
DELTA, DELTA_BF16 = 0.1, 1.0
FINER = 4.0  # factor by which the change is reduced if a magnitude seems wrong


def verify(probed: ProbedStep, count: int, delta: float | None = None) -> Verification | None:
    """Compares the package's meta-gradient with brute force on a few samples.

    The samples are those with the largest and the smallest estimate, half of each, because for the
    others the effect is lost first in the rounding of the meta loss.

    Args:
        probed: the step.
        count: number of samples, at most the batch.
        delta: change of a weight; None: chosen by the parameters' precision.

    Returns:
        The comparison, equal on every rank; None if the optimizer has no state to look ahead from
        yet, or the trainer skipped the step.
    """
    found = influence(probed)
    if found is None:
        return None
    count = min(count, probed.weights.numel())
    if count < 3:
        raise DWMError(
            f"the meta-gradient cannot be verified on a global batch of {count}: a correlation "
            "needs 3 samples or more (--global-batch-size, --dwm-verify-samples)"
        )
    low = probed.trainee.config.params_dtype == torch.bfloat16
    if delta is None:
        delta = DELTA_BF16 if low else DELTA
    step, device = probed.step, probed.weights.device
    chosen = torch.zeros(count, dtype=torch.int64, device=device)
    values = torch.zeros(4, count, dtype=torch.float64, device=device)
    if step.sees_losses:
        order = torch.argsort(found.values)
        chosen = torch.cat([order[: count // 2], order[len(order) - (count - count // 2) :]])
        values[0], values[1] = probed.weights[chosen], found.values[chosen]
    chosen = collectives.broadcast_from_last_stage(chosen.contiguous(), step.groups.pp)
    samples = [int(i) for i in chosen.tolist()]
    state = probed.state()
    exact = step.config.lookahead == "next" and step.config.jacobian == "exact"
    tolerance = (TOLERANCE_BF16 if low else TOLERANCE) if exact else None
    unchanged = _meta_loss_after(probed, probed.weights, state)

    def compared(delta: float) -> Verification:
        for row, by in ((2, delta), (3, -delta)):
            values[row] = ((_changed(probed, samples, by, state) - unchanged) / by).to(device)
        figures = collectives.broadcast_from_last_stage(values, step.groups.pp).cpu()
        weights, estimated, up, down = figures
        return compare(samples, weights, estimated, up, down, tolerance)

    result = compared(delta)
    refused = torch.tensor(float(result.wrong_magnitude), device=device)
    # Repeating is collective, so ranks must agree on it, though they may differ in the last bits.
    if collectives.largest(refused, torch.distributed.group.WORLD).item():
        result = result.repeated(compared(delta / FINER))
    return result
