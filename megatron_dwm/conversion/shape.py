"""The numbers that define a language model, read from Megatron's arguments or config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_dwm.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The numbers that define a language model, under Megatron's names.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: h.
        ffn_hidden_size: f, the width of the gate and of the up projection (per expert).
        num_attention_heads: n.
        num_query_groups: g, equal to n without grouped-query attention.
        kv_channels: d, the head dimension.
        vocab_size: V, without padding once it is known.
        max_position_embeddings: Longest sequence that the model declares.
        layernorm_epsilon: Epsilon of every norm.
        rotary_base: RoPE base (theta); meaningless if positions are learned.
        rope_scaling: None, or Hugging Face's description of it (`rope_type`, `factor`, ...).
        tied: Whether the output layer is the embedding.
        family: A key of `megatron_dwm.conversion.families.FAMILIES`.
        activation: `silu`, `gelu` or `gelu_new` (its tanh approximation).
        num_experts: Experts per layer; 0 in dense models.
        router_topk: Experts per token.
        router_aux_loss: Coefficient of the load-balancing loss.
        attention_dropout: Dropout of the attention weights.
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
