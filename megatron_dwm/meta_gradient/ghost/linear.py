"""Inner products of linear layers: whole, tensor-parallel, and fused with a norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_dwm.core import collectives
from megatron_dwm.meta_gradient.ghost.norms import normaliser
from megatron_dwm.meta_gradient.ghost.rule import (
    ByRow,
    Call,
    Direction,
    SampleMap,
    Share,
    bias_dot,
    own_part,
    tensor_parallel_group,
)


def linear_dot(
    x: torch.Tensor, grad: torch.Tensor, v: torch.Tensor, samples: SampleMap
) -> torch.Tensor:
    """Returns `sum_t <grad_t, V x_t>` for each sample, through the smaller product.

    Args:
        x: `[s, b, in]`, or `[rows, in]`.
        grad: `[s, b, out]`, or `[rows, out]`.
        v: `[out, in]`.
        samples: which sample each row belongs to.
    """
    if v.size(0) < v.size(1):
        return samples.dot(_matmul(x, v.t().to(x.dtype)), grad)
    return samples.dot(_matmul(grad, v.to(grad.dtype)), x)


def _matmul(a: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    # As one flat product: torch does not fold every 3-D layout into one.
    return (a.reshape(-1, a.size(-1)) @ matrix).view(*a.shape[:-1], matrix.size(1))


def column_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Column-parallel linear layer (QKV, the MLP's first, the output layer): `[out / tp, in]`."""
    module, group, x = call.module, tensor_parallel_group(call.module), call.x
    if getattr(module, "gather_output", False):
        grad = own_part(grad, group)
    if _spreads_tokens(module):
        x = collectives.gather_sequence(x, group)
    return _linear(call, x, grad, v) + bias_dot(call, grad, v, share)


def row_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Row-parallel linear layer (attention's and the MLP's last): `[out, in / tp]`."""
    module, group, x = call.module, tensor_parallel_group(call.module), call.x
    # The bias is replicated, so its term comes before the tokens of other ranks are gathered.
    bias = bias_dot(call, grad, v, share)
    if not getattr(module, "input_is_parallel", True):
        x = own_part(x, group)
    if _spreads_tokens(module):
        grad = collectives.gather_sequence(grad, group)
    return _linear(call, x, grad, v) + bias


def _spreads_tokens(module: Any) -> bool:
    """Whether tensor-parallel ranks have different tokens outside the layer, and it gathers them.

    An expert's tokens are gathered before it is called.
    """
    spread = module.sequence_parallel and tensor_parallel_group(module) is not None
    return spread and not getattr(module, "explicit_expert_comm", False)


def norm_column_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Transformer Engine's norm fused with a column-parallel linear layer.

    The norm's output is not available, so it is recomputed, and the gradient that reaches it is
    `W^T grad`. Each tensor-parallel rank sees its own columns of W: every term is a partial sum.
    """
    module, group = call.module, tensor_parallel_group(call.module)
    gamma, beta = module.layer_norm_weight, getattr(module, "layer_norm_bias", None)
    offset = 1.0 if getattr(module, "zero_centered_gamma", False) else 0.0
    normalise = normaliser(module.normalization, call.x, module.eps)
    y = normalise(gamma + offset, beta)
    v_gamma, v_beta = v(gamma), None if beta is None else v(beta)
    by_norm = None
    if v_gamma is not None or v_beta is not None:
        zero = torch.zeros_like(gamma)
        by_norm = normalise(zero if v_gamma is None else v_gamma, v_beta)
    if _spreads_tokens(module):
        y = collectives.gather_sequence(y, group)
        by_norm = None if by_norm is None else collectives.gather_sequence(by_norm, group)
    total = _linear(call, y, grad, v) + bias_dot(call, grad, v, share)
    if by_norm is not None:
        total = total + linear_dot(by_norm, grad, call.weight.detach(), call.samples)
    return total


def plain_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """A linear layer that tensor-parallel ranks replicate."""
    part = share(call.weight)
    weight = _linear(call, call.x, grad, v) * part if part else call.samples.none(grad)
    return weight + bias_dot(call, grad, v, share)


def grouped_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Transformer Engine's grouped linear layer: experts' weights `[out, in]`, `weight0` and so on.

    Its second input is the number of rows of each expert; rows are in the experts' order.
    """
    module, rows, total = call.module, call.samples, call.samples.none(grad)
    assert isinstance(rows, ByRow)
    sizes = [int(size) for size in call.inputs[1]]
    first = 0
    for k, size in enumerate(sizes):
        part = slice(first, first + size)
        first += size
        own = replace(call, weight=getattr(module, f"weight{k}"), samples=rows.of(part))
        total = total + _linear(own, call.x[part], grad[part], v)
        total = total + bias_dot(own, grad[part], v, share, f"bias{k}")
    return total


def _linear(call: Call, x: torch.Tensor, grad: torch.Tensor, v: Direction) -> torch.Tensor:
    direction = v(call.weight)
    return (
        call.samples.none(grad)
        if direction is None
        else linear_dot(x, grad, direction, call.samples)
    )
