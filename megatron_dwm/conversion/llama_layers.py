"""Converts a dense Llama layer by layer: Megatron names <-> Hugging Face names.

For callers that hold one layer's tensors. Names and layouts are those of
`megatron_dwm.conversion.families`; the layer functions take the shape of any family.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_dwm.conversion.families import FAMILIES, layer_shapes
from megatron_dwm.conversion.layouts import merge_gate_up, merge_qkv, split_gate_up, split_qkv
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.tensor_rules import compare
from megatron_dwm.errors import ConversionError

__all__ = [
    "FUSED_NORM_NAMES",
    "LAYER_NAMES",
    "MODEL_NAMES",
    "hf_layer_to_megatron",
    "megatron_layer_to_hf",
    "merge_gate_up",
    "merge_qkv",
    "split_gate_up",
    "split_qkv",
]

_ANY = ModelShape(1, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0)

# Names outside the layers: Megatron -> Hugging Face. `output_layer` is absent when tied.
MODEL_NAMES = {rule.megatron: rule.hf[0] for rule in FAMILIES["llama"].rules(_ANY, 0)}

# Names inside a layer (Megatron's local spec): one Megatron tensor is one or more Hugging Face
# tensors, in the order in which `linear_qkv` and `linear_fc1` are split.
LAYER_NAMES = {rule.megatron: rule.hf for rule in FAMILIES["llama"].layer_rules(_ANY)}

# Transformer Engine fuses a norm into the following linear layer, and Megatron writes its
# checkpoints under these names for both specs: fused name -> local name.
FUSED_NORM_NAMES = {
    f"{linear}.layer_norm_{part}": f"{norm}.{part}"
    for linear, norm in (
        ("self_attention.linear_qkv", "input_layernorm"),
        ("mlp.linear_fc1", "pre_mlp_layernorm"),
    )
    for part in ("weight", "bias")
}


def megatron_layer_to_hf(
    tensors: Mapping[str, torch.Tensor], config: ModelShape
) -> dict[str, torch.Tensor]:
    """Converts one layer from Megatron to Hugging Face.

    Args:
        tensors: Megatron's tensors of one layer under names relative to the layer, such as
            `self_attention.linear_qkv.weight`; norms under fused or local names.
        config: The model's shape.

    Returns:
        Hugging Face's tensors under names relative to the layer (`model.layers.N.` in Llama).

    Raises:
        ConversionError: Names a tensor that is missing, unknown or of the wrong shape.
    """
    family = FAMILIES[config.family]
    local = {FUSED_NORM_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    found = {name: tuple(tensor.shape) for name, tensor in local.items()}
    _check("Megatron layer", family.label, found, layer_shapes(config))
    out: dict[str, torch.Tensor] = {}
    for rule in family.layer_rules(config):
        out |= rule.to_hf(local[rule.megatron])
    return out


def hf_layer_to_megatron(
    tensors: Mapping[str, torch.Tensor], config: ModelShape, *, fused_layernorm: bool = False
) -> dict[str, torch.Tensor]:
    """Converts one layer from Hugging Face to Megatron.

    Args:
        tensors: Hugging Face's tensors of one layer under names relative to the layer
            (`model.layers.N.` in Llama), such as `self_attn.q_proj.weight`.
        config: The model's shape.
        fused_layernorm: Name the two norms as Transformer Engine's fused layers do.

    Returns:
        Megatron's tensors under names relative to the layer, unsharded (TP 1).

    Raises:
        ConversionError: Names a tensor that is missing, unknown or of the wrong shape.
    """
    family = FAMILIES[config.family]
    rules = family.layer_rules(config)
    needed: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        needed |= rule.hf_shapes()
    found = {n: tuple(t.shape) for n, t in tensors.items() if not n.endswith(family.ignored)}
    _check("Hugging Face layer", family.label, found, needed)
    out = {rule.megatron: rule.to_megatron(tuple(tensors[n] for n in rule.hf)) for rule in rules}
    if fused_layernorm:
        fused = {local: name for name, local in FUSED_NORM_NAMES.items()}
        out = {fused.get(name, name): tensor for name, tensor in out.items()}
    return out


def _check(
    what: str, label: str, found: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]]
) -> None:
    issues = compare(found, needed)
    if issues:
        raise ConversionError(f"{what} does not fit {label}: {issues}.")
