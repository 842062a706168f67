"""What learned policies share: scores through map and gate, and out-of-sample evidence.

A subclass provides scores; this module turns them into weights, decides how far those may move away
from one, and reports it.
"""

from __future__ import annotations

import abc
from typing import Any

import torch

from megatron_dwm.policies.base import Lesson, PolicyContext, SampleView, StepView, WeightPolicy
from megatron_dwm.policies.gate import Gate
from megatron_dwm.policies.maps import Mapped, build_map

WINSOR = 3.0  # standard deviations at which targets are clipped
_SCALE_DECAY = 0.9  # of the influence's running variance, per meta step


class LearnedPolicy(WeightPolicy):
    """A policy whose scores are learned from influence.

    Args:
        context: what it is built from.
        standard: whether the scores have mean 0 and variance 1 by construction.
        drifts: whether they may still all move together, see `maps.SigmoidMap`.
    """

    def __init__(self, context: PolicyContext, standard: bool, drifts: bool = False) -> None:
        super().__init__(context)
        config = context.config
        self.gate, self.gated = Gate(), config.gate == "on"
        self.map = build_map(config, standard, context.device, drifts and self.gated)
        self.targets = Targets()
        self.batch: Mapped | None = None
        self._bad: torch.Tensor | bool = False
        self._samples = 1
        self._scores: dict[int, torch.Tensor] = {}

    # ------------------------------------------------------------------ what a subclass gives

    @abc.abstractmethod
    def learn(self, step: StepView, influence: torch.Tensor, scores: torch.Tensor | None) -> Lesson:
        """Learns from a meta step. Called on every rank.

        Args:
            step: the step.
            influence: `[N]`, see `WeightPolicy.observe`.
            scores: `[N]` scores behind the weights; None on ranks that see no losses.
        """

    # ------------------------------------------------------------------ weights

    def mapped(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns the weights of scores through map and gate, and records bad scores."""
        found = self.map.weights(scores)
        self._bad = found.bad | self._bad
        if self.batch is not None and found.capped is not None and not self.map.whole_batch:
            found.capped = found.capped + self.batch.capped  # over this rank's micro-batches so far
        self.batch = found
        return self.opened(found.weights)

    def opened(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns `1 + a (w - 1)` with the gate's opening a."""
        if self.opening >= 1:
            return weights
        return 1 + self.opening * (weights - 1)

    @property
    def opening(self) -> float:
        """How far weights may move away from 1: the gate's opening, 1 without a gate."""
        return self.gate.opening if self.gated else 1.0

    def keep_scores(self, view: SampleView, scores: torch.Tensor) -> None:
        """Keeps a micro-batch's scores for the end of the step."""
        self._scores[view.index] = scores

    def local_scores(self) -> torch.Tensor | None:
        """Returns the scores of this rank's samples `[n]`; None if there are none."""
        if not self._scores:
            return None
        return torch.cat([self._scores[k] for k in sorted(self._scores)])

    def bad_scores(self) -> torch.Tensor | bool:
        """See `WeightPolicy.bad_scores`."""
        found, self._bad = self._bad, False
        return found

    # ------------------------------------------------------------------ evidence

    def observe(self, step: StepView, influence: torch.Tensor) -> Lesson:
        """Gives the gate its evidence, then learns."""
        scores = None
        local = self.local_scores()
        if self.context.sees_losses and local is not None:
            scores = self.context.topology.gather_samples(local)
            self._samples = scores.numel()
            self.gate.observe(scores, influence)
        return self.learn(step, influence, scores)

    def figures(self) -> dict[str, Any]:
        """Correlation, its running mean and standard error, and the gate."""
        return {
            "score_correlation": self.gate.last,
            "score_correlation_mean": self.gate.mean,
            "score_correlation_error": self.gate.standard_error(self._samples),
            "gate": self.opening,
        }

    def notices(self) -> list[str]:
        """Reports when the gate has opened or closed, and why."""
        words = self.gate.words(self._samples) if self.gated else None
        return [] if words is None else [words]

    def forget_evidence(self) -> None:
        """See `WeightPolicy.forget_evidence`: the gate starts closed."""
        self.gate = Gate()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        return {
            "map": self.map.state_dict(),
            "gate": self.gate.state_dict(),
            "targets": self.targets.state_dict(),
            "samples": self._samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        self.map.load_state_dict(state["map"])
        if state["gate"] is not None:
            self.gate.load_state_dict(state["gate"])
        self.targets.load_state_dict(state["targets"])
        self._samples = state.get("samples", self._samples)


class Targets:
    """Turns influence into a regression's targets: standardised usefulness.

    `z_i = -(c_i - mean) / deviation`, clipped at `WINSOR` deviations. The mean is the global
    batch's own, as it differs between meta batches and says nothing about a sample; the deviation
    is a running one, because that of few samples is noisy.
    """

    def __init__(self) -> None:
        self.variance = self.weight = 0.0

    def __call__(self, influence: torch.Tensor) -> torch.Tensor:
        """Returns `[N]` float64 targets of a meta step, and includes its variance."""
        c = influence.double()
        c = c - c.mean()
        # Outliers are clipped before they set the scale.
        size = c.square().mean().sqrt()
        c = c.clamp(-WINSOR * size, WINSOR * size)
        c = c - c.mean()
        self.weight = _SCALE_DECAY * self.weight + 1
        self.variance += (c.square().mean().item() - self.variance) / self.weight
        deviation = max(self.variance**0.5, 1e-30)
        return (-c / deviation).clamp(-WINSOR, WINSOR)

    def state_dict(self) -> dict[str, float]:
        """Returns the running variance."""
        return {"variance": self.variance, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Loads the running variance."""
        self.variance, self.weight = state["variance"], state["weight"]
