"""Part of the CPU stand-in: process groups over gloo."""

from __future__ import annotations

import functools
from typing import Any

import torch


def replace_distributed() -> None:
    """Replaces functions that name NCCL or a device."""
    dist = torch.distributed
    init_process_group, barrier, new_group = (dist.init_process_group, dist.barrier, dist.new_group)
    all_to_all_single = dist.all_to_all_single

    @functools.wraps(init_process_group)
    def gloo_init(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("backend", None)
        kwargs.pop("device_id", None)
        return init_process_group("gloo", *args[1:], **kwargs)

    @functools.wraps(barrier)
    def host_barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    @functools.wraps(new_group)
    def gloo_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        if kwargs.get("backend") not in (None, "gloo"):
            kwargs["backend"] = "gloo"
        kwargs.pop("pg_options", None)
        return new_group(*args, **kwargs)

    @functools.wraps(all_to_all_single)
    def list_all_to_all(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any):
        # gloo's binding takes split sizes as lists of int; the token dispatcher passes arrays.
        args = tuple(_as_int_list(a) for a in args)
        for key in ("output_split_sizes", "input_split_sizes"):
            if key in kwargs:
                kwargs[key] = _as_int_list(kwargs[key])
        return all_to_all_single(output, input.contiguous(), *args, **kwargs)

    all_gather = dist.all_gather

    @functools.wraps(all_gather)
    def uneven_all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any
    ) -> Any:
        # NCCL gathers parts of different sizes, as in Megatron's layer-wise optimizer; gloo cannot.
        if len({part.numel() for part in tensor_list}) <= 1 or kwargs.get("async_op"):
            return all_gather(tensor_list, tensor, group=group, **kwargs)
        group = dist.group.WORLD if group is None else group
        for rank, part in enumerate(tensor_list):
            if rank == dist.get_rank(group):
                part.copy_(tensor)
            dist.broadcast(part, src=dist.get_global_rank(group, rank), group=group)
        return None

    for module in (dist, dist.distributed_c10d):
        module.all_gather = uneven_all_gather
        module.init_process_group = gloo_init
        module.barrier = host_barrier
        module.new_group = gloo_group
        module.all_to_all_single = list_all_to_all


def _as_int_list(value: Any) -> Any:
    if value is None or not hasattr(value, "__len__"):
        return value
    return [int(v) for v in (value.tolist() if hasattr(value, "tolist") else value)]
