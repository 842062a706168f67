"""The numbers that define a language model, read from Megatron's arguments or config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from megatron_dwm.conversion.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The numbers that define a language model, under Megatron's names.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: h.
        ffn_hidden_size: f, the width of gate and up each (of every expert).
        num_attention_heads: n.
        num_query_groups: g, equal to n without grouped-query attention.
        kv_channels: d, the head dimension.
        vocab_size: V, without padding once it is known.
        max_position_embeddings: Longest sequence that the model declares.
        layernorm_epsilon: Epsilon of every norm.
        rotary_base: RoPE base (theta); without meaning where positions are learned.
        rope_scaling: None, or Hugging Face's description of it (`rope_type`, `factor`, ...).
        tied: Whether the output layer is the embedding.
        family: A key of `megatron_dwm.conversion.families.FAMILIES`.
        activation: `silu`, `gelu` or `gelu_new` (its tanh approximation).
        num_experts: Experts of a layer; 0 in dense models.
        router_topk: Experts that a token is sent to.
        router_aux_loss: Coefficient of the load-balancing loss.
        attention_dropout: Dropout of the attention's weights.
        hidden_dropout: Dropout of embedding and residual branches (GPT-2).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = False
    family: str = "llama"
    activation: str = "silu"
    num_experts: int = 0
    router_topk: int = 0
    router_aux_loss: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ConversionError(
                f"num_attention_heads is {self.num_attention_heads} and num_query_groups is "
                f"{self.num_query_groups}: the heads do not divide into the groups."
            )

    @classmethod
    def from_megatron_args(cls, args: Any, rope_scaling_factor: float | None = None) -> Self:
        """Reads the shape from the arguments that a Megatron checkpoint carries.

        Args:
            args: The checkpoint's `argparse.Namespace`.
            rope_scaling_factor: The factor that a model with `--use-rope-scaling` was built with;
                needed where the checkpoint's is not the one that Megatron's builders use.

        Returns:
            The shape, with `vocab_size` still padded.

        Raises:
            ConversionError: The model fits no family; names every argument that says so.
        """
        from megatron_dwm.conversion.families import family_of_args

        family = family_of_args(args)
        return cls(**family.values_from_args(args, rope_scaling_factor))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads the shape from a Hugging Face `config.json`, old and new spelling of RoPE.

        Args:
            config: The parsed `config.json`.

        Raises:
            ConversionError: The model is of no known family, or a number is missing.
        """
        from megatron_dwm.conversion.families import family_of_config

        return cls(**family_of_config(config).values_from_config(config))

    def to_hf_config(self, dtype: str) -> dict[str, Any]:
        """Returns the contents of `config.json` without the tokenizer's ids.

        RoPE is written in both spellings: `rope_parameters` (transformers 5) and
        `rope_theta` with `rope_scaling` (transformers 4 and most inference servers).

        Args:
            dtype: Name of the weights' dtype, such as `bfloat16`.
        """
        from megatron_dwm.conversion.families import FAMILIES

        return {**FAMILIES[self.family].to_config(self), "torch_dtype": dtype}

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of a layer, by Megatron's local name."""
        from megatron_dwm.conversion.families import FAMILIES

        return {rule.megatron: rule.shape for rule in FAMILIES[self.family].layer_rules(self)}
