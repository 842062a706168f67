"""Softmaxes of the extension, over the last dimension of scores `[b, heads, s_q, s_k]`."""

from __future__ import annotations

import torch

MASKED = -10000.0


def scaled_softmax_forward(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax of scaled scores."""
    return torch.softmax(x.float() * scale, -1).to(x.dtype)


def scaled_masked_softmax_forward(
    x: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax of scaled scores; where the mask is 1 a position is not seen."""
    return torch.softmax((x.float() * scale).masked_fill(mask.bool(), MASKED), -1).to(x.dtype)


def scaled_softmax_backward(grad: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """Gradient of the scores from the softmax y; that of masked ones is 0 as y is."""
    y32, grad = y.float(), grad.float()
    return (scale * y32 * (grad - (grad * y32).sum(-1, True))).to(y.dtype)


scaled_masked_softmax_backward = scaled_softmax_backward
