"""Scores to weights over the global batch, and what the weights look like.

Shapes: `N` samples in the global batch, `n` of them on this data-parallel rank.
"""

from __future__ import annotations

import math

import torch

from megatron_dwm.errors import DWMError


def weights_from_scores(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns `w = N * softmax(s / tau)`: mean 1, so that equal scores are stock training.

    Args:
        scores: `[N]` scores of the whole global batch, float32.
        temperature: tau > 0.

    Returns:
        `[N]` weights, differentiable in the scores.

    Raises:
        DWMError: a score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise DWMError(
            "the weighting model gave a score that is not finite; lower --dwm-backbone-lr or "
            "--dwm-head-lr, or resume from an earlier checkpoint",
            this_rank_only=True,
        )
    return scores.numel() * torch.softmax(scores.float() / temperature, dim=0)


def score_gradient(
    scores: torch.Tensor, influence: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Returns `dL_meta/ds` from `c = dL_meta/dw` through the batch softmax.

    `dL/ds_i = (w_i / tau) * (c_i - (1/N) sum_j w_j c_j)`, the softmax Jacobian times `c`.

    Args:
        scores: `[N]` scores of the global batch.
        influence: `[N]` meta-gradient `c_i` by sample, in the scores' order.
        temperature: tau of `weights_from_scores`.

    Returns:
        `[N]` gradient of the meta loss by score.
    """
    weights = weights_from_scores(scores, temperature)
    centred = influence - (weights * influence).sum() / scores.numel()
    return weights / temperature * centred


def shuffled(weights: torch.Tensor, seed: int, iteration: int) -> torch.Tensor:
    """Returns the weights in a random order: the control with the same histogram.

    Args:
        weights: `[N]` weights of the global batch.
        seed: the run's seed.
        iteration: the step, so that every step has its own order on every rank alike.
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
