"""The modified training step, passes A to E of the design, readable top to bottom.

    A  score      DWM forward over the step's micro-batches -> w                    (every step)
    B  inner      the trainer's own step on sum_i w_i l_i                           (every step)
    C  meta       LLM forward/backward on a meta batch -> h -> v                    (meta steps)
    D  influence  c_i = <v, g_i>, for every sample                                  (meta steps)
    E  update     DWM forward/backward with dL/ds from c, its optimizer's step      (meta steps)

Passes B to D on a meta step are in `influence.py`, in the order that `--dwm-lookahead` asks for.

Shapes: m micro-batches of b samples on this rank (n = m b), N samples in the global batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_dwm.bad_steps import BadSteps, agreed
from megatron_dwm.batches import StepBatches, tokens_of
from megatron_dwm.budget import NoMeter, Overhead, OverheadBudget, StepMeter
from megatron_dwm.config import DWMConfig
from megatron_dwm.guards import gathered_parameters
from megatron_dwm.influence import Influence, MetaGradient, StockStep
from megatron_dwm.meta import collectives
from megatron_dwm.passes import Passes, Trainee
from megatron_dwm.schedule import Schedule, StepPlan
from megatron_dwm.weighting.guarding import Guards
from megatron_dwm.weighting.scorer import Scorer
from megatron_dwm.weighting.weights import (
    BatchWeights,
    batch_weights,
    score_gradient,
    shuffled,
    uniform_where,
)


@dataclass
class MetaResult:
    """What a meta step found.

    Attributes:
        loss: the meta loss per token.
        influence: `[N]`, in units of the LLM's learning rate.
        grad_norm: of the DWM, before clipping; NaN where it was not stepped.
        updated: whether the DWM was stepped.
        seconds: what the step took beyond scoring: passes B to E.
        quality: what the estimator said of itself.
    """

    loss: float
    influence: torch.Tensor
    grad_norm: float
    updated: bool
    seconds: float
    quality: dict[str, float] = field(default_factory=dict)


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
        overhead: the DWM's share of the time, where it has a budget.
        batch: what the guards of the weights did, on last-stage ranks, where samples were scored.
        causes: what was NaN or infinite, see `bad_steps`; the same on every rank.
        bad_steps: the run's bad steps by cause, this one among them.
    """

    iteration: int
    plan: StepPlan
    weights: torch.Tensor | None
    domains: torch.Tensor | None
    meta: MetaResult | None
    lm_loss: float | None
    overhead: Overhead | None = None
    batch: BatchWeights | None = None
    causes: list[str] = field(default_factory=list)
    bad_steps: dict[str, int] = field(default_factory=dict)


class DWMTrainStep:
    """Runs training steps; holds everything of the DWM that lasts from step to step.

    Args:
        config: settings.
        schedule: which step does what.
        passes: the LLM's extra passes; holds the wrapped forward step and the meta set.
        scorer: the weighting model; None for the uniform policy.
        warm_start: copies the LLM's layers into the DWM (`--dwm-init llm:K`), or None.
        description: what must agree between this DWM and a saved one, for the checkpoint.
    """

    def __init__(
        self,
        config: DWMConfig,
        schedule: Schedule,
        passes: Passes,
        scorer: Scorer | None,
        warm_start: Callable[[], None] | None = None,
        description: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.schedule, self.passes = config, schedule, passes
        self.forward_step, self.groups = passes.forward_step, passes.groups
        self.shape, self.meta_data = passes.shape, passes.meta_data
        self.sees_losses = passes.sees_losses
        self.scorer, self.warm_start = scorer, warm_start
        self.description = description or config.shape()
        self.meta_gradient = MetaGradient(config, passes)
        self.budget = OverheadBudget.from_config(config)
        self.guards, self.bad_steps = Guards.from_config(config), BadSteps(config.max_bad_steps)
        self.meta_steps_taken = 0
        self.warm_started = warm_start is None

    def __call__(
        self, stock_step: StockStep, trainee: Trainee, iteration: int
    ) -> tuple[tuple, StepRecord]:
        """Runs one training step.

        Args:
            stock_step: runs the trainer's own step on the data iterator it is given.
            trainee: the LLM.
            iteration: 0-based.

        Returns:
            The trainer's own result, and the record for the log.
        """
        # Spaces and times meta steps under --dwm-overhead-budget; else it does nothing.
        meter = NoMeter() if self.budget is None else StepMeter(self.budget, self.shape.device)
        plan = meter.admitted(self.schedule.plan(iteration))
        num_microbatches = get_num_microbatches()
        if plan.meta_step and not self.warm_started and self.warm_start is not None:
            with gathered_parameters(trainee):
                self.warm_start()
            self.warm_started = True
        if self.scorer is None:
            return self._uniform_step(stock_step, trainee, plan, iteration, num_microbatches)

        batches = meter.own(StepBatches)(trainee.data_iterator, num_microbatches)
        stock_step = meter.own(stock_step)

        # A: scores [N] and weights [N] of the global batch
        batch = self.weigh(batches, iteration) if plan.weighted else None
        weights = None if batch is None else batch.weights
        if not plan.weighted and self.sees_losses:
            weights = self._ones(num_microbatches)

        # B: the trainer's own step, weighted; on meta steps C and D: each sample's influence
        meta: MetaResult | None = None
        influence: Influence | None = None
        causes: list[str] = []
        start = time.perf_counter()
        if plan.meta_step:
            result, influence = self.meta_gradient.step(stock_step, trainee, batches, weights)
        else:
            result, _ = self.meta_gradient.weighted_step(stock_step, batches, weights)
        loss = _first_loss(result[0])

        # E: one step of the DWM, unless something is NaN or infinite
        if influence is not None:
            meta, causes = self._update(batches, influence, batch, loss)
            meta.seconds = time.perf_counter() - start
        elif plan.weighted:
            causes = agreed({"scores": batch is not None and batch.bad}, self.shape.device)
        if "scores" in causes:
            causes += agreed({"parameters": self.scorer.bad_parameters()}, self.shape.device)
        tried = meta is not None and (meta.updated or bool(causes))
        self.bad_steps.note(causes, plan.weighted, tried)

        domains = self._domains(batches) if self.sees_losses else None
        overhead = meter.finish(meta is not None)
        record = StepRecord(iteration + 1, plan, weights, domains, meta, loss, overhead)
        record.batch, record.causes = batch, causes
        record.bad_steps = self.bad_steps.summary()
        return result, record

    def score(
        self, batches: StepBatches, iteration: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Pass A: scores and weights `[N]` of the global batch, None on ranks without losses."""
        batch = self.weigh(batches, iteration)
        return (None, None) if batch is None else (batch.scores, batch.weights)

    def weigh(self, batches: StepBatches, iteration: int) -> BatchWeights | None:
        """Pass A: the weights of the global batch, None on ranks that see no losses.

        Bad scores give weights of 1, on every last-stage rank alike.
        """
        assert self.scorer is not None
        local = self.scorer.scores(tokens_of(batches.first()), get_num_microbatches())
        if not self.sees_losses:
            return None
        scores = collectives.gather_samples(local, self.groups.dp)
        batch = batch_weights(scores, self.config.temperature, self.guards)
        if self.groups.tp.size() > 1:
            # Data-parallel peers have seen all scores; a tensor-parallel peer has its own.
            batch.bad = collectives.largest(batch.bad.int(), self.groups.tp).bool()
            batch.weights = uniform_where(batch.bad, batch.weights)
        if self.config.policy == "shuffled":
            batch.weights = shuffled(batch.weights, self.config.seed, iteration)
        return batch

    def _update(
        self,
        batches: StepBatches,
        influence: Influence,
        batch: BatchWeights | None,
        loss: float | None,
    ) -> tuple[MetaResult, list[str]]:
        """Pass E: the DWM's own step, and what was NaN or infinite and kept it from being taken."""
        assert self.scorer is not None
        self.meta_steps_taken += 1
        lr = torch.tensor(influence.lr, dtype=torch.float64, device=self.shape.device)
        # A rank may hold none of the optimizer's groups.
        lr = collectives.largest(lr, torch.distributed.group.WORLD).item()
        # In units of the learning rate, so that the DWM's gradient does not follow its decay.
        values = influence.values / max(lr, 1e-30)
        result = MetaResult(influence.meta_loss, values, math.nan, False, 0.0, influence.quality)
        finite = torch.isfinite(influence.values).all()
        causes = agreed(
            {
                "loss": loss is not None and not math.isfinite(loss),
                "scores": batch is not None and batch.bad,
                "meta_gradient": ~finite | (not math.isfinite(influence.meta_loss)),
            },
            self.shape.device,
        )
        # At a learning rate of 0, as at the start of a warm-up, there is no influence.
        if causes or lr <= 0.0:
            return result, causes
        num_microbatches = get_num_microbatches()
        local = torch.zeros(num_microbatches * self.shape.micro_batch_size)
        local = local.to(self.shape.device)
        if batch is not None:
            gradient = score_gradient(batch.scores, values, self.config.temperature, self.guards)
            local = self.passes.local_part(gradient)
        update = self.scorer.update(tokens_of(batches.first()), num_microbatches, local)
        result.updated, result.grad_norm = update.updated, update.grad_norm
        return result, update.causes

    def _uniform_step(
        self,
        stock_step: StockStep,
        trainee: Trainee,
        plan: StepPlan,
        iteration: int,
        num_microbatches: int,
    ) -> tuple[tuple, StepRecord]:
        """The uniform policy: w = 1 through the same weighted loss, and nothing else."""
        weights = self._ones(num_microbatches) if self.sees_losses else None
        local = None
        if weights is not None:
            local = self.passes.local_part(weights).view(num_microbatches, -1)
        with self.forward_step.weighted(local):
            result = stock_step(trainee.data_iterator)
        record = StepRecord(iteration + 1, plan, weights, None, None, _first_loss(result[0]))
        return result, record

    def _ones(self, num_microbatches: int) -> torch.Tensor:
        count = num_microbatches * self.shape.micro_batch_size * self.groups.dp.size()
        return torch.ones(count, device=self.shape.device)

    def _domains(self, batches: StepBatches) -> torch.Tensor:
        """Returns the domain of every sample, `[N]`; -1 where the loader names none.

        The one that its documents are of (`WeightedGPTDataset`), else the blend's data set.
        """
        num_microbatches = get_num_microbatches()
        local = torch.full((num_microbatches * self.shape.micro_batch_size,), -1)
        chunk = batches.last()
        if chunk is not None and isinstance(chunk[0], dict):
            name = "domain_id" if "domain_id" in chunk[0] else "dataset_id"
            if name in chunk[0]:
                local = torch.cat([batch[name].view(-1).long().cpu() for batch in chunk])
        local = local.to(self.shape.device)
        if self.groups.tp.size() > 1:
            local = collectives.broadcast_from_first_tensor_rank(
                local, tuple(local.shape), self.groups.tp, self.shape.device
            )
        return collectives.gather_samples(local, self.groups.dp)


def _first_loss(losses: dict[str, torch.Tensor]) -> float | None:
    """Returns the first loss that the trainer reports, None where it reports none."""
    for value in losses.values():
        return float(value)
    return None
