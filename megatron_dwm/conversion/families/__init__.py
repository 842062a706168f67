"""Model families that can be converted in both directions, and how they are recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dwm.conversion.families.base import Family
from megatron_dwm.conversion.families.gpt2 import GPT2
from megatron_dwm.conversion.families.llama import Llama, Mixtral, Qwen2, Qwen3
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.errors import ConversionError
from megatron_dwm.files.json_files import shown

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Llama(), Qwen2(), Qwen3(), Mixtral(), GPT2())
}


def family_of_args(args: Any) -> Family:
    """Returns the family that a checkpoint's arguments point to.

    One argument distinguishes each family from Llama. Reading the shape checks whether all others
    fit.

    Args:
        args: The checkpoint's `argparse.Namespace`.
    """
    if getattr(args, "num_experts", None):
        return FAMILIES["mixtral"]
    if getattr(args, "position_embedding_type", None) == "learned_absolute":
        return FAMILIES["gpt2"]
    if getattr(args, "qk_layernorm", False):
        return FAMILIES["qwen3"]
    if getattr(args, "add_qkv_bias", False):
        return FAMILIES["qwen2"]
    return FAMILIES["llama"]


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Returns the family that a `config.json` names.

    Raises:
        ConversionError: No family has this `model_type`.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConversionError(
            f"config.json has model_type {shown(kind)}; {', '.join(FAMILIES)} can be converted."
        )
    return FAMILIES[kind]


def shape_from_args(args: Any, rope_scaling_factor: float | None = None) -> ModelShape:
    """Reads the shape of a model from the arguments in a Megatron checkpoint.

    Args:
        args: The checkpoint's `argparse.Namespace`.
        rope_scaling_factor: The factor that a model with `--use-rope-scaling` was built with;
            needed if the checkpoint's factor is not the one that Megatron's builders use.

    Returns:
        The shape, with `vocab_size` still padded.

    Raises:
        ConversionError: The model fits no family; names every argument that says so.
    """
    return ModelShape(**family_of_args(args).values_from_args(args, rope_scaling_factor))


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Reads the shape from a Hugging Face `config.json`, old and new spelling of RoPE.

    Args:
        config: The parsed `config.json`.

    Raises:
        ConversionError: The model is of no known family, or a number is missing.
    """
    return ModelShape(**family_of_config(config).values_from_config(config))


def llama_from_args(args: Any, rope_scaling_factor: float | None = None) -> ModelShape:
    """Like `shape_from_args`, for callers that support only a dense Llama.

    Raises:
        ConversionError: The model is not a dense Llama; names every argument that says so.
    """
    return ModelShape(**FAMILIES["llama"].values_from_args(args, rope_scaling_factor))


def llama_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Like `shape_from_config`, for callers that support only a dense Llama.

    Raises:
        ConversionError: The model is not a dense Llama, or a number is missing.
    """
    return ModelShape(**FAMILIES["llama"].values_from_config(config))


def hf_config(shape: ModelShape, dtype: str) -> dict[str, Any]:
    """Returns the contents of `config.json` without the tokenizer's ids.

    RoPE is written in both spellings: `rope_parameters` (transformers 5) and `rope_theta` with
    `rope_scaling` (transformers 4 and most inference servers).

    Args:
        shape: Shape of the model.
        dtype: Name of the weights' dtype, such as `bfloat16`.
    """
    return {**FAMILIES[shape.family].to_config(shape), "torch_dtype": dtype}


def layer_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a layer, by Megatron's local name."""
    return {rule.megatron: rule.shape for rule in FAMILIES[shape.family].layer_rules(shape)}
