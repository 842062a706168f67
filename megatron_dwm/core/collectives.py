"""Every collective of a meta step, by name, with what it sums and why each part counts once.

Groups are those of the LLM. "Last stage" ranks are the ones that see losses. The reduction of the
meta loss's gradient h over data parallelism is the trainer's own (DDP, overlapped with pass C
under `--overlap-grad-reduce`); `count_gradient_reduction` only counts it.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.distributed as dist

# Bytes that this rank passed to each collective since the counter was last cleared.
traffic: collections.Counter[str] = collections.Counter()


def _count(name: str, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    if dist.get_world_size(group) > 1:
        traffic[name] += tensor.numel() * tensor.element_size()


def gather_samples(local: torch.Tensor, dp_group: dist.ProcessGroup) -> torch.Tensor:
    """All-gathers per-sample values over data-parallel ranks.

    Gathered, not summed: each data-parallel rank has its own samples. Ranks of one tensor-
    parallel group hold equal values and gather among their own data-parallel peers.

    Args:
        local: `[n]` values of this rank's samples.
        dp_group: the data-parallel group (without context parallelism).

    Returns:
        `[N]` in the order (data-parallel rank, micro-batch, sample).
    """
    size = dist.get_world_size(dp_group)
    _count("gather_samples", local, dp_group)
    parts = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(parts, local.contiguous(), group=dp_group)
    return torch.cat(parts)


def sum_over_data_parallel(value: torch.Tensor, dp_cp_group: dist.ProcessGroup) -> torch.Tensor:
    """Sums over data- (and context-) parallel ranks what each computed on its own samples.

    Once: tensor-parallel peers hold the same value and are not in the group.
    """
    value = value.clone()
    _count("sum_over_data_parallel", value, dp_cp_group)
    dist.all_reduce(value, group=dp_cp_group)
    return value


def sum_over_model_parallel(value: torch.Tensor, mp_group: dist.ProcessGroup) -> torch.Tensor:
    """Sums `<v, g_i>` over the ranks that hold parts of one replica: tensor x pipeline parallel.

    Once: each rank's part covers the parameters of its pipeline stage and its tensor-parallel
    shards, and replicated parameters on one tensor-parallel rank only (or, where each rank sees
    only a part of their gradient, that part). Tied embeddings add their input's term on the first
    stage and their output's on the last. Data-parallel ranks have other samples and are not in the
    group.
    """
    value = value.clone()
    _count("sum_over_model_parallel", value, mp_group)
    dist.all_reduce(value, group=mp_group)
    return value


def sum_of_shards(value: torch.Tensor, grad_stats_group: dist.ProcessGroup) -> torch.Tensor:
    """Sums dot products of gradient shards over the ranks that hold different shards.

    This is the optimizer's own group for gradient norms: tensor x pipeline parallel, and with the
    distributed optimizer also data parallel. The caller must leave out replicated and shared
    parameters on all ranks but one.
    """
    value = value.clone()
    _count("sum_of_shards", value, grad_stats_group)
    dist.all_reduce(value, group=grad_stats_group)
    return value


def largest(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the elementwise maximum over a group, so that all its ranks decide the same."""
    value = value.clone()
    _count("largest", value, group)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value


def broadcast_from_last_stage(value: torch.Tensor, pp_group: dist.ProcessGroup) -> torch.Tensor:
    """Sends what only the last pipeline stage knows (losses, scores) to the earlier stages.

    Broadcast, not summed: each tensor-parallel rank talks to its own pipeline.
    """
    size = dist.get_world_size(pp_group)
    if size > 1:
        _count("broadcast_from_last_stage", value, pp_group)
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
        tokens: rank 0's values (its peers' values, if any, are overwritten); None: none on this
            rank.
        shape: shape to receive.
        tp_group: tensor-parallel group.
        device: where the result lives.
    """
    if tokens is None:
        received = torch.empty(shape, dtype=torch.int64, device=device)
    else:
        received = tokens.to(device=device, dtype=torch.int64).contiguous()
    if dist.get_world_size(tp_group) > 1:
        _count("broadcast_from_first_tensor_rank", received, tp_group)
        dist.broadcast(received, src=dist.get_global_rank(tp_group, 0), group=tp_group)
    return received


def gather_sequence(part: torch.Tensor, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """All-gathers tokens that sequence parallelism has split over tensor-parallel ranks.

    Args:
        part: `[s / tp, b, ...]`.
        tp_group: tensor-parallel group.

    Returns:
        `[s, b, ...]`.
    """
    _count("gather_sequence", part, tp_group)
    size = dist.get_world_size(tp_group)
    whole = torch.empty(
        (part.size(0) * size, *part.shape[1:]), dtype=part.dtype, device=part.device
    )
    dist.all_gather_into_tensor(whole, part.contiguous(), group=tp_group)
    return whole


def gather_moments(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-gathers moments from ranks that have other positions of the same samples.

    Gathered, not summed, because merging them needs each part's own mean.

    Args:
        part: `[b, f]`.
        group: tensor parallel (under sequence parallelism), or context parallel.

    Returns:
        `[ranks, b, f]`, the same on every rank of the group.
    """
    _count("gather_moments", part, group)
    found = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, part.contiguous(), group=group)
    return torch.stack(found)


def gather_routing(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-gathers the routing of each rank that shares the experts of an MoE layer.

    Args:
        part: `[...]`, in one shape on all of them, as micro-batches are.
        group: expert tensor parallel x expert parallel.

    Returns:
        `[ranks, ...]`, the same on every rank of the group.
    """
    _count("gather_routing", part, group)
    size = dist.get_world_size(group)
    whole = torch.empty((size, *part.shape), dtype=part.dtype, device=part.device)
    dist.all_gather_into_tensor(whole.flatten(0, 1), part.contiguous(), group=group)
    return whole


def sum_over_experts(value: torch.Tensor, ep_group: dist.ProcessGroup) -> torch.Tensor:
    """Sums, in place, what each rank's experts found for the samples of all replicas.

    Once: an expert is on one rank of the group, or its parts are on tensor-parallel ranks, which
    are summed over with everything else.
    """
    _count("sum_over_experts", value, ep_group)
    dist.all_reduce(value, group=ep_group)
    return value


def start_sum_over_data_parallel(value: torch.Tensor, dp_group: dist.ProcessGroup) -> Any:
    """Starts to sum, in place, what each data-parallel rank computed on its own samples.

    It does not wait: the sum is needed in the next step.

    Returns:
        A handle to wait for; None if there is nothing to sum.
    """
    if dist.get_world_size(dp_group) == 1:
        return None
    _count("sum_over_data_parallel", value, dp_group)
    return dist.all_reduce(value, group=dp_group, async_op=True)


def start_largest(value: torch.Tensor, dp_group: dist.ProcessGroup) -> Any:
    """Like `start_sum_over_data_parallel`, for the elementwise maximum."""
    if dist.get_world_size(dp_group) == 1:
        return None
    _count("largest", value, dp_group)
    return dist.all_reduce(value, op=dist.ReduceOp.MAX, group=dp_group, async_op=True)


def broadcast_over_tensor_parallel(
    value: torch.Tensor, tp_group: dist.ProcessGroup
) -> torch.Tensor:
    """Makes tensor-parallel peers, which computed the same values, agree to the last bit."""
    if dist.get_world_size(tp_group) > 1:
        _count("broadcast_over_tensor_parallel", value, tp_group)
        dist.broadcast(value, src=dist.get_global_rank(tp_group, 0), group=tp_group)
    return value


def gather_shards(buffer: torch.Tensor, dp_group: dist.ProcessGroup) -> Any:
    """All-gathers, in place, a flat buffer of which each data-parallel rank filled its shard.

    The distributed optimizer's layout: rank r owns the r-th of equally long shards.

    Returns:
        A handle to wait for; None if there is nothing to gather. Started without waiting, so that
        the Jacobian of the next bucket is computed in the meantime.
    """
    size = dist.get_world_size(dp_group)
    if size == 1:
        return None
    _count("gather_shards", buffer, dp_group)
    own = buffer.chunk(size)[dist.get_rank(dp_group)].clone()
    return dist.all_gather_into_tensor(buffer, own, group=dp_group, async_op=True)


def sum_of_owners(buffer: torch.Tensor, dp_group: dist.ProcessGroup) -> None:
    """Sums, in place, a buffer in which one data-parallel rank filled each parameter, others 0.

    This is the layout of the layer-wise distributed optimizer, whose ranks update whole parameters.
    """
    if dist.get_world_size(dp_group) > 1:
        _count("sum_of_owners", buffer, dp_group)
        dist.all_reduce(buffer, group=dp_group)


def count_gradient_reduction(model: list[Any]) -> None:
    """Counts the bytes of h that the trainer reduces over data-parallel ranks in pass C."""
    for chunk in model:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            _count("gradient_reduction", buffer.grad_data, buffer.data_parallel_group)
