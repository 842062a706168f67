"""Derivatives of an optimizer's update with respect to its gradient: pure functions.

One step is `theta+ = theta + U(G)`. `U` acts elementwise, so its Jacobian is the diagonal
returned here; clipping by the global norm comes on top and is not diagonal
(`clip_projection`). Optimizer states are those *after* the step. Everything is computed in the
dtype of the inputs.

Sources: the update rules of `torch.optim.SGD`, `Adam` and `AdamW`, differentiated by hand.
"""

from __future__ import annotations

import torch


def sgd(lr: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    """Returns `dU/dG` of SGD: `-lr`, times `1 - dampening` with momentum, `1 + mu` for Nesterov.

    The momentum buffer is `mu * old + (1 - dampening) * G`. (The first step, which torch starts
    from `G` itself without dampening, is not treated separately: Megatron's SGD has no dampening.)
    Weight decay adds a term that does not depend on G.
    """
    if momentum == 0.0:
        return -lr
    factor = 1.0 - dampening
    return -lr * (1.0 + momentum * factor) if nesterov else -lr * factor


def adam(
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> torch.Tensor:
    """Returns the diagonal `dU/dG` of Adam and AdamW.

    `-lr [ (1-b1)/(1-b1^t) / (sqrt(vhat)+eps)
           - mhat (1-b2) G / ((1-b2^t) sqrt(vhat) (sqrt(vhat)+eps)^2) ]`

    Decoupled weight decay does not depend on G. With L2 decay (Adam), pass the gradient including
    the decay term.

    Args:
        grad: the gradient that entered the moments, any shape.
        exp_avg: first moment after the step, same shape.
        exp_avg_sq: second moment after the step, same shape.
        step: t, counted from 1.
        lr: learning rate of the step.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's epsilon.

    Returns:
        A tensor of the same shape.
    """
    correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
    root = (exp_avg_sq / correction2).sqrt()
    denominator = root + eps
    # Where the second moment is 0, so are G and the first moment: the second term vanishes.
    # Divided step by step, because the denominator's square can underflow.
    ratio = torch.where(root > 0, grad / root, torch.zeros_like(root))
    through_root = exp_avg / correction1 / denominator * ((1.0 - beta2) / correction2) * ratio
    return -lr / denominator * ((1.0 - beta1) / correction1 - through_root)


def adam_expected(
    exp_avg_sq: torch.Tensor, steps: int, lr: float, beta1: float, beta2: float, eps: float
) -> torch.Tensor:
    """Returns the diagonal of Adam's *next* step, as far as known before its gradient.

    `-lr (1-b1)/(1-b1^(t+1)) / (sqrt(vhat_t)+eps)`: it uses the current second moment, a frozen
    preconditioner. It is 0 where no gradient was ever seen: the effect of a first gradient does not
    have this form.

    Args:
        exp_avg_sq: second moment after `steps` steps, any shape.
        steps: t >= 1.
        lr: learning rate of the next step.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's epsilon.
    """
    root = (exp_avg_sq / (1.0 - beta2**steps)).sqrt()
    diagonal = -lr * (1.0 - beta1) / (1.0 - beta1 ** (steps + 1)) / (root + eps)
    return torch.where(root > 0, diagonal, torch.zeros_like(diagonal))


def adam_update(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> torch.Tensor:
    """Returns what Adam added to the parameter: `-lr mhat / (sqrt(vhat) + eps)`.

    Arguments as for `adam`; decoupled weight decay is not included.
    """
    first = exp_avg / (1.0 - beta1**step)
    root = (exp_avg_sq / (1.0 - beta2**step)).sqrt()
    return -lr * first / (root + eps)


def clip_coefficient(grad_norm: float, max_norm: float) -> float:
    """Returns Megatron's clip factor: `min(1, max_norm / (norm + 1e-6))`, 1 when clipping is off.

    Args:
        grad_norm: global norm before clipping.
        max_norm: `--clip-grad`; 0 switches clipping off.
    """
    if max_norm <= 0.0:
        return 1.0
    return min(1.0, max_norm / (grad_norm + 1.0e-6))


def clip_projection(grad_norm: float, max_norm: float) -> tuple[float, float]:
    """Returns `(a, b)` so that the transposed Jacobian of clipping is `u -> a u - b <G', u> G'`.

    With `G' = k G`, `k = C / (|G| + d)` and `d = 1e-6`:
    `dG'/dG = k I - k / (|G| (|G| + d)) G G^T`. In terms of the clipped gradient
    `G' G'^T = k^2 G G^T`, so `b = 1 / (k |G| (|G| + d))`; inactive clipping gives `(1, 0)`.

    Args:
        grad_norm: global norm before clipping.
        max_norm: `--clip-grad`.
    """
    k = clip_coefficient(grad_norm, max_norm)
    if k >= 1.0:
        return 1.0, 0.0
    return k, 1.0 / (k * grad_norm * (grad_norm + 1.0e-6))
