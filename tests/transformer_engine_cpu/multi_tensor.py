"""Functions of the extension over lists of tensors: those of Megatron's optimizers."""

from __future__ import annotations

from typing import Any

import torch

Lists = list[list[torch.Tensor]]


def multi_tensor_scale(chunk: int, noop: torch.Tensor, lists: Lists, scale: Any) -> None:
    """Writes the first list's tensors, scaled, to the second's."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


multi_tensor_scale_tensor = multi_tensor_scale


def multi_tensor_l2norm(
    chunk: int, noop: torch.Tensor, lists: Lists, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the norm `[1]` of all tensors and, if asked for, of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.zeros(0)


def multi_tensor_adam(
    chunk: int,
    noop: torch.Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Takes a step of Adam, or AdamW where `decoupled`, in float32.

    Lists: gradients, parameters, both moments and, where parameters are of 16 bits, their float32
    masters.
    """
    c1, c2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    masters = lists[4] if len(lists) > 4 else [None] * len(lists[0])
    for grad, parameter, mean, square, master in zip(*lists[:4], masters, strict=True):
        g, w = grad.float(), (parameter if master is None else master).float()
        if not decoupled:
            g = g + weight_decay * w
        m = mean.float().mul_(beta1).add_(g, alpha=1 - beta1)
        v = square.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
        mean.copy_(m)
        square.copy_(v)
        update = (m / c1) / ((v / c2).sqrt() + eps)
        w = w - lr * (update + (weight_decay * w if decoupled else 0.0))
        parameter.copy_(w)
        if master is not None:
            master.copy_(w)
