"""Rotary position embeddings: Megatron's arguments <-> Hugging Face's description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The factor that Megatron's own model builders train with, whatever --rope-scaling-factor says:
# they take the flag and do not hand it to the model (seen in 0.19.2).
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
    """Returns Hugging Face's `rope_scaling` of a checkpoint, and what speaks against it.

    Args:
        args: The checkpoint's arguments.
        given_factor: The factor that the user says the model was built with, or None.
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
    factor = float((scaling or {}).get("factor", 1.0))
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


def from_config(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Returns theta and `rope_scaling` (None for plain RoPE), from either spelling."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    base = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    return float(base), None if kind == "default" else {"rope_type": kind, **rope}


def to_config(base: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns both spellings: transformers 4's keys, and `rope_parameters` of transformers 5."""
    given = dict(scaling) if scaling else None
    return {
        "rope_theta": base,
        "rope_scaling": given,
        "rope_parameters": {"rope_type": "default", **(given or {}), "rope_theta": base},
    }
