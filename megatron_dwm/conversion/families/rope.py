"""Rotary position embeddings: Megatron's arguments <-> Hugging Face's description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dwm.conversion.families.config_types import is_number
from megatron_dwm.files.json_files import shown

# The factor that Megatron's own model builders use, whatever --rope-scaling-factor says: they
# accept the flag but do not pass it to the model (seen in 0.19.2).
BUILT_IN_ROPE_FACTOR = 8.0

# Megatron's `--use-rope-scaling` fixes these three (RotaryEmbedding._apply_scaling).
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def scaling_from_args(
    args: Any, given_factor: float | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns Hugging Face's `rope_scaling` for a checkpoint, and the issues with it.

    Args:
        args: The checkpoint's arguments.
        given_factor: The factor given by the user as the one the model was built with, or None.
    """
    issues = []
    interpolation = getattr(args, "rotary_seq_len_interpolation_factor", None)
    llama3 = getattr(args, "use_rope_scaling", False)
    if interpolation and llama3:
        issues.append("--rotary-seq-len-interpolation-factor and --use-rope-scaling are both set")
    factor = float(getattr(args, "rope_scaling_factor", BUILT_IN_ROPE_FACTOR))
    if given_factor is not None and not llama3:
        issues.append("a RoPE scaling factor is given, and --use-rope-scaling was off")
    elif llama3 and given_factor is None and factor != BUILT_IN_ROPE_FACTOR:
        issues.append(
            f"--rope-scaling-factor is {factor:g}, and Megatron's own builders ignore it and "
            f"use {BUILT_IN_ROPE_FACTOR:g}; give --rope-scaling-factor with the factor that "
            f"the model was built with ({BUILT_IN_ROPE_FACTOR:g} with the stock trainer)"
        )
    if llama3:
        return {"rope_type": "llama3", "factor": given_factor or factor, **LLAMA3_ROPE}, issues
    if interpolation:
        return {"rope_type": "linear", "factor": float(interpolation)}, issues
    return None, issues


def args_of(base: float, scaling: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """Returns Megatron's arguments for RoPE, and what Megatron cannot compute.

    Args:
        base: theta.
        scaling: Hugging Face's `rope_scaling`, or None.
    """
    values: dict[str, Any] = {"position_embedding_type": "rope", "rotary_percent": 1.0}
    issues = []
    if base != int(base):
        issues.append(f"rope_theta is {base}, and Megatron's --rotary-base takes integers")
    values["rotary_base"] = int(base)
    kind = (scaling or {}).get("rope_type")
    factor = float((scaling or {}).get("factor", 1.0)) if kind in _NEEDED else 1.0
    if scaling is not None and kind == "llama3":
        values |= {"use_rope_scaling": True, "rope_scaling_factor": factor}
        issues += [
            f"rope_scaling has {name} {scaling.get(name)}, and Megatron fixes {fixed:g}"
            for name, fixed in LLAMA3_ROPE.items()
            if scaling.get(name) != fixed
        ]
    elif scaling is not None and kind == "linear":
        values["rotary_seq_len_interpolation_factor"] = int(factor)
        if factor != int(factor):
            issues.append(
                f"rope_scaling has factor {factor:g}, and Megatron's "
                "--rotary-seq-len-interpolation-factor takes integers"
            )
    elif scaling is not None:
        issues.append(f"rope_scaling has rope_type {kind!r}; Megatron knows linear and llama3")
    return values, issues


# Keys that a kind of scaling must have in transformers.
_NEEDED = {"linear": ("factor",), "llama3": ("factor", *LLAMA3_ROPE)}


def from_config(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Returns theta and `rope_scaling` (None for plain RoPE), from either spelling.

    Args:
        config: A config.json in which `config_issues` found nothing.
    """
    rope = _described(config)
    base = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    return float(base), None if kind == "default" else {"rope_type": kind, **rope}


def config_issues(config: Mapping[str, Any], by_layer_type: bool) -> list[str]:
    """Returns why no RoPE can be read from a config.json; transformers could not either.

    Args:
        config: A config.json with `rope_theta`.
        by_layer_type: Whether the family's configuration has layer types; transformers then reads a
            description with their names as several.
    """
    given = config.get("rope_scaling")
    if given and not isinstance(given, dict):
        return [f"rope_scaling is {shown(given)}, needs an object"]
    rope = _described(config)
    theta, kind = rope["rope_theta"], rope["rope_type"]
    issues = []
    if by_layer_type and "full_attention" in rope:
        issues.append("the RoPE parameters are those of layer types, needs one set for all layers")
    if not is_number(theta) or theta <= 0:
        issues.append(f"rope_theta is {shown(theta)}, needs a number above 0")
    if not isinstance(kind, str):
        issues.append(f"rope_type is {shown(kind)}, needs a string")
    elif kind != "default":
        for name in _NEEDED.get(kind, ()):
            if name not in rope:
                issues.append(f"{name} of the RoPE scaling {kind} is missing")
            elif not is_number(rope[name]) or rope[name] <= 0:
                issues.append(f"{name} of RoPE is {shown(rope[name])}, needs a number above 0")
    share = rope.get("partial_rotary_factor")
    if share is not None and (not is_number(share) or share != 1):
        issues.append(f"partial_rotary_factor of RoPE is {shown(share)}, needs 1.0")
    return issues


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the RoPE of a config.json with theta and type filled in as by transformers."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    original = "original_max_position_embeddings"
    if rope["rope_type"] == "llama3":
        if original in config:
            rope[original] = config[original]
        elif "max_position_embeddings" in config:
            rope.setdefault(original, config["max_position_embeddings"])
    return rope


def to_config(base: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns both spellings: transformers 4's keys, and `rope_parameters` of transformers 5."""
    given = dict(scaling) if scaling else None
    return {
        "rope_theta": base,
        "rope_scaling": given,
        "rope_parameters": {"rope_type": "default", **(given or {}), "rope_theta": base},
    }
