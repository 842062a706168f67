"""Attention of the weighting model without Transformer Engine: torch's own kernels.

Megatron's local `DotProductAttention` writes the `[b, n, s, s]` scores several times, which takes
most of the time and memory of a model as small as the DWM.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class CausalAttention(MegatronModule):
    """Causal `softmax(q k^T * scale) v` by `torch.nn.functional.scaled_dot_product_attention`.

    A core attention for Megatron's layer specs, without parameters, so that checkpoints are those
    of `DotProductAttention`. It supports the configs that `fits` accepts.

    Shapes: s tokens, b samples, n heads and g groups on this rank, d head size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    @staticmethod
    def fits(config: TransformerConfig) -> bool:
        """Returns whether this class computes a model's attention."""
        return (
            config.softmax_type == "vanilla"
            and config.window_size is None
            # The fastest kernels add gradients in nondeterministic order.
            and not config.deterministic_mode
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attends.

        Args:
            query: `[s, b, n, d]`.
            key: `[s, b, g, d]`.
            value: `[s, b, g, d]`.
            attention_mask: not used: the mask is causal.
            **unused: what Megatron passes to every core attention.

        Returns:
            `[s, b, n d]`.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(2)
