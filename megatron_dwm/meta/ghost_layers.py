"""Inner products `<v, g_i>` of one layer, from its input and the gradient of its output.

Every layer here is linear in its own parameters, so `<v, dl_i/dp>` is the gradient of its output
times what the layer would give with v in place of p, summed over the sample's tokens: for a linear
layer `sum_t <grad_out_t, V x_t>`. No per-sample gradient is ever formed. Source: ghost dot
products (In-Run Data Shapley, arXiv 2406.11011), here with an arbitrary direction v, for every
layer of GPT and Llama models, and under tensor and sequence parallelism.

Shapes: s tokens, b samples of a micro-batch; inside the transformer `[s, b, ...]`, in the
embeddings `[b, s, h]`. Under sequence parallelism a norm sees `[s / tp, b, h]`.

A formula is a function `(call, grad, v, share) -> [b]` float32, this rank's part of `<v, g_i>`:
`call` is the layer's call, `grad` the gradient of its (first) output, `v(parameter)` the direction
in the parameter's shape or None where it is not trained, `share(parameter)` how much the term of
a parameter that tensor-parallel ranks replicate counts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

from megatron_dwm.meta import collectives

Direction = Callable[[torch.nn.Parameter], torch.Tensor | None]
Share = Callable[[torch.nn.Parameter], float]


@dataclass
class Call:
    """One forward call of a layer.

    Attributes:
        module: the layer.
        x: its first input.
        weight: the weight that it used; not always its own (tied embeddings).
    """

    module: Any
    x: torch.Tensor
    weight: torch.nn.Parameter


Formula = Callable[[Call, torch.Tensor, Direction, Share], torch.Tensor]


def formula_of(module: torch.nn.Module) -> Formula | None:
    """Returns the formula of a layer, or None for a kind that is not known.

    By exact type: a subclass may compute something else. Layers of Transformer Engine and Apex
    go by their package and name, as those need not be installed.
    """
    kind = type(module)
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    return _BY_NAME.get(kind.__name__) if kind.__module__.split(".")[0] in _PACKAGES else None


def batch_dim_of(module: torch.nn.Module) -> int:
    """Returns which dimension of a layer's output counts samples."""
    embedding = isinstance(module, VocabParallelEmbedding | torch.nn.Embedding)
    return 0 if embedding and not getattr(module, "reduce_scatter_embeddings", False) else 1


def per_sample_dot(a: torch.Tensor, b: torch.Tensor, batch_dim: int = 1) -> torch.Tensor:
    """Returns the inner product over all dimensions but `batch_dim`, float32."""
    return (a.float() * b).sum([d for d in range(a.dim()) if d != batch_dim])


def linear_dot(x: torch.Tensor, grad: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Returns `sum_t <grad_t, V x_t>` for each sample, by way of the smaller product.

    Args:
        x: `[s, b, in]`.
        grad: `[s, b, out]`.
        v: `[out, in]`.
    """
    if v.size(0) < v.size(1):
        return per_sample_dot(_matmul(x, v.t().to(x.dtype)), grad)
    return per_sample_dot(_matmul(grad, v.to(grad.dtype)), x)


def _matmul(a: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    # As one flat product: torch does not fold every 3-D layout into one.
    return (a.reshape(-1, a.size(-1)) @ matrix).view(*a.shape[:-1], matrix.size(1))


def column_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Column-parallel linear layer (QKV, the MLP's first, the output layer): `[out / tp, in]`."""
    module, group, x = call.module, _tp_group(call.module), call.x
    if getattr(module, "gather_output", False):
        grad = _own_part(grad, group)
    if module.sequence_parallel and group is not None:
        x = collectives.gather_sequence(x, group)
    return _linear(call, x, grad, v) + _bias(module, grad, v, share)


def row_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Row-parallel linear layer (attention's and the MLP's last): `[out, in / tp]`."""
    module, group, x = call.module, _tp_group(call.module), call.x
    # The bias is replicated: before the tokens of other ranks are fetched.
    bias = _bias(module, grad, v, share)
    if not getattr(module, "input_is_parallel", True):
        x = _own_part(x, group)
    if module.sequence_parallel and group is not None:
        grad = collectives.gather_sequence(grad, group)
    return _linear(call, x, grad, v) + bias


def norm_column_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Transformer Engine's norm fused with a column-parallel linear layer.

    The norm's output is not to be had, so it is computed again, and the gradient that reaches it is
    `W^T grad`. Each tensor-parallel rank sees its own columns of W: every term is a part.
    """
    module, group = call.module, _tp_group(call.module)
    gamma, beta = module.layer_norm_weight, getattr(module, "layer_norm_bias", None)
    offset = 1.0 if getattr(module, "zero_centered_gamma", False) else 0.0
    normalise = _normaliser(module.normalization, call.x, module.eps)
    y = normalise(gamma + offset, beta)
    v_gamma, v_beta = v(gamma), None if beta is None else v(beta)
    by_norm = None
    if v_gamma is not None or v_beta is not None:
        zero = torch.zeros_like(gamma)
        by_norm = normalise(zero if v_gamma is None else v_gamma, v_beta)
    if module.sequence_parallel and group is not None:
        y = collectives.gather_sequence(y, group)
        by_norm = None if by_norm is None else collectives.gather_sequence(by_norm, group)
    total = _linear(call, y, grad, v) + _bias(module, grad, v, share)
    if by_norm is not None:
        total = total + linear_dot(by_norm, grad, call.weight.detach())
    return total


def plain_linear(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """A linear layer that tensor-parallel ranks replicate."""
    part = share(call.weight)
    weight = _linear(call, call.x, grad, v) * part if part else _zeros(grad, 1)
    return weight + _bias(call.module, grad, v, share)


def norm(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """LayerNorm and RMSNorm, of hidden states `[s, b, h]` or of heads `[s, b, heads, d]`."""
    module, total = call.module, _zeros(grad, 1)
    weight, bias = call.weight, getattr(module, "bias", None)
    eps = module.eps if module.eps is not None else torch.finfo(call.x.dtype).eps
    kind = "RMSNorm" if "RMSNorm" in type(module).__name__ else "LayerNorm"
    normalise = _normaliser(kind, call.x, eps)
    v_weight, part = v(weight), share(weight)
    if v_weight is not None and part:
        total = total + part * per_sample_dot(normalise(v_weight, None), grad)
    if bias is not None:
        total = total + _bias(module, grad, v, share)
    return total


def vocab_embedding(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Word embeddings, of which each tensor-parallel rank holds a range of ids."""
    module, ids, direction = call.module, call.x, v(call.weight)
    batch_dim = batch_dim_of(module)
    if direction is None:
        return _zeros(grad, batch_dim)
    group = _tp_group(module)
    if batch_dim == 1:  # scattered over the tokens, [s / tp, b, h]
        if group is not None:
            grad = collectives.gather_sequence(grad, group)
        ids = ids.t()
    first, last = module.vocab_start_index, module.vocab_end_index
    here = (ids >= first) & (ids < last)
    rows = F.embedding((ids - first).masked_fill(~here, 0), direction)
    rows = rows.masked_fill(~here.unsqueeze(-1), 0.0)
    return per_sample_dot(rows, grad, batch_dim)


def position_embedding(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Learned positions, replicated over tensor parallelism."""
    direction, part = v(call.weight), share(call.weight)
    if direction is None or not part:
        return _zeros(grad, 0)
    return part * per_sample_dot(F.embedding(call.x, direction), grad, 0)


def _linear(call: Call, x: torch.Tensor, grad: torch.Tensor, v: Direction) -> torch.Tensor:
    direction = v(call.weight)
    return _zeros(grad, 1) if direction is None else linear_dot(x, grad, direction)


def _bias(module: Any, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """A bias that is added later, to the layer's output, has the output's own gradient."""
    bias = getattr(module, "bias", None)
    # Transformer Engine keeps an empty tensor where there is no bias.
    direction = v(bias) if isinstance(bias, torch.nn.Parameter) and bias.numel() else None
    part = 0.0 if direction is None else share(bias)
    if direction is None or not part:
        return _zeros(grad, 1)
    return part * (grad.float() * direction).sum([d for d in range(grad.dim()) if d != 1])


def _normaliser(kind: str, x: torch.Tensor, eps: float) -> Callable[..., torch.Tensor]:
    """Returns the norm of x as a function of its weight and bias."""

    def layer_norm(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, eps)

    def rms_norm(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)

    return rms_norm if kind == "RMSNorm" else layer_norm


def _zeros(grad: torch.Tensor, batch_dim: int) -> torch.Tensor:
    return torch.zeros(grad.size(batch_dim), dtype=torch.float32, device=grad.device)


def _tp_group(module: Any) -> Any:
    group = getattr(module, "tp_group", None)
    return None if group is None or group.size() == 1 else group


def _own_part(whole: torch.Tensor, group: Any) -> torch.Tensor:
    return whole if group is None else whole.chunk(group.size(), dim=-1)[group.rank()]


_BY_TYPE: dict[type, Formula] = {
    ColumnParallelLinear: column_linear,
    RowParallelLinear: row_linear,
    VocabParallelEmbedding: vocab_embedding,
    torch.nn.Embedding: position_embedding,
    torch.nn.Linear: plain_linear,
    torch.nn.LayerNorm: norm,
    torch.nn.RMSNorm: norm,
}
_PACKAGES = ("megatron", "transformer_engine", "apex")
_BY_NAME: dict[str, Formula] = {
    "TEColumnParallelLinear": column_linear,
    "TELMHeadColumnParallelLinear": column_linear,
    "TERowParallelLinear": row_linear,
    "TELayerNormColumnParallelLinear": norm_column_linear,
    "LayerNorm": norm,
    "RMSNorm": norm,
    "FusedLayerNorm": norm,
}
