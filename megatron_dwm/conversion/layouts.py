"""Tensor layouts on both sides, as pure functions and their inverses.

Shapes: h hidden size, f feed-forward size, n attention heads, g query groups, d head dimension.
Megatron's weights are `[out, in]`. Three layouts differ:

- `linear_qkv` interleaves by query group: for each of the g groups, n/g query heads, one key
  head and one value head, giving `[(n + 2g) * d, h]`;
- `linear_fc1` stacks the gate and the up projection, giving `[2f, h]`;
- Hugging Face's GPT-2 stores weights as `[in, out]`, with query, key and value side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from megatron_dwm.errors import ConversionError


def split_qkv(
    qkv: torch.Tensor, num_heads: int, num_query_groups: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits Megatron's interleaved QKV projection.

    Args:
        qkv: `[(n + 2g) * d, ...]`, for each group n/g query heads, a key head, a value head.
        num_heads: n.
        num_query_groups: g.
        head_dim: d.

    Returns:
        q `[n * d, ...]`, k `[g * d, ...]` and v `[g * d, ...]`, in Hugging Face's order.

    Raises:
        ConversionError: The first dimension does not fit the three numbers.
    """
    rows = (num_heads + 2 * num_query_groups) * head_dim
    if num_heads % num_query_groups or qkv.shape[0] != rows:
        raise ConversionError(
            f"linear_qkv has {qkv.shape[0]} rows; {num_heads} heads in {num_query_groups} query "
            f"groups of head dimension {head_dim} need {rows}."
        )
    per_group = num_heads // num_query_groups
    rest = qkv.shape[1:]
    grouped = qkv.reshape(num_query_groups, per_group + 2, head_dim, *rest)
    q = grouped[:, :per_group].reshape(num_heads * head_dim, *rest)
    k = grouped[:, per_group].reshape(num_query_groups * head_dim, *rest)
    v = grouped[:, per_group + 1].reshape(num_query_groups * head_dim, *rest)
    return q, k, v


def merge_qkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    num_query_groups: int,
    head_dim: int,
) -> torch.Tensor:
    """Inverse of `split_qkv`.

    Args:
        q: `[n * d, ...]`.
        k: `[g * d, ...]`.
        v: `[g * d, ...]`.
        num_heads: n.
        num_query_groups: g.
        head_dim: d.

    Returns:
        Megatron's `[(n + 2g) * d, ...]`.

    Raises:
        ConversionError: A first dimension does not fit the three numbers.
    """
    for name, tensor, heads in (
        ("q_proj", q, num_heads),
        ("k_proj", k, num_query_groups),
        ("v_proj", v, num_query_groups),
    ):
        if tensor.shape[0] != heads * head_dim or num_heads % num_query_groups:
            raise ConversionError(
                f"{name} has {tensor.shape[0]} rows; {num_heads} heads in {num_query_groups} "
                f"query groups of head dimension {head_dim} need {heads * head_dim}."
            )
    rest = q.shape[1:]
    groups = (num_query_groups, -1, head_dim, *rest)
    parts = [tensor.reshape(groups) for tensor in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def split_gate_up(fc1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits Megatron's `linear_fc1` `[2f, ...]` into gate `[f, ...]` and up `[f, ...]`.

    Raises:
        ConversionError: The first dimension is odd.
    """
    if fc1.shape[0] % 2:
        raise ConversionError(
            f"linear_fc1 has {fc1.shape[0]} rows; gate and up projection need an even number."
        )
    gate, up = fc1.chunk(2, dim=0)
    return gate, up


def merge_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Inverse of `split_gate_up`: gate `[f, ...]` and up `[f, ...]` give `[2f, ...]`.

    Raises:
        ConversionError: The two shapes differ.
    """
    if gate.shape != up.shape:
        raise ConversionError(
            f"gate_proj is {tuple(gate.shape)} and up_proj is {tuple(up.shape)}; they must agree."
        )
    return torch.cat([gate, up], dim=0)


@dataclasses.dataclass(frozen=True)
class Transform:
    """One exact, invertible change of layout: values are moved, never computed.

    Attributes:
        to_hf: One Megatron tensor -> the Hugging Face tensors that it holds.
        to_megatron: The inverse, called with those tensors in the same order.
    """

    to_hf: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    to_megatron: Callable[..., torch.Tensor]


SAME = Transform(lambda tensor: (tensor,), lambda tensor: tensor)
TRANSPOSED = Transform(lambda tensor: (tensor.t(),), lambda tensor: tensor.t())
GATE_UP = Transform(split_gate_up, merge_gate_up)


def qkv_transform(num_heads: int, num_query_groups: int, head_dim: int) -> Transform:
    """Returns the transform of `linear_qkv`, weight or bias, to q, k and v."""
    numbers = (num_heads, num_query_groups, head_dim)
    return Transform(
        lambda qkv: split_qkv(qkv, *numbers), lambda q, k, v: merge_qkv(q, k, v, *numbers)
    )


def side_by_side_qkv_transform(num_heads: int, head_dim: int) -> Transform:
    """Returns the transform of `linear_qkv` to GPT-2's `c_attn`.

    A weight is `[h, 3 * n * d]` there (input first), a bias `[3 * n * d]`: all query heads, all
    key heads, all value heads.
    """
    numbers = (num_heads, num_heads, head_dim)

    def to_hf(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joined = torch.cat(split_qkv(qkv, *numbers))
        return (joined.t() if joined.dim() == 2 else joined,)

    def to_megatron(joined: torch.Tensor) -> torch.Tensor:
        rows = joined.t() if joined.dim() == 2 else joined
        if rows.shape[0] != 3 * num_heads * head_dim:
            raise ConversionError(
                f"c_attn is {tuple(joined.shape)}; {num_heads} heads of head dimension {head_dim} "
                f"need {3 * num_heads * head_dim} columns."
            )
        q, k, v = rows.chunk(3)
        return merge_qkv(q, k, v, *numbers)

    return Transform(to_hf, to_megatron)
