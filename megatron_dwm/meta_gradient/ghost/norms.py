"""Inner products of norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_dwm.meta_gradient.ghost.rule import (
    Call,
    Direction,
    Share,
    bias_dot,
)


def norm(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """LayerNorm and RMSNorm, of hidden states `[s, b, h]` or of heads `[s, b, heads, d]`."""
    module, total = call.module, call.samples.none(grad)
    weight, bias = call.weight, getattr(module, "bias", None)
    eps = module.eps if module.eps is not None else torch.finfo(call.x.dtype).eps
    kind = "RMSNorm" if "RMSNorm" in type(module).__name__ else "LayerNorm"
    normalise = normaliser(kind, call.x, eps)
    v_weight, part = v(weight), share(weight)
    if v_weight is not None and part:
        total = total + part * call.samples.dot(normalise(v_weight, None), grad)
    if bias is not None:
        total = total + bias_dot(call, grad, v, share)
    return total


def normaliser(kind: str, x: torch.Tensor, eps: float) -> Callable[..., torch.Tensor]:
    """Returns the norm of x as a function of its weight and bias."""

    def layer_norm(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, eps)

    def rms_norm(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)

    return rms_norm if kind == "RMSNorm" else layer_norm
