"""Dense Llama: Megatron names <-> Hugging Face names, and the two layouts that differ.

Shapes: h hidden size, f feed-forward size, n attention heads, g query groups, d head dimension,
V vocabulary. All weights are `[out, in]` in both worlds; only two tensors differ in layout:

- `linear_qkv` interleaves by query group: for each of the g groups, n/g query heads, one key
  head and one value head, giving `[(n + 2g) * d, h]`.
- `linear_fc1` stacks the gate on the up projection, giving `[2f, h]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_dwm.conversion.errors import ConversionError
from megatron_dwm.conversion.llama_shape import LlamaShape

# Names outside the layers: Megatron -> Hugging Face. `output_layer` is absent when tied.
MODEL_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}

# Names inside a layer (Megatron's local spec): one Megatron tensor is one or more of
# Hugging Face, in the order in which `linear_qkv` and `linear_fc1` are taken apart.
LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}

# Transformer Engine fuses a norm into the linear layer behind it, and Megatron writes its
# checkpoints under these names for both specs: fused name -> local name.
FUSED_NORM_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def split_qkv(
    qkv: torch.Tensor, num_heads: int, num_query_groups: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes Megatron's interleaved QKV projection apart.

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
    """Takes Megatron's `linear_fc1` `[2f, ...]` apart into gate `[f, ...]` and up `[f, ...]`.

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


def megatron_layer_to_hf(
    tensors: Mapping[str, torch.Tensor], config: LlamaShape
) -> dict[str, torch.Tensor]:
    """Converts one layer from Megatron to Hugging Face.

    Args:
        tensors: Megatron's tensors of one layer under names relative to the layer, such as
            `self_attention.linear_qkv.weight`; norms under fused or local names.
        config: The model's shape.

    Returns:
        Hugging Face's tensors under names relative to `model.layers.N.`.

    Raises:
        ConversionError: Names a tensor that is missing, unknown or of the wrong shape.
    """
    local = {FUSED_NORM_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    _check("Megatron layer", {n: tuple(t.shape) for n, t in local.items()}, config.layer_shapes())
    out: dict[str, torch.Tensor] = {}
    for name, hf_names in LAYER_NAMES.items():
        parts: tuple[torch.Tensor, ...]
        if name == "self_attention.linear_qkv.weight":
            parts = split_qkv(
                local[name],
                config.num_attention_heads,
                config.num_query_groups,
                config.kv_channels,
            )
        elif name == "mlp.linear_fc1.weight":
            parts = split_gate_up(local[name])
        else:
            parts = (local[name],)
        out.update(zip(hf_names, parts, strict=True))
    return out


def hf_layer_to_megatron(
    tensors: Mapping[str, torch.Tensor], config: LlamaShape, *, fused_layernorm: bool = False
) -> dict[str, torch.Tensor]:
    """Converts one layer from Hugging Face to Megatron.

    Args:
        tensors: Hugging Face's tensors of one layer under names relative to
            `model.layers.N.`, such as `self_attn.q_proj.weight`.
        config: The model's shape.
        fused_layernorm: Name the two norms as Transformer Engine's fused layers do.

    Returns:
        Megatron's tensors under names relative to the layer, unsharded (TP 1).

    Raises:
        ConversionError: Names a tensor that is missing, unknown or of the wrong shape.
    """
    known = {name for names in LAYER_NAMES.values() for name in names}
    found = {n: () for n in tensors if not n.endswith("rotary_emb.inv_freq")}
    _check("Hugging Face layer", found, dict.fromkeys(known, ()))
    out = {}
    for name, hf_names in LAYER_NAMES.items():
        parts = [tensors[hf_name] for hf_name in hf_names]
        if name == "self_attention.linear_qkv.weight":
            q, k, v = parts
            out[name] = merge_qkv(
                q, k, v, config.num_attention_heads, config.num_query_groups, config.kv_channels
            )
        elif name == "mlp.linear_fc1.weight":
            gate, up = parts
            out[name] = merge_gate_up(gate, up)
        else:
            out[name] = parts[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in out.items()}
    _check("Hugging Face layer, as Megatron's tensors", shapes, config.layer_shapes())
    if fused_layernorm:
        fused = {local: name for name, local in FUSED_NORM_NAMES.items()}
        out = {fused.get(name, name): tensor for name, tensor in out.items()}
    return out


def _check(what: str, found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> None:
    """Compares names and shapes and reports every difference in one line."""
    issues = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    issues += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    issues += [
        f"{name} is {found[name]}, needs {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if issues:
        raise ConversionError(f"{what} does not fit dense Llama: {'; '.join(issues)}.")
