"""Model families that convert in both directions, and how one is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dwm.conversion.errors import ConversionError
from megatron_dwm.conversion.families.base import Family
from megatron_dwm.conversion.families.gpt2 import GPT2
from megatron_dwm.conversion.families.llama import Llama, Mixtral, Qwen2, Qwen3
from megatron_dwm.json_files import shown

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Llama(), Qwen2(), Qwen3(), Mixtral(), GPT2())
}


def family_of_args(args: Any) -> Family:
    """Returns the family that a checkpoint's arguments point to.

    One argument tells each family from Llama. Whether all others fit is what reading the shape
    checks.

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
