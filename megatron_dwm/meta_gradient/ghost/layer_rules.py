"""Which layers have a `GhostRule`; `register` adds one for a layer type of one's own."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.router import TopKRouter

from megatron_dwm.meta_gradient.ghost import experts
from megatron_dwm.meta_gradient.ghost.attention import softmax_offset
from megatron_dwm.meta_gradient.ghost.embeddings import (
    position_embedding,
    samples_of,
    vocab_embedding,
)
from megatron_dwm.meta_gradient.ghost.linear import (
    column_linear,
    grouped_linear,
    norm_column_linear,
    plain_linear,
    row_linear,
)
from megatron_dwm.meta_gradient.ghost.norms import norm
from megatron_dwm.meta_gradient.ghost.rule import GhostRule

_NORM = GhostRule(norm)
_BY_TYPE: dict[type, GhostRule] = {
    ColumnParallelLinear: GhostRule(column_linear),
    RowParallelLinear: GhostRule(row_linear),
    VocabParallelEmbedding: GhostRule(vocab_embedding, samples_of),
    torch.nn.Embedding: GhostRule(position_embedding, samples_of),
    torch.nn.Linear: GhostRule(plain_linear),
    torch.nn.LayerNorm: _NORM,
    torch.nn.RMSNorm: _NORM,
    TopKRouter: GhostRule(experts.router),
    DotProductAttention: GhostRule(softmax_offset),
}
# Layers of packages that need not be installed, by their class's name.
_PACKAGES = ("megatron", "transformer_engine", "apex")
_BY_NAME: dict[str, GhostRule] = {
    "TEColumnParallelLinear": GhostRule(column_linear),
    "TELMHeadColumnParallelLinear": GhostRule(column_linear),
    "TERowParallelLinear": GhostRule(row_linear),
    "TELayerNormColumnParallelLinear": GhostRule(norm_column_linear),
    "TELinear": GhostRule(plain_linear),
    "TEColumnParallelGroupedLinear": GhostRule(grouped_linear),
    "TERowParallelGroupedLinear": GhostRule(grouped_linear),
    "TEDotProductAttention": GhostRule(softmax_offset),
    "TEFusedResidualRMSNorm": _NORM,
    "LayerNorm": _NORM,
    "RMSNorm": _NORM,
    "FusedLayerNorm": _NORM,
}


def register(kind: type, rule: GhostRule) -> None:
    """Adds the rule of a layer type, for exactly that type, in the place of one that is there.

    To be called before the training starts, such as in the module of one's own policy.

    Args:
        kind: the layer's class.
        rule: how it takes part.
    """
    _BY_TYPE[kind] = rule


def rule_of(module: torch.nn.Module) -> GhostRule | None:
    """Returns the rule of a layer, or None for a type that is not known.

    By exact type: a subclass may compute something else. Layers of Transformer Engine and Apex
    go by their package and name, as those need not be installed.
    """
    kind = type(module)
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    return _BY_NAME.get(kind.__name__) if kind.__module__.split(".")[0] in _PACKAGES else None


def is_known_by_name(name: str) -> bool:
    """Returns whether a layer class of torch, Megatron, Transformer Engine or Apex has a rule.

    For a model that is not built, so that `rule_of` has no module to look at.

    Args:
        name: of the class.
    """
    return name in _BY_NAME or any(kind.__name__ == name for kind in _BY_TYPE)
