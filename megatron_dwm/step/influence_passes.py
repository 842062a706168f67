"""Passes B to D: the trainer's step, and how each sample's weight in it changes the meta loss.

Two orders of the same passes (`--dwm-lookahead`):

    next     B inner step, C meta gradient h at theta+, v = (dU/dG)^T h, D c_i = <v, g_i> at theta
    current  C meta gradient h at theta, v with the expected Jacobian, B inner step, which is also D

"next" is the exact derivative of the meta loss after the step. "current" saves pass D: it takes the
meta loss's derivative at theta, and Adam's preconditioner from before the step.

Shapes: n samples on this data-parallel rank, N in the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_dwm.config import DWMConfig
from megatron_dwm.core import collectives
from megatron_dwm.core.batches import StepBatches
from megatron_dwm.core.contexts import gathered_parameters, quiet
from megatron_dwm.core.optimizers import learning_rates
from megatron_dwm.core.random_states import random_states, restore_random_states
from megatron_dwm.core.stopwatch import PassTimes
from megatron_dwm.core.trainee import StepOutcome, Trainee, loss_scale
from megatron_dwm.meta_gradient import finite_difference
from megatron_dwm.meta_gradient.ghost import recording as ghost
from megatron_dwm.meta_gradient.optimizers import derivatives as jacobian
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import has_stepped
from megatron_dwm.meta_gradient.pull_back import (
    InnerStep,
    pull_back_before_step,
    pull_back_identity,
    trainable_parameters,
)
from megatron_dwm.step.loss import Applied, PolicyWeights
from megatron_dwm.step.passes import Passes

# Weights `[N]`, or what computes them inside the forward step, or None on ranks without losses.
type Weighing = torch.Tensor | PolicyWeights | None
# Runs the trainer's own step on the data iterator it is given.
StockStep = Callable[[Any], StepOutcome]


@dataclass
class Influence:
    """The results of passes C and D.

    Attributes:
        values: `[N]` float32, `c_i = dL_meta/dw_i`, on last-stage ranks; zeros elsewhere.
        meta_loss: per token, on last-stage ranks.
        lr: the inner step's largest learning rate.
        quality: the estimator's own quality measures, for the log.
    """

    values: torch.Tensor
    meta_loss: float
    lr: float
    quality: dict[str, float] = field(default_factory=dict)


class InfluencePasses:
    """Takes the trainer's step and computes every sample's influence on the meta loss.

    Args:
        config: settings; `estimator` is resolved (not `auto`).
        passes: the LLM's extra passes.
    """

    def __init__(self, config: DWMConfig, passes: Passes) -> None:
        self.config, self.passes = config, passes
        self._ghost: ghost.Ghost | None = None
        self._has_stepped = False
        self.applied = Applied()
        self.times = PassTimes(passes.shape.device)

    def step(
        self,
        stock_step: StockStep,
        trainee: Trainee,
        batches: StepBatches,
        weights: Weighing,
        estimator: str | None = None,
    ) -> tuple[StepOutcome, Influence | None]:
        """Takes one weighted step of the trainer with passes C and D.

        `times` holds the time of each pass: `meta_gradient` (C), `inner` (B, and with `current` D)
        and `influence` (D).

        Args:
            stock_step: runs the trainer's own step on the data iterator it is given.
            trainee: the LLM.
            batches: the step's micro-batches.
            weights: `[N]` weights or what computes them, None on ranks that see no losses.
            estimator: estimator to use instead of the configured one.

        Returns:
            The outcome of the trainer's step; the influence, None if the trainer skipped the step
            or if the optimizer has no state to look ahead from yet.
        """
        with gathered_parameters(trainee):
            if self.config.lookahead == "current":
                return self._current(stock_step, trainee, batches, weights)
            name = estimator or self.config.estimator
            return self._next(stock_step, trainee, batches, weights, name)

    def weighted_step(
        self, stock_step: StockStep, batches: StepBatches, weights: Weighing
    ) -> tuple[StepOutcome, Applied]:
        """Pass B: the trainer's own step under weights `[N]`, or under a policy's.

        Returns:
            Its outcome, and what was applied to each micro-batch.
        """
        local: Weighing = None
        if weights is not None and self.passes.sees_losses:
            local = weights
            if isinstance(weights, torch.Tensor):
                local = self.passes.local_part(weights).view(get_num_microbatches(), -1)
        with self.passes.forward_step.weighted(local, get_num_microbatches()) as self.applied:
            result = stock_step(batches.replay(RerunDataIterator))
        return result, self.applied

    # ------------------------------------------------------------------ lookahead: next

    def _next(
        self,
        stock_step: StockStep,
        trainee: Trainee,
        batches: StepBatches,
        weights: Weighing,
        estimator: str,
    ) -> tuple[StepOutcome, Influence | None]:
        parameters = trainable_parameters(trainee.model)
        # Kept: a copy of the parameters: theta now, theta+ while pass D runs at theta.
        theta = [p.detach().clone() for p in parameters]
        lrs, rng = learning_rates(trainee.optimizer), random_states()
        # B
        with self.times("inner"):
            result, _ = self.weighted_step(stock_step, batches, weights)
        if result.skipped:
            return result, None
        # C: h at theta+, pulled back to the step's gradient
        inner = None
        if self.config.jacobian == "exact":
            # Kept: the step's gradient, until v is computed.
            inner = InnerStep.capture(trainee.optimizer, lrs, result.grad_norm)
        with quiet(trainee):
            with self.times("meta_gradient"):
                loss = self.passes.meta_loss_gradient(trainee)
                if inner is not None:
                    inner.pull_back(trainee.model, self.passes.shape.device)
                else:
                    pull_back_identity(max(lrs.values(), default=0.0), trainee.model)
            # D: <v, g_i> at theta, with the step's own dropout masks
            rng_after = random_states()
            with self.times("influence"):
                if estimator == "ghost":
                    local, quality = self._by_ghost(trainee, batches, parameters, theta, rng)
                else:
                    local, quality = self._by_difference(trainee, batches, parameters, theta, rng)
            restore_random_states(rng_after)
        return result, self._influence(local, loss, lrs, quality)

    def _by_ghost(
        self,
        trainee: Trainee,
        batches: StepBatches,
        parameters: list[torch.nn.Parameter],
        theta: list[torch.Tensor],
        rng: tuple,
    ) -> tuple[torch.Tensor | None, dict[str, float]]:
        _swap(parameters, theta)
        restore_random_states(rng)
        local = self._ghost_pass(trainee, batches)
        _swap(parameters, theta)
        return local, {}

    def _by_difference(
        self,
        trainee: Trainee,
        batches: StepBatches,
        parameters: list[torch.nn.Parameter],
        theta: list[torch.Tensor],
        rng: tuple,
    ) -> tuple[torch.Tensor | None, dict[str, float]]:
        def measure() -> torch.Tensor | None:
            restore_random_states(rng)
            with self.passes.forward_step.measured() as losses:
                self.passes.run(trainee, batches, get_num_microbatches(), True)
            return self.passes.contributions(losses) if self.passes.sees_losses else None

        # The parameters are overwritten, and theta is needed for every perturbation.
        after = [p.detach().clone() for p in parameters]
        found = finite_difference.estimate(
            parameters,
            theta,
            measure,
            torch.distributed.group.WORLD,
            self.passes.shape.device,
            trainee.config.params_dtype,
            self.config.fd_relative_step,
            self._linearity_is_due(),
        )
        with torch.no_grad():
            for parameter, value in zip(parameters, after, strict=True):
                parameter.data.copy_(value)
        return found.values, found.quality

    def _linearity_is_due(self) -> bool:
        """Whether this meta step, by its number in the whole run, checks linearity.

        Counted by the meta batches read, which a checkpoint keeps, so that a resumed run logs the
        same as an uninterrupted one.
        """
        assert self.passes.meta_data is not None
        data = self.passes.meta_data
        number = data.consumed_samples // data.batch_size - 1  # pass C has read this step's
        return number % finite_difference.LINEARITY_INTERVAL == 0

    # ------------------------------------------------------------------ lookahead: current

    def _current(
        self,
        stock_step: StockStep,
        trainee: Trainee,
        batches: StepBatches,
        weights: Weighing,
    ) -> tuple[StepOutcome, Influence | None]:
        lrs, rng = learning_rates(trainee.optimizer), random_states()
        if self.config.jacobian == "exact" and not self._optimizer_has_stepped(trainee):
            return self.weighted_step(stock_step, batches, weights)[0], None
        # C: h at theta, and v with the Jacobian that the step is expected to have
        with quiet(trainee), self.times("meta_gradient"):
            loss = self._direction_ahead(trainee, lrs)
            # Kept: v, because the step needs the gradient buffers for its own gradient.
            v = {id(p): p.main_grad.clone() for p in trainable_parameters(trainee.model)}
        restore_random_states(rng)
        # B and D in one
        layers = self.ghost(trainee)

        def direction(parameter: torch.nn.Parameter) -> torch.Tensor | None:
            return v.get(id(parameter))

        watch = self.times("inner")
        with watch, layers.recording(direction, get_num_microbatches()) as total:
            result, applied = self.weighted_step(stock_step, batches, weights)
            recorded = total()
        if result.skipped:
            return result, None
        recorded = collectives.sum_over_model_parallel(recorded, self.passes.groups.mp)
        local, w = self._scaled(recorded, applied.num_tokens, loss_scale(trainee)), applied.weights
        if local is not None and w is not None:
            # The pass was weighted, so sample i has the factor w_i; one of weight 0 was not seen.
            local = torch.where(w > 0, local / w.clamp(min=1e-30), 0.0)
            if self.config.jacobian == "exact":
                max_norm = _clip_grad(trainee.optimizer)
                local = local * jacobian.clip_coefficient(float(result.grad_norm or 0.0), max_norm)
        return result, self._influence(local, loss, lrs, {})

    def ahead(self, trainee: Trainee, batches: StepBatches) -> Influence | None:
        """Returns the influence of the step's samples ahead of the step, by separate passes.

        Uses the Jacobian that the step is expected to have, as in `current`, at weights of 1.
        """
        if self.config.jacobian == "exact" and not self._optimizer_has_stepped(trainee):
            return None
        lrs, rng = learning_rates(trainee.optimizer), random_states()
        with gathered_parameters(trainee), quiet(trainee):
            loss = self._direction_ahead(trainee, lrs)
            restore_random_states(rng)
            local = self._ghost_pass(trainee, batches)
        restore_random_states(rng)
        return self._influence(local, loss, lrs, {})

    def _direction_ahead(self, trainee: Trainee, lrs: dict[int, float]) -> float:
        """Leaves v before the step in the gradient buffers; returns the meta loss."""
        loss = self.passes.meta_loss_gradient(trainee)
        if self.config.jacobian == "exact":
            pull_back_before_step(trainee.optimizer, lrs, trainee.model)
        else:
            pull_back_identity(max(lrs.values(), default=0.0), trainee.model)
        return loss

    # ------------------------------------------------------------------ helpers

    def _ghost_pass(self, trainee: Trainee, batches: StepBatches) -> torch.Tensor | None:
        """Returns `<v, g_i>` `[n]` of the local samples at weights of 1, by a separate pass.

        Uses the current parameters and random states, with the gradient buffers holding v.

        Returns:
            The inner products, None on ranks that see no losses.
        """
        count = get_num_microbatches()
        with self.passes.forward_step.counted() as num_tokens:
            local = ghost.estimate(
                self.ghost(trainee),
                _main_grad,
                count,
                trainee.model,
                lambda: self.passes.run(trainee, batches, count, False),
                self.passes.forward_step.weighs_further,
            )
        return self._scaled(local, num_tokens, loss_scale(trainee))

    def ghost(self, trainee: Trainee) -> ghost.Ghost:
        """Returns the LLM's layers with their ghost rules; looked up once."""
        if self._ghost is None:
            shape = self.passes.shape
            self._ghost = ghost.Ghost(
                trainee.model,
                trainee.config,
                self.passes.groups,
                shape.micro_batch_size,
                shape.device,
            )
        return self._ghost

    def _optimizer_has_stepped(self, trainee: Trainee) -> bool:
        """Returns, the same on every rank, whether the optimizer has moments yet."""
        if not self._has_stepped:
            missing = torch.tensor(float(not has_stepped(trainee.optimizer)))
            missing = missing.to(self.passes.shape.device)
            world = torch.distributed.group.WORLD
            self._has_stepped = not bool(collectives.largest(missing, world).item())
        return self._has_stepped

    def _scaled(
        self, local: torch.Tensor, num_tokens: list[torch.Tensor | None], scale: float
    ) -> torch.Tensor | None:
        """Scales from the schedule's loss to the trainer's; None on ranks that see no losses.

        Args:
            local: `[n]` inner products with gradients of the schedule's loss.
            num_tokens: token count of each micro-batch.
            scale: `--loss-scale`, which those gradients include.
        """
        if not self.passes.sees_losses:
            return None
        return (local * (self.passes.gradient_scale(num_tokens) / scale)).float()

    def _influence(
        self,
        local: torch.Tensor | None,
        loss: float,
        lrs: dict[int, float],
        quality: dict[str, float],
    ) -> Influence:
        if local is None:
            values = torch.zeros(1, device=self.passes.shape.device)
        else:
            values = collectives.gather_samples(local, self.passes.groups.dp)
        return Influence(values, loss, max(lrs.values(), default=0.0), quality)


def _main_grad(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    direction = getattr(parameter, "main_grad", None)
    return None if direction is None else direction.view_as(parameter)


def _clip_grad(optimizer: Any) -> float:
    first = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    return float(first.config.clip_grad)


@torch.no_grad()
def _swap(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    """Swaps the parameters with a copy in place, using extra memory for one parameter only."""
    for parameter, value in zip(parameters, values, strict=True):
        kept = parameter.detach().clone()
        parameter.data.copy_(value)
        value.copy_(kept)
