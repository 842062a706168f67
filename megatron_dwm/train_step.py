"""The modified training step, passes A to E of the design, readable top to bottom.

    A  score      DWM forward over the step's micro-batches -> w                    (every step)
    B  inner      the trainer's own step on sum_i w_i l_i                           (every step)
    C  meta       LLM forward/backward on a meta batch at theta+ -> h -> v          (meta steps)
    D  influence  c_i = <v, g_i> at theta, for every sample                         (meta steps)
    E  update     DWM forward/backward with dL/ds from c, its optimizer's step      (meta steps)

Shapes: m micro-batches of b samples on this rank (n = m b), N samples in the global batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.tensor_parallel.random import _get_all_rng_states

from megatron_dwm.batches import StepBatches, tokens_of
from megatron_dwm.config import DWMConfig
from megatron_dwm.data.meta_dataset import MetaData
from megatron_dwm.guards import deterministic, gathered_parameters, quiet, restore_rng
from megatron_dwm.meta import collectives, finite_difference
from megatron_dwm.meta.optimizer_view import learning_rates
from megatron_dwm.meta.update import InnerStep, trainable_parameters
from megatron_dwm.schedule import Schedule, StepPlan
from megatron_dwm.weighting.loss import SampleLosses, WeightedForwardStep
from megatron_dwm.weighting.scorer import Scorer
from megatron_dwm.weighting.weights import (
    score_gradient,
    shuffled,
    weights_from_scores,
)


@dataclass
class RunShape:
    """The facts of the run that the passes need, read once by the integration.

    Attributes:
        micro_batch_size: b.
        seq_length: s.
        decoder_seq_length: handed on to the schedules.
        per_token: `--calculate-per-token-loss`.
        device: where tensors live.
    """

    micro_batch_size: int
    seq_length: int
    decoder_seq_length: int | None
    per_token: bool
    device: torch.device


@dataclass
class Trainee:
    """The LLM as the trainer hands it to `train_step`.

    Attributes:
        model: DDP-wrapped chunks.
        optimizer: Megatron's optimizer.
        config: the LLM's `TransformerConfig`.
        forward_backward: the trainer's pipeline schedule.
        data_iterator: the step's data iterator(s), for their form only.
    """

    model: list[Any]
    optimizer: Any
    config: Any
    forward_backward: Callable[..., Any]
    data_iterator: Any


@dataclass
class MetaResult:
    """What a meta step found: loss, influence `[N]`, gradient norm of the DWM, seconds."""

    loss: float
    influence: torch.Tensor
    grad_norm: float
    updated: bool
    seconds: float


@dataclass
class StepRecord:
    """What a step leaves for the log.

    Attributes:
        iteration: 1-based, as the trainer prints it.
        plan: what the step did.
        weights: `[N]` on last-stage ranks, None where no losses are seen.
        domains: `[N]` data set of the blend of each sample, on last-stage ranks; -1 unknown.
        meta: the meta step's results, if one was taken.
        lm_loss: what the trainer reports.
    """

    iteration: int
    plan: StepPlan
    weights: torch.Tensor | None
    domains: torch.Tensor | None
    meta: MetaResult | None
    lm_loss: float | None


class DWMTrainStep:
    """Runs training steps; holds everything of the DWM that lasts from step to step.

    Args:
        config: settings.
        schedule: which step does what.
        forward_step: the wrapped forward step that `pretrain` was given.
        groups: the LLM's process groups.
        shape: facts of the run.
        scorer: the weighting model; None for the uniform policy.
        meta_data: the meta set; None without meta steps.
        warm_start: copies the LLM's layers into the DWM (`--dwm-init llm:K`), or None.
        description: what must agree between this DWM and a saved one, for the checkpoint.
    """

    def __init__(
        self,
        config: DWMConfig,
        schedule: Schedule,
        forward_step: WeightedForwardStep,
        groups: Any,
        shape: RunShape,
        scorer: Scorer | None,
        meta_data: MetaData | None,
        warm_start: Callable[[], None] | None = None,
        description: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.schedule, self.forward_step = config, schedule, forward_step
        self.groups, self.shape = groups, shape
        self.scorer, self.meta_data, self.warm_start = scorer, meta_data, warm_start
        self.description = description or config.shape()
        self.sees_losses = groups.pp.rank() == groups.pp.size() - 1
        self.meta_steps_taken = 0
        self.warm_started = warm_start is None

    def __call__(
        self,
        stock_step: Callable[[Any], tuple],
        trainee: Trainee,
        iteration: int,
    ) -> tuple[tuple, StepRecord]:
        """Runs one training step.

        Args:
            stock_step: runs the trainer's own step on the data iterator it is given.
            trainee: the LLM.
            iteration: 0-based.

        Returns:
            The trainer's own result, and the record for the log.
        """
        plan = self.schedule.plan(iteration)
        num_microbatches = get_num_microbatches()
        if plan.meta_step and not self.warm_started and self.warm_start is not None:
            with gathered_parameters(trainee):
                self.warm_start()
            self.warm_started = True
        if self.scorer is None:
            return self._uniform_step(stock_step, trainee, plan, iteration, num_microbatches)

        batches = StepBatches(trainee.data_iterator, num_microbatches)

        # A: scores of this rank's samples [n], weights of the global batch [N]
        scores = weights = None
        if plan.weighted:
            local = self.scorer.scores(tokens_of(batches.first()), num_microbatches)
            if self.sees_losses:
                scores = collectives.gather_samples(local, self.groups.dp)
                weights = weights_from_scores(scores, self.config.temperature)
                if self.config.policy == "shuffled":
                    weights = shuffled(weights, self.config.seed, iteration)
        elif self.sees_losses:
            weights = self._ones(num_microbatches)

        # B: the trainer's own step, weighted
        with contextlib.ExitStack() as stack:
            before = None
            if plan.meta_step:
                stack.enter_context(gathered_parameters(trainee))
                before = _Before(trainee)
            local_weights = None
            if weights is not None:
                local_weights = self.local_part(weights).view(num_microbatches, -1)
            with self.forward_step.weighted(local_weights):
                result = stock_step(batches.replay(RerunDataIterator))
            skipped = bool(result[1])

            # C, D, E: one step of the DWM
            meta = None
            if before is not None and not skipped:
                meta = self._meta_step(trainee, batches, before, result[5], scores)
        domains = self._domains(batches) if self.sees_losses else None
        record = StepRecord(iteration + 1, plan, weights, domains, meta, _first_loss(result[0]))
        return result, record

    def _uniform_step(
        self,
        stock_step: Callable[[Any], tuple],
        trainee: Trainee,
        plan: StepPlan,
        iteration: int,
        num_microbatches: int,
    ) -> tuple[tuple, StepRecord]:
        """The uniform policy: w = 1 through the same weighted loss, and nothing else."""
        weights = self._ones(num_microbatches) if self.sees_losses else None
        local = None if weights is None else self.local_part(weights).view(num_microbatches, -1)
        with self.forward_step.weighted(local):
            result = stock_step(trainee.data_iterator)
        record = StepRecord(iteration + 1, plan, weights, None, None, _first_loss(result[0]))
        return result, record

    # ------------------------------------------------------------------ passes C, D, E

    def _meta_step(
        self,
        trainee: Trainee,
        batches: StepBatches,
        before: _Before,
        grad_norm: float | None,
        scores: torch.Tensor | None,
    ) -> MetaResult:
        start = time.perf_counter()
        inner = InnerStep.capture(trainee.optimizer, before.lrs, grad_norm)
        after = [p.detach().clone() for p in before.parameters]
        with quiet(trainee):
            loss = self.meta_gradient(trainee)
            inner.pull_back(trainee.model)
            influence = self._influence(trainee, batches, before)
        for parameter, value in zip(before.parameters, after, strict=True):
            parameter.data.copy_(value)
        # In units of the learning rate, so that the DWM's gradient does not follow its decay.
        influence = influence / max(max(before.lrs.values(), default=0.0), 1e-30)
        updated, norm = False, 0.0
        if self._is_finite(influence):
            updated, norm = self._update(batches, influence, scores)
        self.meta_steps_taken += 1
        return MetaResult(loss, influence, norm, updated, time.perf_counter() - start)

    def meta_gradient(self, trainee: Trainee) -> float:
        """Pass C: leaves h = dL_meta/dtheta in the gradient buffers.

        Returns:
            The meta loss per token on last-stage ranks (0 elsewhere).
        """
        assert self.meta_data is not None
        for chunk in trainee.model:
            chunk.zero_grad_buffer()
        trainee.optimizer.zero_grad()
        meta_batches = StepBatches.like(trainee.data_iterator, self.meta_data.next_batches())
        with deterministic(trainee), self.forward_step.measured() as losses:
            self.run_passes(
                trainee, meta_batches, self.meta_data.num_microbatches, forward_only=False
            )
        return self._mean_loss(losses)

    @torch.no_grad()
    def meta_loss(self, trainee: Trainee, position: int) -> float:
        """Returns the meta loss per token of the meta batch at `position`, without gradients."""
        assert self.meta_data is not None
        meta_batches = StepBatches.like(trainee.data_iterator, self.meta_data.batches_at(position))
        with deterministic(trainee), self.forward_step.measured() as losses:
            self.run_passes(
                trainee, meta_batches, self.meta_data.num_microbatches, forward_only=True
            )
        return self._mean_loss(losses)

    def _influence(self, trainee: Trainee, batches: StepBatches, before: _Before) -> torch.Tensor:
        """Pass D: c_i of the global batch, `[N]`; zeros on ranks that see no losses."""
        num_microbatches = get_num_microbatches()

        def measure() -> torch.Tensor | None:
            # The same dropout masks in both passes as in the step itself.
            restore_rng(before.rng)
            with self.forward_step.measured() as losses:
                self.run_passes(trainee, batches, num_microbatches, forward_only=True)
            return self.contributions(losses) if self.sees_losses else None

        rng_after = _get_all_rng_states()
        relative_step = self.config.fd_relative_step
        if relative_step is None:
            relative_step = 5e-3 if trainee.config.params_dtype == torch.bfloat16 else 3e-4
        local = finite_difference.estimate(
            before.parameters, before.theta, measure, relative_step, torch.distributed.group.WORLD
        )
        restore_rng(rng_after)
        if local is None:
            return torch.zeros(1, device=self.shape.device)
        return collectives.gather_samples(local, self.groups.dp)

    def _is_finite(self, influence: torch.Tensor) -> bool:
        """Returns, on every rank alike, whether the DWM may step on this influence."""
        finite = torch.isfinite(influence).all().float().view(1)
        return bool(collectives.broadcast_from_last_stage(finite, self.groups.pp).item())

    def _update(
        self, batches: StepBatches, influence: torch.Tensor, scores: torch.Tensor | None
    ) -> tuple[bool, float]:
        """Pass E: the DWM's own step."""
        assert self.scorer is not None
        num_microbatches = get_num_microbatches()
        local = torch.zeros(num_microbatches * self.shape.micro_batch_size)
        local = local.to(self.shape.device)
        if scores is not None:
            gradient = score_gradient(scores, influence, self.config.temperature)
            local = self.local_part(gradient)
        return self.scorer.update(tokens_of(batches.first()), num_microbatches, local)

    # ------------------------------------------------------------------ helpers

    def contributions(self, losses: SampleLosses) -> torch.Tensor:
        """Returns each local sample's share of the loss that the trainer differentiates, `[n]`."""
        parts = losses.contributions(
            self.shape.per_token, self.groups.dp_cp.size(), self.groups.cp.size()
        )
        if not self.shape.per_token:
            return parts
        tokens = torch.stack([t.double() for t in losses.num_tokens if t is not None]).sum()
        total = collectives.sum_over_data_parallel(tokens, self.groups.dp_cp)
        return parts / total.clamp(min=1)

    def _mean_loss(self, losses: SampleLosses) -> float:
        """Returns the loss per token over all data-parallel ranks; 0 where none are seen."""
        if not self.sees_losses:
            return 0.0
        count = len(losses.sums)
        total = torch.cat(losses.sums).double().sum()
        tokens = torch.tensor(float(count), dtype=torch.float64, device=total.device)
        if losses.num_tokens[0] is not None:
            tokens = torch.stack([t.double() for t in losses.num_tokens if t is not None]).sum()
        sums = collectives.sum_over_data_parallel(torch.stack([total, tokens]), self.groups.dp_cp)
        return (sums[0] / sums[1].clamp(min=1)).item()

    def run_passes(
        self, trainee: Trainee, batches: StepBatches, num_microbatches: int, forward_only: bool
    ) -> None:
        """Runs the LLM's schedule over micro-batches; whoever calls says how losses count."""
        trainee.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=batches.replay(),
            model=trainee.model,
            num_microbatches=num_microbatches,
            seq_length=self.shape.seq_length,
            micro_batch_size=self.shape.micro_batch_size,
            decoder_seq_length=self.shape.decoder_seq_length,
            forward_only=forward_only,
        )

    def _ones(self, num_microbatches: int) -> torch.Tensor:
        count = num_microbatches * self.shape.micro_batch_size * self.groups.dp.size()
        return torch.ones(count, device=self.shape.device)

    def local_part(self, values: torch.Tensor) -> torch.Tensor:
        """Returns this data-parallel rank's part `[n]` of a global `[N]`."""
        return values.chunk(self.groups.dp.size())[self.groups.dp.rank()]

    def _domains(self, batches: StepBatches) -> torch.Tensor:
        """Returns the blend's data set of every sample, `[N]`; -1 where the loader names none."""
        num_microbatches = get_num_microbatches()
        local = torch.full((num_microbatches * self.shape.micro_batch_size,), -1)
        chunk = batches.last()
        if chunk is not None and isinstance(chunk[0], dict) and "dataset_id" in chunk[0]:
            local = torch.cat([batch["dataset_id"].view(-1).long().cpu() for batch in chunk])
        local = local.to(self.shape.device)
        if self.groups.tp.size() > 1:
            local = collectives.broadcast_from_first_tensor_rank(
                local, tuple(local.shape), self.groups.tp, self.shape.device
            )
        return collectives.gather_samples(local, self.groups.dp)


class _Before:
    """The state before the trainer's step that the meta step needs afterwards."""

    def __init__(self, trainee: Trainee) -> None:
        self.parameters = trainable_parameters(trainee.model)
        self.theta = [p.detach().clone() for p in self.parameters]
        self.lrs = learning_rates(trainee.optimizer)
        self.rng = _get_all_rng_states()


def _first_loss(losses: dict[str, torch.Tensor]) -> float | None:
    """Returns the first loss that the trainer reports, None where it reports none."""
    for value in losses.values():
        return float(value)
    return None
