"""Which layers have a `GhostRule`; `register` adds a rule for your own layer type."""

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
# Layers of optional packages, by class name.
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
    """Adds the rule of a layer type, for exactly that type; replaces an existing rule.

    To be called before training starts, for example in the module with your own policy.

    Args:
        kind: the layer's class.
        rule: how the layer takes part.
    """
    _BY_TYPE[kind] = rule


def rule_of(module: torch.nn.Module) -> GhostRule | None:
    """Returns the rule of a layer, or None for an unknown type.

    The exact type counts: a subclass may compute something else. Layers of Transformer Engine and
    Apex are recognised by package and name, because those packages are optional.
    """
    kind = type(module)
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    return _BY_NAME.get(kind.__name__) if kind.__module__.split(".")[0] in _PACKAGES else None


def is_known_by_name(name: str) -> bool:
    """Returns whether a layer class of torch, Megatron, Transformer Engine or Apex has a rule.

    For a model that is not built, so that there is no module for `rule_of`.

    Args:
        name: name of the class.
    """
    return name in _BY_NAME or any(kind.__name__ == name for kind in _BY_TYPE)
