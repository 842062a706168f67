"""The shape of a dense Llama, for callers that can take no other model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from megatron_dwm.conversion.families.rope import BUILT_IN_ROPE_FACTOR, LLAMA3_ROPE
from megatron_dwm.conversion.shape import ModelShape

__all__ = ["BUILT_IN_ROPE_FACTOR", "LLAMA3_ROPE", "LlamaShape"]


class LlamaShape(ModelShape):
    """A `ModelShape` that is a dense Llama; everything else is refused."""

    @classmethod
    def from_megatron_args(cls, args: Any, rope_scaling_factor: float | None = None) -> Self:
        """Reads the shape from a checkpoint's arguments, as `ModelShape` does.

        Raises:
            ConversionError: The model is no dense Llama; names every argument that says so.
        """
        from megatron_dwm.conversion.families import FAMILIES

        return cls(**FAMILIES["llama"].values_from_args(args, rope_scaling_factor))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads the shape from a `config.json`, as `ModelShape` does.

        Raises:
            ConversionError: The model is no dense Llama, or a number is missing.
        """
        from megatron_dwm.conversion.families import FAMILIES

        return cls(**FAMILIES["llama"].values_from_config(config))
