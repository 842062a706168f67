"""The form `model`: a separate transformer that scores the tokens before the trainer's own step.

It learns by one of two rules:

    chain       the paper's: the meta loss's gradient through the weights, one step per meta step
    regression  mean-squared error of its scores against the standardised influence of this meta
                step and of some earlier ones (a replay), and, in every step between meta steps,
                against the scores of a head (`head`) as teacher: dense labels for a model that
                needs many

Shapes: b samples in a micro-batch, m micro-batches on this rank (n = m b), N in the global batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from megatron_dwm.config.policy_table import Needs
from megatron_dwm.core.batches import tokens_of
from megatron_dwm.policies.base import Lesson, PolicyContext, SampleView, StepView
from megatron_dwm.policies.head import Head
from megatron_dwm.policies.learned import LearnedPolicy
from megatron_dwm.policies.softmax import uniform_where

if TYPE_CHECKING:
    from megatron_dwm.weighting_model.scorer import Update

# Meta steps before the head's scores are used as labels.
_TEACHER_READY = 3


class Model(LearnedPolicy):
    """The form `model` with either rule.

    Args:
        context: what it is built from; its `scorer` builds the transformer.
    """

    needs = Needs(tokens=True, influence=True, model=True, map=True, whole_batch=True)

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context, standard=False)
        config = context.config
        self.scorer, self._description = context.scorer()
        self.regression = config.rule == "regression"
        taught = self.regression and config.teacher == "head" and config.trains
        self.teacher = Head(context) if taught else None
        watches = self.teacher is not None
        self.needs = replace(self.needs, losses=watches, states=watches)
        self.batch_of_step: torch.Tensor | None = None
        self.replay = Replay(config.replay if self.regression else 0)
        self.lessons = 0
        self._weights: torch.Tensor | None = None
        self._local = torch.zeros(0)
        self._learned = False

    @property
    def synchronous(self) -> bool:
        """Bad scores are found before the step, on every rank, at the price of a wait."""
        return True

    def broken(self) -> torch.Tensor | bool:
        """See `WeightPolicy.broken`."""
        return self.scorer.bad_parameters()

    # ------------------------------------------------------------------ scores

    def begin(self, step: StepView) -> None:
        """Pass A: scores of the step's samples, and their weights."""
        self._learned, self.batch = False, None
        if self.teacher is not None:
            self.teacher.begin(step)
        self._local = self.scorer.scores(tokens_of(step.batches.first()), step.num_microbatches)
        if not self.context.sees_losses:
            return
        self._scores = {0: self._local}
        topology = self.context.topology
        if not self.map.whole_batch:
            self._weights = self.mapped(self._local)
            return
        scores = topology.gather_samples(self._local)
        self.batch_of_step = self._agreed(self.mapped(scores))
        self._weights = topology.own_samples(self.batch_of_step)

    def _agreed(self, weights: torch.Tensor) -> torch.Tensor:
        """Makes tensor-parallel peers agree on bad scores; data-parallel peers already do."""
        assert self.batch is not None
        bad = self.context.topology.any_of_peers(self.batch.bad)
        self.batch.bad, self._bad = bad, bad | self._bad
        return uniform_where(bad, weights)

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`."""
        assert self._weights is not None
        if self.teacher is not None:
            self.teacher.weights(view)
        b = self.context.micro_batch_size
        return self._weights[view.index * b : (view.index + 1) * b]

    # ------------------------------------------------------------------ learning

    def learn(self, step: StepView, influence: torch.Tensor, scores: torch.Tensor | None) -> Lesson:
        """Takes one step of the chosen rule."""
        self.lessons += 1
        self._learned = True
        if not self.regression:
            gradient = None
            if scores is not None:
                # Without the gate's factor: otherwise a model behind a closed gate could never
                # learn.
                gradient = self.map.pull_back(scores, influence)
            return self._lesson([self._update(step, gradient)])
        if self.teacher is not None:
            self.teacher.observe(step, influence)
        targets = None if scores is None else self.targets(influence)
        found = [self._fit(step, scores, targets)]
        tokens = tokens_of(step.batches.first())
        same_size = self.replay.num_microbatches == step.num_microbatches
        steps = self.context.config.replay_steps if same_size else 0
        for past in self.replay.chosen(self.lessons, steps):
            found.append(self._fit_again(past))
        self.replay.keep(tokens, self._part(targets), step.num_microbatches)
        return self._lesson(found)

    def end(self, step: StepView) -> list[str]:
        """Between meta steps, learns the teacher head's scores; updates the map."""
        causes: list[str] = []
        if self.teacher is not None:
            labels = None
            if self.context.sees_losses:
                local = self.teacher.local_scores()
                assert local is not None
                labels = self.context.topology.gather_samples(local)
            due = step.learns and not step.causes and not self._learned
            if due and self.lessons >= _TEACHER_READY:
                scores = None
                if self.context.sees_losses:
                    scores = self.context.topology.gather_samples(self._local)
                causes = self._fit(step, scores, labels).causes
            self.teacher.end(step)
        if self.context.sees_losses and not self.map.whole_batch:
            sums = self.map.sums(self._local)
            self.map.update(self.context.topology.sum_over_samples(sums))
        return causes

    def _fit(
        self, step: StepView, scores: torch.Tensor | None, targets: torch.Tensor | None
    ) -> Update:
        """Takes one step along the gradient of `mean((s - mean(s) - z)^2)`; `[N]` each."""
        return self._update(step, _error_gradient(scores, targets))

    def _fit_again(self, past: tuple[list[torch.Tensor] | None, torch.Tensor | None]) -> Update:
        """Does the same for a past meta step, with current scores."""
        tokens, targets = past
        count = self.replay.num_microbatches
        local = self.scorer.scores(tokens, count)
        gradient = None
        if self.context.sees_losses:
            assert targets is not None
            topology = self.context.topology
            scores = topology.gather_samples(local)
            everyone = topology.gather_samples(targets.to(self.context.device))
            gradient = _error_gradient(scores, everyone)
        return self.scorer.update(tokens, count, self._local_gradient(gradient, count))

    def _update(self, step: StepView, gradient: torch.Tensor | None) -> Update:
        """Takes a step of the transformer's optimizer along `-gradient` `[N]`."""
        count = step.num_microbatches
        tokens = tokens_of(step.batches.first())
        return self.scorer.update(tokens, count, self._local_gradient(gradient, count))

    def _local_gradient(self, gradient: torch.Tensor | None, count: int) -> torch.Tensor:
        part = self._part(gradient)
        if part is None:
            return torch.zeros(count * self.context.micro_batch_size, device=self.context.device)
        return part.float()

    def _part(self, values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return self.context.topology.own_samples(values)

    def _lesson(self, updates: list[Update]) -> Lesson:
        causes = list(dict.fromkeys(cause for update in updates for cause in update.causes))
        return Lesson(updates[0].updated, updates[0].grad_norm, causes)

    # ------------------------------------------------------------------ log and state

    def figures(self) -> dict[str, Any]:
        """See `LearnedPolicy.figures`; adds the teacher head's correlation."""
        found = super().figures()
        if self.teacher is not None:
            found["teacher_correlation_mean"] = self.teacher.gate.mean
        return found

    def description(self) -> dict[str, Any]:
        """The transformer's sizes and everything else that must agree."""
        return self._description

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`; the transformer and its optimizer are saved separately."""
        teacher = None if self.teacher is None else self.teacher.state_dict()
        return {**super().state_dict(), "teacher": teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        super().load_state_dict(state)
        if self.teacher is not None and state["teacher"] is not None:
            self.teacher.load_state_dict(state["teacher"])

    def common_state(self) -> dict[str, Any]:
        """See `WeightPolicy.common_state`: every stage uses it to decide what it takes part in."""
        return {"lessons": self.lessons}

    def load_common_state(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_common_state`."""
        self.lessons = int(state["lessons"])

    def local_state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.local_state_dict`: the replay's tokens and targets."""
        return self.replay.state_dict()

    def load_local_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_local_state_dict`."""
        self.replay.load_state_dict(state)


def _error_gradient(
    scores: torch.Tensor | None, targets: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns the gradient of `mean((s - mean(s) - (z - mean(z)))^2)` in the scores, `[N]`.

    Samples without a finite target are left out.
    """
    if scores is None or targets is None:
        return None
    known = torch.isfinite(targets)
    count = known.sum().clamp(min=1)
    error = torch.where(known, scores.double() - targets.double(), 0.0)
    centred = torch.where(known, error - error.sum() / count, 0.0)
    return (2 / count * centred).to(scores.dtype)


class Replay:
    """Samples and targets of the last meta steps, each rank's own part, in host memory.

    Args:
        length: number of meta steps to keep.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.steps: list[tuple[list[torch.Tensor] | None, torch.Tensor | None]] = []
        self.num_microbatches = 1

    def keep(
        self,
        tokens: list[torch.Tensor] | None,
        targets: torch.Tensor | None,
        num_microbatches: int,
    ) -> None:
        """Keeps a meta step; another number of micro-batches clears the replay first.

        Args:
            tokens: `[b, s]` of each micro-batch, on ranks that read data.
            targets: `[n]`, on ranks that see losses.
            num_microbatches: m.
        """
        if not self.length:
            return
        if num_microbatches != self.num_microbatches:
            self.steps, self.num_microbatches = [], num_microbatches
        kept = None if tokens is None else [t.to("cpu", torch.int32, copy=True) for t in tokens]
        goal = None if targets is None else targets.detach().cpu()
        self.steps = [*self.steps, (kept, goal)][-self.length :]

    def chosen(
        self, number: int, count: int
    ) -> list[tuple[list[torch.Tensor] | None, torch.Tensor | None]]:
        """Returns `count` of the kept meta steps, the same ones on every rank.

        Args:
            number: number of the current meta step, which determines the choice.
            count: how many to choose, if there are that many.
        """
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(self.steps), generator=generator)[:count]
        return [(_as_ids(self.steps[i][0]), self.steps[i][1]) for i in order.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's part."""
        return {"steps": list(self.steps), "num_microbatches": self.num_microbatches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads this rank's part."""
        self.steps = list(state["steps"])[-self.length :] if self.length else []
        self.num_microbatches = int(state["num_microbatches"])


def _as_ids(tokens: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
    return None if tokens is None else [t.long() for t in tokens]
