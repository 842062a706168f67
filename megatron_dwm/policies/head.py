"""The head: a linear score on the language model's own states in the current forward pass.

    phi(x) = features (`features`), standardised by running moments, projected above `LIMIT`
    s(x) = <w, phi(x)> / its standard deviation,   w by ridge regression of the influence

The states of a language model drift while it trains, early on by several standard deviations within
a few steps, and the scores of all samples drift with them. The map's centre is therefore the score
of the mean features of the last `maps.RECENT` samples or so (the score is linear), and its
deviation is that of their scores; otherwise a drift would be mistaken for a difference between
samples, and drop all of them or none.

There is no second model and no extra pass: a micro-batch's weights are known inside its own forward
step. Running moments and w are fixed at the start of a step and change at its end, so that no
weight depends on the parallel layout or on the order of micro-batches.

Each step sums one vector over data-parallel ranks, with a length of about four times the hidden
size; the sum starts at the end of the step and is awaited in the next.

Shapes: b samples in a micro-batch, n on this rank, N in the global batch, F features, k after
projection.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.config.policy_table import Needs
from megatron_dwm.policies.base import Lesson, PolicyContext, SampleView, StepView
from megatron_dwm.policies.features import Projection, sample_features
from megatron_dwm.policies.learned import LearnedPolicy
from megatron_dwm.policies.maps import DECAY, SigmoidMap, newest
from megatron_dwm.policies.ridge import Ridge

LIMIT = 1024  # maximum number of features of the regression
_OF_LOSSES = 2
_OF_SCORES = 3


class Head(LearnedPolicy):
    """The form `head` with the rule `regression`.

    Args:
        context: what it is built from.
    """

    needs = Needs(losses=True, states=True, influence=True, map=True)

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context, standard=True, drifts=True)
        config, device = context.config, context.device
        width = 2 * context.hidden_size + _OF_LOSSES
        self.projection = Projection(width, LIMIT, _OF_LOSSES, config.seed, device)
        self.ridge = Ridge(self.projection.width, config.forgetting, config.ridge, device)
        self.standard = RunningMoments(width, device)
        self.spread = torch.ones((), dtype=torch.float64, device=device)
        self._features: dict[int, torch.Tensor] = {}
        self._pending: tuple[torch.Tensor, Any] | None = None

    def begin(self, step: StepView) -> None:
        """Includes the last step's sums."""
        self._settle()
        self._features.clear()
        self._scores.clear()
        self.batch = None

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`."""
        assert view.states is not None and view.mask is not None
        features = sample_features(view.states, view.losses, view.mask, self.context.topology)
        self._features[view.index] = features
        scores = self.scores(features)
        self.keep_scores(view, scores)
        return self.mapped(scores)

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Returns `[b]` float64 scores of features `[b, F]`."""
        return self._standardised(features) @ (self.ridge.w * self.ridge.scale)

    def broken(self) -> torch.Tensor | bool:
        """See `WeightPolicy.broken`."""
        return ~torch.isfinite(self.ridge.w).all()

    def learn(self, step: StepView, influence: torch.Tensor, scores: torch.Tensor | None) -> Lesson:
        """Updates the regression once, on ranks that see losses."""
        if not self.context.sees_losses or scores is None:
            return Lesson(True)
        topology = self.context.topology
        targets = self.targets(influence)
        local = topology.own_samples(targets)
        phi = self._standardised(self._local_features())
        phi = torch.where(torch.isfinite(phi), phi, 0.0)
        mean = topology.sum_over_samples(phi.sum(0)) / len(targets)
        # Centred over the batch, like its targets.
        phi = phi - mean
        products = torch.cat([phi.T @ phi, (phi.T @ local).unsqueeze(0)])
        products = topology.sum_over_samples(products)
        self.ridge.update(products[:-1], products[-1], len(targets), self.gate.mean)
        topology.make_equal(self.ridge.w)
        topology.make_equal(self.ridge.scale)
        return Lesson(True)

    def end(self, step: StepView) -> list[str]:
        """Starts to sum what the running moments and the map need from this step."""
        if not self.context.sees_losses or not self._features:
            return []
        features = self._local_features().double()
        scores = self.local_scores()
        assert scores is not None
        # Uses the scores that the samples have now, after learning from them.
        now = self.scores(features)
        now = now[torch.isfinite(now)]
        of_scores = torch.stack([torch.ones_like(now).sum(), now.sum(), now.square().sum()])
        packed = torch.cat([self.standard.sums(features), of_scores, self.map.sums(scores)])
        handle = self.context.topology.start_sum_over_samples(packed)
        self._pending = (packed, handle)
        return []

    def figures(self) -> dict[str, Any]:
        """See `LearnedPolicy.figures`; adds how far weights may leave 1 while scores drift."""
        found = super().figures()
        if isinstance(self.map, SigmoidMap) and self.map.drifts:
            found["steadiness"] = self.map.steadiness
        return found

    def description(self) -> dict[str, Any]:
        """The number of features, which tells whether a saved head fits."""
        found: dict[str, Any] = {"form": "head", "--hidden-size": self.context.hidden_size}
        if self.projection.active:  # its seed decides which sums of features the weights belong to
            found["--dwm-seed"] = self.context.config.seed
        return found

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        self._settle()
        return {
            **super().state_dict(),
            "ridge": self.ridge.state_dict(),
            "standard": self.standard.state_dict(),
            "spread": self.spread.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        super().load_state_dict(state)
        self.ridge.load_state_dict(state["ridge"])
        self.standard.load_state_dict(state["standard"])
        if "spread" in state:  # missing in older states
            self.spread = state["spread"].to(self.spread.device)

    def _local_features(self) -> torch.Tensor:
        return torch.cat([self._features[k] for k in sorted(self._features)])

    def _standardised(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(self.standard(features.double()))

    def _settle(self) -> None:
        """Waits for the sums of the last step and includes them."""
        if self._pending is None:
            return
        packed, handle = self._pending
        self._pending = None
        if handle is not None:
            handle.wait()
        length = self.standard.length
        of_features, of_scores, of_map = packed.split(
            [length, _OF_SCORES, len(packed) - length - _OF_SCORES]
        )
        self.standard.update(of_features)
        self.map.update(of_map)
        count, first, second = of_scores
        count = count.clamp(min=1)
        spread = second / count - (first / count).square()
        self.spread = self.spread + newest(count) * (spread - self.spread)
        self.map.place(self.scores(self.standard.recent.unsqueeze(0))[0], self.spread)


class RunningMoments:
    """Running mean and variance of each feature, float64, and the mean of the last few steps.

    Before the first update every standardised feature is 0: nothing is known yet.

    Args:
        width: F.
        device: where features live.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        kind = {"dtype": torch.float64, "device": device}
        self.mean, self.variance = torch.zeros(width, **kind), torch.zeros(width, **kind)
        self.recent, self.scale = torch.zeros(width, **kind), torch.zeros(width, **kind)
        self.age = torch.zeros((), **kind)
        self.length = 2 * width + 1

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Returns `[n, F]` standardised features; 0 where a feature does not vary."""
        return (features - self.mean) * self.scale

    def sums(self, features: torch.Tensor) -> torch.Tensor:
        """Returns `[2 F + 1]`: count, sums and sums of squares around the running mean."""
        finite = torch.isfinite(features).all(1, keepdim=True)
        around = torch.where(finite, features - self.mean, 0.0)
        return torch.cat([finite.double().sum(0), around.sum(0), around.square().sum(0)])

    def update(self, sums: torch.Tensor) -> None:
        """Includes a step's sums over all samples, without waiting for the device."""
        width = len(self.mean)
        count, first, second = sums.split([1, width, width])
        empty = count < 1
        count = count.clamp(min=1)
        shift = first / count
        spread = (second / count - shift.square()).clamp(min=0)
        # While there is little to average, all of it counts equally.
        age = self.age + 1
        latest = torch.where(empty, 0.0, torch.maximum(newest(count), 1 / age))
        self.recent = self.recent + latest * (self.mean + shift - self.recent)
        new = torch.where(empty, 0.0, torch.maximum(torch.full_like(age, 1 - DECAY), 1 / age))
        self.variance = (1 - new) * (self.variance + new * shift.square()) + new * spread
        self.mean = self.mean + new * shift
        self._rescale()
        self.age = torch.where(empty[0], self.age, age)

    def state_dict(self) -> dict[str, Any]:
        """Returns the moments."""
        return {name: getattr(self, name).cpu() for name in ("mean", "variance", "recent", "age")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the moments."""
        # Older states have no recent mean; the running mean takes its place.
        for name, value in {"recent": state["mean"], **state}.items():
            setattr(self, name, value.to(self.mean.device))
        self._rescale()

    def _rescale(self) -> None:
        scale = self.variance.clamp(min=1e-24).rsqrt()
        self.scale = torch.where(self.variance > 0, scale, 0.0)
