"""Norms of the extension: LayerNorm and RMSNorm over the last dimension of `[t, h]`.

All arithmetic is in float32. With `zero_centered` the weight is the difference from 1. Backward
functions return the gradients of x and of the weight (and bias).
"""

from __future__ import annotations

from typing import Any

import torch

from tests.transformer_engine_cpu.enumerations import torch_dtype
from tests.transformer_engine_cpu.unwritten import refuse


def layernorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the norm, the mean `[t]` and the inverse deviation `[t]`."""
    refuse("a norm", quantizer=quantizer)
    f = x.float()
    mean = f.mean(-1)
    centred = f - mean[:, None]
    inverse = torch.rsqrt(centred.pow(2).mean(-1) + eps)
    y = centred * inverse[:, None] * _gamma(weight, zero_centered) + bias.float()
    return _written(y, out, out_dtype), mean, inverse


def layernorm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias."""
    normal, dy = (x.float() - mean[:, None]) * inverse[:, None], grad.float()
    g = dy * _gamma(weight, zero_centered)
    dx = (g - g.mean(-1, True) - normal * (g * normal).mean(-1, True)) * inverse[:, None]
    return dx.to(x.dtype), (dy * normal).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype)


def rmsnorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Returns the norm, nothing, and the inverse root mean square `[t]`."""
    refuse("a norm", quantizer=quantizer)
    f = x.float()
    inverse = torch.rsqrt(f.pow(2).mean(-1) + eps)
    y = f * inverse[:, None] * _gamma(weight, zero_centered)
    return _written(y, out, out_dtype), None, inverse


def rmsnorm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight."""
    normal, dy = x.float() * inverse[:, None], grad.float()
    g = dy * _gamma(weight, zero_centered)
    dx = (g - normal * (g * normal).mean(-1, True)) * inverse[:, None]
    return dx.to(x.dtype), (dy * normal).sum(0).to(weight.dtype)


def rmsnorm_bwd_add(
    grad: torch.Tensor,
    x: torch.Tensor,
    add: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rmsnorm_bwd`, with the gradient of a residual connection added to that of x."""
    dx, dweight = rmsnorm_bwd(grad, x, inverse, weight, sm_margin, zero_centered)
    return dx + add, dweight


def _gamma(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + (1.0 if zero_centered else 0.0)


def _written(y: torch.Tensor, out: torch.Tensor | None, out_dtype: Any) -> torch.Tensor:
    y = y.to(torch_dtype(out_dtype))
    return y if out is None else out.copy_(y)
