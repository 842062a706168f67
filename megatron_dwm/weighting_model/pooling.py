"""Pools the states of a sample's tokens into one vector, for samples of different length."""

from __future__ import annotations

import torch


def pool_tokens(hidden: torch.Tensor, lengths: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pools token states of a batch that is padded on the right, without the padding.

    Args:
        hidden: `[s, b, h]` states of a causal model, which padding on the right does not affect.
        lengths: `[b]` tokens of each sample, at least 1, on the same device.
        pooling: `last` (state of the last token) or `mean` (of all tokens).

    Returns:
        `[b, h]` float32.
    """
    if pooling == "last":
        columns = torch.arange(hidden.size(1), device=hidden.device)
        return hidden[lengths - 1, columns].float()
    positions = torch.arange(hidden.size(0), device=hidden.device)
    padding = (positions.unsqueeze(1) >= lengths).unsqueeze(-1)
    return hidden.float().masked_fill(padding, 0).sum(dim=0) / lengths.unsqueeze(-1)
