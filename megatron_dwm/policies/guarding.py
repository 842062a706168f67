"""Guards against weights that collapse onto a few samples; all off by default.

They are applied in this order, each to the result of the one before:

    floor   tau' >= tau, the smallest with (sum w)^2 / (N sum w^2) >= F for w = N softmax(s / tau')
    mix     w' = (1 - A) w + A
    cap     w'' = min(W, a w') with the a that makes the mean 1 (water-filling)

Mix and cap take from the largest weights and give to smaller ones, so they can only raise the
effective sample size that the floor ensures. All keep the mean at 1 and the order of the samples.
All are differentiable functions of the scores (the cap except where a weight reaches it), so the
DWM's gradient goes through them.

Computed in float64, on the device, without waiting for it. Shapes: `N` samples in the global batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_dwm.config import DWMConfig

# The floor's temperature is searched on grids of this many intervals, each within one interval of
# the previous grid; then Newton's method makes it exact.
_INTERVALS, _GRIDS, _NEWTON_STEPS = 32, 4, 2


@dataclass(frozen=True)
class Guards:
    """Which guards are on.

    Attributes:
        min_effective_samples: F, the floor on the effective sample size over N; None: off.
        uniform_mix: A, the share of uniform weights; 0: off.
        max_weight: W, the cap on a weight; None: off.
    """

    min_effective_samples: float | None = None
    uniform_mix: float = 0.0
    max_weight: float | None = None

    @classmethod
    def from_config(cls, config: DWMConfig) -> Guards:
        """Reads them from the settings."""
        return cls(config.min_effective_samples, config.uniform_mix, config.max_weight)

    @property
    def off(self) -> bool:
        """Whether no guard is on."""
        return self == Guards()


@dataclass
class GuardedWeights:
    """Weights, and what the guards did to them.

    Attributes:
        weights: `[N]` with mean 1, differentiable in the scores.
        temperature: scalar tensor, tau' of the batch; None without a floor.
        capped: scalar tensor, the number of samples at the cap; None without a cap.
    """

    weights: torch.Tensor
    temperature: torch.Tensor | None = None
    capped: torch.Tensor | None = None


def guarded_weights(scores: torch.Tensor, temperature: float, guards: Guards) -> GuardedWeights:
    """Returns the guarded weights.

    Args:
        scores: `[N]` finite scores of the whole global batch.
        temperature: tau > 0.
        guards: which are on.

    Returns:
        Float64 weights, `N softmax(s / tau)` where no guard acts.
    """
    s = scores.double()
    beta = torch.as_tensor(1.0 / temperature, dtype=s.dtype, device=s.device)
    raised = None
    if guards.min_effective_samples is not None:
        beta = _inverse_temperature(s, beta, guards.min_effective_samples)
        # Exactly tau if the floor did not act, so that one can tell whether it did.
        raised = torch.where(beta < 1.0 / temperature, 1.0 / beta, temperature).detach()
    # Shifted, because a common part of the scores would cost precision.
    log_weights = torch.log_softmax((s - s.detach().max()) * beta, dim=0) + math.log(s.numel())
    if guards.uniform_mix > 0:
        share = torch.full_like(log_weights, math.log(guards.uniform_mix))
        log_weights = torch.logaddexp(log_weights + math.log1p(-guards.uniform_mix), share)
    if guards.max_weight is None:
        return GuardedWeights(log_weights.exp(), raised)
    weights, capped = _capped(log_weights, guards.max_weight)
    return GuardedWeights(weights, raised, capped)


def _log_effective_size(s: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Returns `log((sum p)^2 / (N sum p^2))` of `p = softmax(beta s)` for each beta `[...]`."""
    # A common shift changes nothing but the loss of precision.
    scaled = beta.unsqueeze(-1) * (s - s.detach().max())
    twice = torch.logsumexp(2 * scaled, dim=-1)
    return 2 * torch.logsumexp(scaled, dim=-1) - twice - math.log(s.numel())


def _inverse_temperature(s: torch.Tensor, highest: torch.Tensor, floor: float) -> torch.Tensor:
    """Returns the largest `beta <= highest` at which the floor holds, differentiable in the scores.

    The logarithm q of the effective size falls with beta:
    `dq/dbeta = 2 (E_p[s] - E_pp[s])`, p = softmax(beta s), pp = softmax(2 beta s). It is at least
    `1 / cosh^2(beta R / 2)` for scores within a range R (Kantorovich), which is where the search
    starts. At the solution, one Newton step with the slope held fixed changes nothing, and its
    derivative is the implicit one: `dbeta/ds = -(dq/ds) / (dq/dbeta)`.
    """
    target = math.log(floor)
    fixed = s.detach()
    spread = (fixed.max() - fixed.min()).clamp_min(torch.finfo(s.dtype).tiny)
    acts = _log_effective_size(fixed, highest) < target
    # Bounds of log beta. If the floor does not act, both are harmless and unused.
    high = highest.log().view(1)
    low = torch.minimum((2 * math.acosh(floor**-0.5) / spread).log().view(1), high)
    steps = torch.arange(_INTERVALS + 1, dtype=s.dtype, device=s.device) / _INTERVALS
    for _ in range(_GRIDS):
        grid = torch.lerp(low, high, steps)
        holds = _log_effective_size(fixed, grid.exp()) >= target
        k = (holds.sum().view(1) - 1).clamp(0, _INTERVALS - 1)
        low, high = grid.gather(0, k), grid.gather(0, k + 1)
    beta = torch.where(acts, low.exp().squeeze(0), highest)
    for _ in range(_NEWTON_STEPS):
        beta = beta - _newton_step(fixed, beta, target, acts)
    return beta - _newton_step(s, beta, target, acts)


def _newton_step(
    s: torch.Tensor, beta: torch.Tensor, target: float, acts: torch.Tensor
) -> torch.Tensor:
    """Returns `(q - target) / (dq/dbeta)`, the slope held fixed; 0 if the floor does not act."""
    fixed = s.detach() - s.detach().max()
    first = (torch.softmax(beta * fixed, dim=0) * fixed).sum()
    second = (torch.softmax(2 * beta * fixed, dim=0) * fixed).sum()
    slope = torch.where(acts, 2 * (first - second), -torch.ones_like(first))
    step = (_log_effective_size(s, beta) - target) / slope
    return torch.where(acts, step, torch.zeros_like(step))


def _capped(log_weights: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `min(W, a w)` with mean 1, and the number of weights at W.

    The k largest are at the cap, with the smallest k for which the others, scaled to the rest of
    the sum, stay within it. As W > 1 there is such a k: the last share is at most W.

    Args:
        log_weights: `[N]` logarithms of weights with mean 1; weights that underflow still get their
            share.
        cap: W > 1.
    """
    count = log_weights.numel()
    ordered, order = log_weights.detach().sort(descending=True)
    rest = ordered.flip(0).logcumsumexp(0).flip(0)  # log of the sum from the k-th on
    k = torch.arange(count, dtype=log_weights.dtype, device=log_weights.device)
    left = (count - cap * k).clamp_min(0)
    fits = ordered - rest + left.log() <= math.log(cap)
    at_cap = (~fits).sum().to(log_weights.dtype)
    mask = torch.zeros_like(fits).scatter(0, order, k < at_cap)
    others = log_weights.masked_fill(mask, -math.inf)
    scaled = (count - cap * at_cap) * torch.exp(others - torch.logsumexp(others, dim=0))
    return torch.where(mask, cap, scaled), at_cap
