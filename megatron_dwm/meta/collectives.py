"""Every collective of the meta step, named, with what it sums and why once.

Groups are those of the LLM. "Last stage" ranks are the ones that see losses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_samples(local: torch.Tensor, dp_group: dist.ProcessGroup) -> torch.Tensor:
    """All-gathers per-sample values over data parallelism.

    Gathered, not summed: each data-parallel rank has its own samples. Ranks of one tensor-
    parallel group hold equal values and gather among their own data-parallel peers.

    Args:
        local: `[n]` values of this rank's samples.
        dp_group: the data-parallel group (without context parallelism).

    Returns:
        `[N]` in the order (data-parallel rank, micro-batch, sample).
    """
    size = dist.get_world_size(dp_group)
    parts = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(parts, local.contiguous(), group=dp_group)
    return torch.cat(parts)


def sum_over_data_parallel(value: torch.Tensor, dp_cp_group: dist.ProcessGroup) -> torch.Tensor:
    """Sums over data (and context) parallelism what each rank computed on its own samples.

    Once: tensor-parallel peers hold the same value and are not in the group.
    """
    value = value.clone()
    dist.all_reduce(value, group=dp_cp_group)
    return value


def sum_of_shards(value: torch.Tensor, grad_stats_group: dist.ProcessGroup) -> torch.Tensor:
    """Sums dot products of gradient shards over the ranks that hold different shards.

    The optimizer's own group for gradient norms: tensor x pipeline parallel, and data parallel
    too with the distributed optimizer. Replicated and shared parameters must have been left out
    on all ranks but one by the caller.
    """
    value = value.clone()
    dist.all_reduce(value, group=grad_stats_group)
    return value


def broadcast_from_last_stage(value: torch.Tensor, pp_group: dist.ProcessGroup) -> torch.Tensor:
    """Sends what only the last pipeline stage knows (losses, scores) to the earlier stages.

    Broadcast, not summed: each tensor-parallel rank talks to its own pipeline.
    """
    size = dist.get_world_size(pp_group)
    if size > 1:
        dist.broadcast(value, src=dist.get_global_rank(pp_group, size - 1), group=pp_group)
    return value


def broadcast_from_first_tensor_rank(
    tokens: torch.Tensor | None,
    shape: tuple[int, ...],
    tp_group: dist.ProcessGroup,
    device: torch.device,
) -> torch.Tensor:
    """Sends integers of the data from tensor-parallel rank 0, which alone reads it, to its peers.

    Args:
        tokens: what rank 0 has (its peers' value, if any, is overwritten); None: nothing here.
        shape: shape to receive.
        tp_group: tensor-parallel group.
        device: where the result lives.
    """
    if tokens is None:
        received = torch.empty(shape, dtype=torch.int64, device=device)
    else:
        received = tokens.to(device=device, dtype=torch.int64).contiguous()
    if dist.get_world_size(tp_group) > 1:
        dist.broadcast(received, src=dist.get_global_rank(tp_group, 0), group=tp_group)
    return received


def gather_shards(buffer: torch.Tensor, dp_group: dist.ProcessGroup) -> None:
    """All-gathers, in place, a flat buffer of which each data-parallel rank filled its shard.

    The distributed optimizer's layout: rank r owns the r-th of equally long shards.
    """
    size = dist.get_world_size(dp_group)
    if size == 1:
        return
    own = buffer.chunk(size)[dist.get_rank(dp_group)].clone()
    dist.all_gather_into_tensor(buffer, own, group=dp_group)
