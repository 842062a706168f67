"""Per-sample influence by a loop of per-sample backward passes: the reference for tests.

It takes one pass of the whole step for every sample of the global batch, through the trainer's own
schedule and reductions, so it is exact in every parallel layout and far too slow for training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_dwm.core import collectives
from megatron_dwm.core.optimizers import all_leaves, grad_stats_group, layer_wise_leaves, shards


@torch.no_grad()
def estimate(
    optimizer: Any,
    num_samples: int,
    backward_of_sample: Callable[[int], None],
    device: torch.device,
) -> torch.Tensor:
    """Returns `c_i = <v, g_i>` for every sample of the global batch.

    Args:
        optimizer: the Megatron optimizer; on entry `main_grad` of its parameters holds v.
        num_samples: N.
        backward_of_sample: runs the trainer's forward and backward with the one-hot weight of
            global sample i at theta, and leaves the reduced gradient in `main_grad`.
        device: the parameters' device.

    Returns:
        `[N]` float64, equal on all ranks.
    """
    parts, leaves = list(shards(optimizer)), all_leaves(optimizer)
    layer_wise = layer_wise_leaves(optimizer)
    v = [shard.grad_slice().double().clone() for shard in parts]
    result = torch.zeros(num_samples, dtype=torch.float64)
    for i in range(num_samples):
        with torch.enable_grad():
            backward_of_sample(i)
        # Every rank of an optimizer's group takes part in the sum, with or without a shard.
        sums = {
            id(leaf): [leaf, torch.zeros((), dtype=torch.float64, device=device)] for leaf in leaves
        }
        for shard, direction in zip(parts, v, strict=True):
            if not shard.counts_in_norm():
                continue
            term = (shard.grad_slice().double() * direction).sum()
            sums[id(shard.optimizer)][1] += term
        for leaf, total in sums.values():
            reduced = collectives.sum_of_shards(total, grad_stats_group(leaf, layer_wise))
            result[i] += reduced.item()
    return result
