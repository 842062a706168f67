"""The modified training step, passes A to E of the design, readable top to bottom.

    A  score      a policy that needs the whole batch first weighs it        (every step)
    B  inner      the trainer's own step on sum_i w_i l_i; other policies
                  weigh each micro-batch here, in its own forward step       (every step)
    C  meta       LLM forward/backward on a meta batch -> h -> v             (meta steps)
    D  influence  c_i = <v, g_i>, for every sample                           (meta steps)
    E  update     the policy learns from c                                   (meta steps)

Passes B to D of a meta step are in `influence_passes.py`, in the order that `--dwm-lookahead` sets.

Shapes: m micro-batches of b samples on this rank (n = m b), N samples in the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_dwm.config import DWMConfig, flag
from megatron_dwm.core import collectives
from megatron_dwm.core.agreement import agreed
from megatron_dwm.core.batches import StepBatches, document_field
from megatron_dwm.core.contexts import gathered_parameters, quiet
from megatron_dwm.core.expert_load import ExpertLoad
from megatron_dwm.core.random_states import random_states, restore_random_states
from megatron_dwm.core.state_tap import StateTap
from megatron_dwm.core.trainee import Trainee
from megatron_dwm.errors import DWMError
from megatron_dwm.policies.base import SampleView, StepView, WeightPolicy
from megatron_dwm.step.bad_steps import BadSteps
from megatron_dwm.step.budget import NoMeter, Overhead, OverheadBudget, StepMeter, now
from megatron_dwm.step.collector import Collector
from megatron_dwm.step.influence_passes import Influence, InfluencePasses, StockStep, Weighing
from megatron_dwm.step.loss import PolicyWeights
from megatron_dwm.step.passes import Passes
from megatron_dwm.step.plan import Schedule, StepPlan
from megatron_dwm.step.record import MetaResult, StepRecord
from megatron_dwm.step.time_share import TimeShare

# Steps between two checks of the scores of a policy that takes no meta steps.
_LOOK_INTERVAL = 50
# Opening of the gate from which on weights are recorded as the policy's view of the documents.
_OPEN = 0.5


class DWMTrainStep:
    """Runs training steps; holds all state of the weighting that lasts from step to step.

    Args:
        config: settings.
        schedule: which step does what.
        passes: the LLM's extra passes; holds the wrapped forward step and the meta set.
        policy: weights the samples.
        tap: reads the LLM's final hidden states, if the policy needs them.
        warm_start: copies the LLM's layers into the weighting model (`--dwm-init llm:K`), or None.
        expert_load: counts which experts the domains use, on ranks that see losses, or None.
    """

    def __init__(
        self,
        config: DWMConfig,
        schedule: Schedule,
        passes: Passes,
        policy: WeightPolicy,
        tap: StateTap | None = None,
        warm_start: Callable[[], None] | None = None,
        expert_load: ExpertLoad | None = None,
    ) -> None:
        self.config, self.schedule, self.passes = config, schedule, passes
        self.forward_step, self.groups = passes.forward_step, passes.groups
        self.shape, self.meta_data = passes.shape, passes.meta_data
        self.sees_losses = passes.sees_losses
        self.policy, self.tap, self.warm_start = policy, tap, warm_start
        self.expert_load = expert_load
        self.forward_step.keeps_losses = config.log_samples
        self.influence = InfluencePasses(config, passes)
        self.budget = OverheadBudget.from_config(config)
        self.bad_steps = BadSteps(config.max_bad_steps)
        self.time_share = TimeShare()
        # Set if document weights are recorded, on ranks that see losses and read data.
        self.collector: Collector | None = None
        self.meta_steps_taken = 0
        self.warm_started = warm_start is None

    @property
    def scorer(self) -> Any:
        """The separate weighting model, if the policy has one."""
        return self.policy.scorer

    def __call__(
        self, stock_step: StockStep, trainee: Trainee, iteration: int
    ) -> tuple[Any, StepRecord]:
        """Runs one training step.

        Args:
            stock_step: runs the trainer's own step on the data iterator it is given.
            trainee: the LLM.
            iteration: 0-based.

        Returns:
            What the trainer's own step returned, and the record for the log.
        """
        self.time_share.begin()
        # Spaces and times meta steps under --dwm-overhead-budget; otherwise it does nothing.
        meter = NoMeter() if self.budget is None else StepMeter(self.budget, self.shape.device)
        self.forward_step.stopwatch = meter.stopwatch
        plan = meter.admitted(self.schedule.plan(iteration))
        self.start_warm(plan, trainee)
        batches = meter.own(StepBatches)(trainee.data_iterator, get_num_microbatches())
        stock_step = meter.own(stock_step)
        step = self._view(iteration, batches)
        step.learns = plan.window == "meta"

        # A: weights of policies that need the whole batch first; for the others, what they weigh by
        causes: list[str] = []
        if plan.weighted and self.policy.needs.influence_ahead:
            causes = self._foresee(step, trainee)
        weighing = self._begin(step, plan)

        # B: the trainer's own step, weighted; on meta steps C and D: each sample's influence
        influence: Influence | None = None
        if self.expert_load is not None and step.domains is not None:
            stock_step = self._watched(stock_step, self.expert_load, step)
        start = now() if plan.meta_step else 0.0
        if plan.meta_step:
            self.influence.times.start()
            result, influence = self.influence.step(stock_step, trainee, batches, weighing)
        else:
            result, _ = self.influence.weighted_step(stock_step, batches, weighing)
        loss = _first_loss(result.losses)

        # E: the policy learns, unless something is NaN or infinite
        meta: MetaResult | None = None
        ahead = plan.weighted and self.policy.needs.influence_ahead
        late: list[str] = []
        if influence is not None:
            with self.influence.times("learn"):
                meta, causes = self._learn(step, influence, loss)
            meta.seconds = now() - start
            meta.seconds_by_pass = self.influence.times.take()
        elif plan.weighted and (self.policy.synchronous or self._look_is_due(iteration)):
            causes += agreed({"scores": self.policy.bad_scores()}, self.shape.device)
            causes += self._broken() if "scores" in causes else []
        if plan.weighted:
            step.causes = causes
            late = self.policy.end(step)
            causes = list(dict.fromkeys([*causes, *late]))
        looked = meta is not None or self.policy.synchronous or self._look_is_due(iteration)
        learned = meta is not None and (meta.updated or bool(causes))
        tried = learned or ahead or bool(late)
        self.bad_steps.note(causes, plan.weighted and looked, tried)
        self._collect(batches, plan)
        overhead = meter.finish(meta is not None)
        record = self._record(step, plan, meta, loss, overhead, causes)
        record.time_share = self.time_share.end(meta is not None)
        if self.expert_load is not None and record.iteration % self.expert_load.interval == 0:
            record.expert_load = self.expert_load.take(self.groups)
        return result.own, record

    # ------------------------------------------------------------------ A

    def _begin(self, step: StepView, plan: StepPlan) -> Weighing:
        """Returns the step's weights, or what computes them; ones in warm-up steps."""
        if plan.weighted:
            self.policy.begin(step)
        if not self.sees_losses:
            return None
        if not plan.weighted:
            count = step.num_microbatches * self.shape.micro_batch_size * self.groups.dp.size()
            return torch.ones(count, device=self.shape.device)
        return PolicyWeights(self.policy, self.tap, step.domains, step.documents)

    def _foresee(self, step: StepView, trainee: Trainee) -> list[str]:
        """Gives the policy the influence of the coming step's samples, if all of it is finite.

        Returns:
            What was not finite.
        """
        causes: list[str] = []
        found = self.influence.ahead(trainee, step.batches)
        values = None
        if found is not None:
            lr = torch.tensor(found.lr, dtype=torch.float64, device=self.shape.device)
            lr = collectives.largest(lr, torch.distributed.group.WORLD).item()
            finite = torch.isfinite(found.values).all() & math.isfinite(found.meta_loss)
            causes = agreed({"meta_gradient": ~finite}, self.shape.device)
            # At a learning rate of 0, as at the start of a warm-up, there is no influence.
            values = None if causes or lr <= 0 else found.values / lr
        self.policy.foresee(step, values)
        return causes

    def start_warm(self, plan: StepPlan, trainee: Trainee) -> None:
        """Copies the LLM's layers into the weighting model, before the first meta step."""
        if plan.meta_step and not self.warm_started and self.warm_start is not None:
            with gathered_parameters(trainee):
                self.warm_start()
            self.warm_started = True

    def weights_of(
        self, trainee: Trainee, batches: StepBatches, iteration: int
    ) -> torch.Tensor | None:
        """Returns the weights `[N]` of the step at `iteration`, without taking it.

        This takes a separate forward pass, because a policy may weigh by its results. Random states
        stay as they were.

        Returns:
            The weights; None on ranks that see no losses.
        """
        count = get_num_microbatches()
        step = self._view(iteration, batches)
        rng = random_states()
        weighing = self._begin(step, self.schedule.plan(iteration))
        if self.policy.needs.losses or self.policy.needs.states:
            with gathered_parameters(trainee), quiet(trainee):
                with self.forward_step.weighted(weighing, count) as applied:
                    self.passes.run(trainee, batches, count, forward_only=True)
            local = applied.weights
        elif self.sees_losses:
            nothing = torch.zeros(self.shape.micro_batch_size, 0, device=self.shape.device)
            views = [SampleView(k, nothing) for k in range(count)]
            for k, view in enumerate(views):
                if step.domains is not None:
                    view.domains = step.domains.chunk(count)[k]
                view.documents = {n: v.chunk(count)[k] for n, v in step.documents.items()}
            local = torch.cat([self.policy.weights(view) for view in views])
        else:
            local = None
        restore_random_states(rng)
        return self._gathered(local)

    # ------------------------------------------------------------------ E

    def _learn(
        self, step: StepView, influence: Influence, loss: torch.Tensor | float | None
    ) -> tuple[MetaResult, list[str]]:
        """Lets the policy learn; returns what was NaN or infinite and prevented it."""
        self.meta_steps_taken += 1
        lr = torch.tensor(influence.lr, dtype=torch.float64, device=self.shape.device)
        # A rank may hold none of the optimizer's groups.
        lr = collectives.largest(lr, torch.distributed.group.WORLD).item()
        # In units of the learning rate, so that targets do not depend on its decay.
        values = influence.values / max(lr, 1e-30)
        result = MetaResult(influence.meta_loss, values, math.nan, False, 0.0, influence.quality)
        finite = torch.isfinite(influence.values).all()
        causes = agreed(
            {
                "loss": loss is not None and not math.isfinite(float(loss)),
                "scores": self.policy.bad_scores(),
                "meta_gradient": ~finite | (not math.isfinite(influence.meta_loss)),
            },
            self.shape.device,
        )
        if "scores" in causes:
            causes += self._broken()
        # At a learning rate of 0, as at the start of a warm-up, there is no influence.
        if causes or lr <= 0.0:
            return result, causes
        lesson = self.policy.observe(step, values)
        result.updated, result.grad_norm = lesson.updated, lesson.grad_norm
        return result, lesson.causes

    def _broken(self) -> list[str]:
        """Returns causes for values in the policy itself that are not finite."""
        return agreed({"parameters": self.policy.broken()}, self.shape.device)

    def _look_is_due(self, iteration: int) -> bool:
        """Whether a policy without meta steps is checked now; otherwise meta steps do the check."""
        return not self.config.trains and (iteration + 1) % _LOOK_INTERVAL == 0

    # ------------------------------------------------------------------ the log

    @staticmethod
    def _watched(stock_step: StockStep, load: ExpertLoad, step: StepView) -> StockStep:
        """Returns the trainer's own step with the load of the experts counted."""

        def watched(data: Any) -> Any:
            assert step.domains is not None
            with load.listening(step.domains, step.num_microbatches):
                return stock_step(data)

        return watched

    def _collect(self, batches: StepBatches, plan: StepPlan) -> None:
        """Records the step's weights by document, once the gate is open far enough."""
        weights, chunk = self.influence.applied.weights, batches.last()
        if self.collector is None or weights is None or chunk is None or not plan.weighted:
            return
        if self.policy.opening >= _OPEN:
            self.collector.note(chunk, weights)

    def _record(
        self,
        step: StepView,
        plan: StepPlan,
        meta: MetaResult | None,
        loss: torch.Tensor | float | None,
        overhead: Overhead | None,
        causes: list[str],
    ) -> StepRecord:
        weights = self._gathered(self.influence.applied.weights)
        domains = None if step.domains is None else self._gathered(step.domains)
        record = StepRecord(step.iteration + 1, plan, weights, domains, meta, loss, overhead)
        record.causes, record.bad_steps = causes, self.bad_steps.summary()
        if self.sees_losses and plan.weighted:
            record.batch = getattr(self.policy, "batch", None)
            record.figures, record.notices = self.policy.figures(), self.policy.notices()
            if self.config.log_samples:
                record.scores = self._gathered(self.policy.local_scores())
                kept = self.influence.applied.losses
                record.losses = self._gathered(torch.cat(kept) if kept else None)
        return record

    def _gathered(self, local: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the global batch's `[N]` from local `[n]`; None on ranks that see no losses."""
        if local is None or not self.sees_losses:
            return None
        return collectives.gather_samples(local, self.groups.dp)

    def _view(self, iteration: int, batches: StepBatches) -> StepView:
        step = StepView(iteration, get_num_microbatches(), batches, self._domains(batches))
        if self.sees_losses:
            step.documents = {name: self._numbers(batches, name) for name in self._documents}
        return step

    @property
    def _documents(self) -> tuple[str, ...]:
        return self.policy.needs.documents

    def _numbers(self, batches: StepBatches, name: str) -> torch.Tensor:
        """Returns one number of each local sample's documents, `[n]` float64.

        Args:
            batches: the step's batches; `document_field(name)` holds the numbers.
            name: name of the setting.

        Raises:
            DWMError: the loader provides none.
        """
        local = torch.zeros(get_num_microbatches() * self.shape.micro_batch_size).double()
        chunk = batches.last()
        if chunk is not None:
            key = document_field(name)
            if not all(isinstance(batch, dict) and key in batch for batch in chunk):
                raise DWMError(
                    f"{flag(name)}: the data loader's batches have no field '{key}' "
                    "([micro_batch_size] numbers); give it, or take a policy that needs none",
                    this_rank_only=True,
                )
            local = torch.cat([batch[key].view(-1).double().cpu() for batch in chunk])
        # Reinterpreted as integers, because integers are sent.
        return self._on_peers(local.view(torch.int64)).view(torch.float64)

    def _on_peers(self, local: torch.Tensor) -> torch.Tensor:
        """Returns the local samples' values as read by the first tensor-parallel rank."""
        local = local.to(self.shape.device, non_blocking=True)
        if self.groups.tp.size() > 1:
            local = collectives.broadcast_from_first_tensor_rank(
                local, tuple(local.shape), self.groups.tp, self.shape.device
            )
        return local

    def _domains(self, batches: StepBatches) -> torch.Tensor | None:
        """Returns the domain of each local sample, `[n]`; -1 if the loader names none.

        This is the domain of its documents (`WeightedGPTDataset`), else the blend's data set.

        Returns:
            None on ranks that see no losses.
        """
        if not self.sees_losses:
            return None
        local = torch.full((get_num_microbatches() * self.shape.micro_batch_size,), -1)
        chunk = batches.last()
        if chunk is not None and isinstance(chunk[0], dict):
            name = "domain_id" if "domain_id" in chunk[0] else "dataset_id"
            if name in chunk[0]:
                local = torch.cat([batch[name].view(-1).long().cpu() for batch in chunk])
        # Only the log needs them, and it does not wait for the device.
        return self._on_peers(local)


def _first_loss(losses: dict[str, torch.Tensor]) -> torch.Tensor | float | None:
    """Returns the first loss that the trainer reports; None if it reports none."""
    for value in losses.values():
        return value
    return None
