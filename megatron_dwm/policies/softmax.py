"""Softmax of scores to weights over the global batch, and statistics of weights.

Shapes: `N` samples in the global batch, `n` of them on this data-parallel rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_dwm.policies.guarding import GuardedWeights, Guards, guarded_weights

NO_GUARDS = Guards()


@dataclass
class BatchWeights:
    """The weights of a global batch's scores, and what the guards did.

    Attributes:
        scores: `[N]`, as computed by the DWM.
        weights: `[N]` float32 with mean 1; all 1 if a score is bad.
        bad: scalar bool tensor, whether a score, or the resulting weight, is NaN or infinite.
        temperature: the configured temperature.
        raised: scalar tensor, the temperature that `--dwm-min-effective-samples` gave, or None.
        capped: scalar tensor, the number of samples at `--dwm-max-weight`, or None.
    """

    scores: torch.Tensor
    weights: torch.Tensor
    bad: torch.Tensor
    temperature: float
    raised: torch.Tensor | None = None
    capped: torch.Tensor | None = None


def weights_from_scores(
    scores: torch.Tensor, temperature: float, guards: Guards = NO_GUARDS
) -> torch.Tensor:
    """Returns `w = N * softmax(s / tau)`: mean 1, so that equal scores are stock training.

    Args:
        scores: `[N]` scores of the whole global batch, float32.
        temperature: tau > 0.
        guards: guards on the weights, see `guarding`.

    Returns:
        `[N]` float32 weights, differentiable in the scores. For scores that are NaN or infinite see
        `batch_weights`.
    """
    if guards.off:
        return scores.numel() * torch.softmax(scores.float() / temperature, dim=0)
    return guarded_weights(scores, temperature, guards).weights.float()


@torch.no_grad()
def batch_weights(
    scores: torch.Tensor, temperature: float, guards: Guards = NO_GUARDS
) -> BatchWeights:
    """Returns the weights of a batch that are safe to train with, without waiting for the device.

    Args:
        scores: `[N]` scores of the whole global batch.
        temperature: tau > 0.
        guards: guards on the weights.
    """
    if guards.off:
        found = GuardedWeights(weights_from_scores(scores, temperature))
    else:
        found = guarded_weights(scores, temperature, guards)
    weights = found.weights.float()
    bad = ~(torch.isfinite(scores).all() & torch.isfinite(weights).all())
    weights = uniform_where(bad, weights)
    return BatchWeights(scores, weights, bad, temperature, found.temperature, found.capped)


def uniform_where(bad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the weights `[N]`, or ones if the scalar `bad` is true, without a device sync."""
    return torch.where(bad, torch.ones_like(weights), weights)


def score_gradient(
    scores: torch.Tensor,
    influence: torch.Tensor,
    temperature: float,
    guards: Guards = NO_GUARDS,
) -> torch.Tensor:
    """Returns `dL_meta/ds` from `c = dL_meta/dw` through the weights that were trained with.

    Without guards `dL/ds_i = (w_i / tau) * (c_i - (1/N) sum_j w_j c_j)`, the softmax Jacobian times
    `c`. With guards it is torch's derivative of the guarded weights, including that of a raised
    temperature.

    Args:
        scores: `[N]` finite scores of the global batch.
        influence: `[N]` meta-gradient `c_i` by sample, in the scores' order.
        temperature: tau of `weights_from_scores`.
        guards: those of `weights_from_scores`.

    Returns:
        `[N]` gradient of the meta loss in the scores, in the scores' precision.
    """
    if guards.off:
        weights = weights_from_scores(scores, temperature)
        centred = influence - (weights * influence).sum() / scores.numel()
        return weights / temperature * centred
    with torch.enable_grad():
        s = scores.detach().double().requires_grad_()
        weights = guarded_weights(s, temperature, guards).weights
        # Centred: a constant in c changes nothing, but would cost precision.
        centred = influence.double() - (weights.detach() * influence).mean()
        (gradient,) = torch.autograd.grad((weights * centred).sum(), s)
    return gradient.to(scores.dtype)


def shuffled(weights: torch.Tensor, seed: int, iteration: int) -> torch.Tensor:
    """Returns the weights in a random order: the control with the same histogram.

    Args:
        weights: `[N]` weights of the global batch.
        seed: the run's seed.
        iteration: the step; every step has its own order, the same on every rank.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    order = torch.randperm(weights.numel(), generator=generator)
    return weights[order.to(weights.device)]


def weight_statistics(weights: torch.Tensor) -> dict[str, float]:
    """Returns entropy, effective sample size and extremes of a batch's weights.

    Args:
        weights: `[N]` weights with mean 1.

    Returns:
        `entropy`: of `p = w / N`, in nats, over `log N`, so 1 is uniform;
        `effective_sample_size`: `(sum w)^2 / sum w^2` over N, so 1 is uniform;
        `max_weight` and `min_weight`.
    """
    weights = weights.double()
    count = weights.numel()
    p = weights / weights.sum()
    entropy = -(p * p.clamp_min(1e-300).log()).sum().item()
    return {
        "entropy": entropy / math.log(count) if count > 1 else 1.0,
        "effective_sample_size": (weights.sum() ** 2 / (weights**2).sum()).item() / count,
        "max_weight": weights.max().item(),
        "min_weight": weights.min().item(),
    }
