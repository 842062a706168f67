"""Maps from scores to weights, and the guards on the weights.

A map is a pair of functions, `weights(scores)` and `pull_back(scores, c)`, with running state that
changes only between steps.

    sigmoid   w = sigmoid(slope (s - centre) / deviation) / normaliser   bounded: a soft filter
    softmax   w = N softmax(s / tau) over the global batch      mean exactly 1

The sigmoid's centre, deviation and normaliser are running averages over the samples of past steps,
so that a weight depends on its own sample only, and its mean is one in expectation. The softmax
needs the scores of the whole global batch at once.

Guards, in this order (those of the softmax are in `policies.guarding`; those of the sigmoid here):

    floor   w' = 1 + f (w - 1), with the largest f <= 1 that keeps 1 / (1 + f^2 var(w)) >= F, the
            effective share, var(w) a running average
    mix     w'' = (1 - A) w' + A
    cap     w''' = min(W, a w''), with the running a that keeps the mean at 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from megatron_dwm.policies.guarding import Guards
from megatron_dwm.policies.running import share_of_new
from megatron_dwm.policies.softmax import batch_weights, score_gradient

# Decay of the running averages per step. 0.95: the last 20 steps or so.
DECAY = 0.95
# Samples whose scores place the map of standard scores; at least those of the last step.
RECENT = 256
# A model whose scores do not differ yet carries no information.
_LEAST_VARIANCE = 1e-4
_DRIFT_DECAY = 0.9


def newest(count: torch.Tensor) -> torch.Tensor:
    """Returns the share of a step of `count` samples in a mean of the last `RECENT` or so."""
    steps = RECENT / count
    return 1 - ((steps - 1) / (steps + 1)).clamp(min=0.0)


@dataclass
class Mapped:
    """The weights of scores, and what the guards did.

    Attributes:
        weights: float32, in the scores' shape; 1 where the score is NaN or infinite.
        bad: scalar bool tensor, whether any score was NaN or infinite.
        raised: scalar tensor, the temperature to which a floor raised the softmax's; NaN if it did
            not, None without a floor.
        capped: scalar tensor, the number of weights at the cap, or None.
    """

    weights: torch.Tensor
    bad: torch.Tensor
    raised: torch.Tensor | None = None
    capped: torch.Tensor | None = None


class WeightMap(Protocol):
    """Scores to weights and back.

    Attributes:
        whole_batch: whether `weights` needs the scores of the whole global batch at once.
    """

    whole_batch: bool

    def weights(self, scores: torch.Tensor) -> Mapped:
        """Returns the weights of scores `[N]` (or of any part of them, see `whole_batch`)."""

    def pull_back(self, scores: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Returns `dL/ds` from `c = dL/dw` `[N]` through the weights of these scores."""

    def sums(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns this rank's sums `[k]` float64, which are added over data parallelism."""

    def update(self, sums: torch.Tensor) -> None:
        """Includes the step's sums over all samples in the running state."""

    def place(self, centre: torch.Tensor, variance: torch.Tensor) -> None:
        """Sets current centre and variance of scores that are standard by construction; scalars."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the running state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a running state."""


class SoftmaxMap:
    """`w = N softmax(s / tau)` over the global batch, with its guards.

    Args:
        temperature: tau.
        guards: guards on the weights.
    """

    whole_batch = True

    def __init__(self, temperature: float, guards: Guards) -> None:
        self.temperature, self.guards = temperature, guards

    def weights(self, scores: torch.Tensor) -> Mapped:
        """See `WeightMap.weights`; one bad score makes every weight 1."""
        found = batch_weights(scores, self.temperature, self.guards)
        raised = found.raised
        if raised is not None:
            raised = torch.where(raised > self.temperature, raised, torch.nan)
        return Mapped(found.weights, found.bad, raised, found.capped)

    def pull_back(self, scores: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """See `WeightMap.pull_back`."""
        return score_gradient(scores, c, self.temperature, self.guards)

    def sums(self, scores: torch.Tensor) -> torch.Tensor:
        """Nothing: there is no running state."""
        return scores.new_zeros(0, dtype=torch.float64)

    def update(self, sums: torch.Tensor) -> None:
        """Nothing to update."""

    def place(self, centre: torch.Tensor, variance: torch.Tensor) -> None:
        """Nothing to do: only differences of scores count."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class _Constants(NamedTuple):
    """Constants of the map that hold until the running state changes, scalar tensors each."""

    centre: torch.Tensor
    normaliser: torch.Tensor
    per_deviation: torch.Tensor
    shrinkage: torch.Tensor | None  # keeps the effective share above the floor
    factor: torch.Tensor
    steadiness: torch.Tensor


class SigmoidMap:
    """`w = sigmoid(slope (s - centre) / deviation) / normaliser`, with running averages.

    Before the first update, centre 0 and normaliser 1/2 are used: scores of 0 give weights of 1.

    Args:
        slope: by how much a standard deviation of the scores moves the sigmoid's argument.
        guards: guards on the weights.
        standard: whether scores have mean 0 and variance 1 by construction, so that centre and
            deviation are fixed.
        device: where scores live.
        drifts: whether standard scores may all move together, so that weights move away from 1 only
            once the scores have been seen to hold still.
    """

    whole_batch = False

    def __init__(
        self,
        slope: float,
        guards: Guards,
        standard: bool,
        device: torch.device,
        drifts: bool = False,
    ) -> None:
        self.slope, self.guards, self.standard = slope, guards, standard
        self.drifts = drifts
        # centre, normaliser, variance of the weights, the cap's factor, age of the averages,
        # variance of the scores, squared distance of the steps' mean scores from the centre
        start = [0.0, 0.5, 0.0, 1.0, 0.0, 1.0, 1.0 if drifts else 0.0]
        self.state = torch.tensor(start, dtype=torch.float64, device=device)

    @property
    def state(self) -> torch.Tensor:
        """`[7]` float64, see above; replaced as a whole, never changed in place."""
        return self._state

    @state.setter
    def state(self, value: torch.Tensor) -> None:
        self._state = value
        self._found: _Constants | None = None

    @property
    def _constants(self) -> _Constants:
        # Once per step: a few dozen operations, noticeable for a small model if done per
        # micro-batch.
        if self._found is None:
            centre, normaliser, variance, factor, _, deviation2, drift = self.state.unbind()
            floor, shrinkage = self.guards.min_effective_samples, None
            if floor is not None:
                allowed = math.sqrt(1 / floor - 1)
                shrinkage = (allowed / variance.clamp(min=1e-12).sqrt()).clamp(max=1.0)
            # A step's mean score is about deviation / sqrt(N) from the centre, unless all scores
            # have moved since the centre was set.
            steadiness = (1.5 - 2 * drift.sqrt()).clamp(0.0, 1.0)
            self._found = _Constants(
                centre, normaliser, deviation2.rsqrt(), shrinkage, factor, steadiness
            )
        return self._found

    def weights(self, scores: torch.Tensor) -> Mapped:
        """See `WeightMap.weights`; a bad score makes only its own weight 1."""
        weights = self._guarded(self._plain(scores.double()))
        good = torch.isfinite(scores) & torch.isfinite(weights)
        bad = ~good.all()
        capped = None
        if self.guards.max_weight is not None:
            capped = (weights >= self.guards.max_weight).sum()
        weights = torch.where(good, weights, 1.0).float()
        return Mapped(weights, bad, None, capped)

    def pull_back(self, scores: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """See `WeightMap.pull_back`; the running state is a constant."""
        with torch.enable_grad():
            s = scores.detach().double().requires_grad_()
            weights = self._guarded(self._plain(s))
            (gradient,) = torch.autograd.grad((weights * c.double()).sum(), s)
        return gradient.to(scores.dtype)

    def sums(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns the count, and the sums of what `update` averages."""
        centre = self._constants.centre
        s = torch.where(torch.isfinite(scores), scores.double(), centre)
        sigmoids = torch.sigmoid(self._argument(s))
        plain = sigmoids / self._constants.normaliser
        return torch.stack(
            [
                torch.ones_like(s),
                s,
                (s - centre).square(),
                sigmoids,
                (plain - 1).square(),
                self._guarded(plain),
            ]
        ).sum(1)

    def update(self, sums: torch.Tensor) -> None:
        """See `WeightMap.update`; without waiting for the device."""
        count, scores, spread, sigmoids, squares, guarded = sums
        centre, normaliser, variance, factor, age, deviation2, drift = self.state
        # While there is little to average, all of it counts equally.
        age = age + 1
        new = share_of_new(age, DECAY)
        count = count.clamp(min=1)
        moved = (scores / count - centre).square() / deviation2
        shift = new * (scores / count - centre)
        wider = new * (spread / count - deviation2)
        if self.standard:
            shift, wider = torch.zeros_like(shift), torch.zeros_like(wider)
        self.state = torch.stack(
            [
                centre + shift,
                (normaliser + new * (sigmoids / count - normaliser)).clamp(min=1e-6),
                variance + new * (squares / count - variance),
                factor / (1 + new * (guarded / count - 1)).clamp(min=0.5)
                if self.guards.max_weight is not None
                else factor,
                age,
                (deviation2 + wider).clamp(min=_LEAST_VARIANCE),
                drift + share_of_new(age + 2, _DRIFT_DECAY) * (moved - drift),
            ]
        )

    def place(self, centre: torch.Tensor, variance: torch.Tensor) -> None:
        """See `WeightMap.place`; a centre that is not finite is ignored."""
        place = torch.zeros_like(self.state, dtype=torch.bool)
        place[0] = place[5] = True
        new = self.state.clone()
        new[0], new[5] = centre, variance.clamp(min=_LEAST_VARIANCE)
        self.state = torch.where(place & torch.isfinite(new), new, self.state)

    def state_dict(self) -> dict[str, Any]:
        """See `WeightMap.state_dict`."""
        return {"sigmoid": self.state.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightMap.load_state_dict`."""
        saved = state["sigmoid"].to(self.state.device)
        # Older states have no drift.
        self.state = torch.cat([saved, torch.zeros_like(self.state[len(saved) :])])

    @property
    def steadiness(self) -> torch.Tensor:
        """How far weights may move away from 1 while all scores move together: in [0, 1]."""
        return self._constants.steadiness

    def _plain(self, s: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self._argument(s)) / self._constants.normaliser

    def _argument(self, s: torch.Tensor) -> torch.Tensor:
        return self.slope * (s - self._constants.centre) * self._constants.per_deviation

    def _guarded(self, weights: torch.Tensor) -> torch.Tensor:
        mix, cap = self.guards.uniform_mix, self.guards.max_weight
        if self._constants.shrinkage is not None:
            weights = 1 + self._constants.shrinkage * (weights - 1)
        if mix > 0:
            weights = (1 - mix) * weights + mix
        if self.drifts:
            weights = 1 + self._constants.steadiness * (weights - 1)
        if cap is not None:
            weights = (self._constants.factor * weights).clamp(max=cap)
        return weights


def build_map(config: Any, standard: bool, device: torch.device, drifts: bool = False) -> WeightMap:
    """Returns the map that `--dwm-map` names.

    Args:
        config: settings, defaults resolved.
        standard: see `SigmoidMap`.
        drifts: see `SigmoidMap`.
        device: where scores live.
    """
    guards = Guards.from_config(config)
    if config.map == "softmax":
        return SoftmaxMap(config.temperature, guards)
    return SigmoidMap(config.slope, guards, standard, device, drifts)
