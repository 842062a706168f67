"""Inner products of word and position embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_dwm.core import collectives
from megatron_dwm.meta_gradient.ghost.rule import (
    ByDimension,
    Call,
    Direction,
    Share,
    tensor_parallel_group,
)


def vocab_embedding(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Word embeddings; each tensor-parallel rank holds a range of ids."""
    module, ids, direction = call.module, call.x, v(call.weight)
    samples = samples_of(module)
    if direction is None:
        return samples.none(grad)
    group = tensor_parallel_group(module)
    if samples.dim == 1:  # split over the tokens, [s / tp, b, h]
        if group is not None:
            grad = collectives.gather_sequence(grad, group)
        ids = ids.t()
    first, last = module.vocab_start_index, module.vocab_end_index
    here = (ids >= first) & (ids < last)
    rows = F.embedding((ids - first).masked_fill(~here, 0), direction)
    rows = rows.masked_fill(~here.unsqueeze(-1), 0.0)
    return samples.dot(rows, grad)


def position_embedding(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """Learned positions, replicated over tensor-parallel ranks."""
    direction, part, samples = v(call.weight), share(call.weight), ByDimension(0)
    if direction is None or not part:
        return samples.none(grad)
    return part * samples.dot(F.embedding(call.x, direction), grad)


def samples_of(module: torch.nn.Module) -> ByDimension:
    """Returns which dimension of an embedding's output is that of the samples."""
    return ByDimension(1 if getattr(module, "reduce_scatter_embeddings", False) else 0)
