"""Lets one rank work for all: the others learn its result, or its error."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_dwm.errors import DWMError

# A rank may wait for another one for as long as a chunk takes, and the first one for all others.
_TIMEOUT = timedelta(days=7)
# Variables in which torchrun, SLURM, Open MPI and MPICH give the number of processes.
_RANKS_OF_A_LAUNCHER = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def start_ranks() -> None:
    """Joins torchrun's ranks, or starts as a single rank without it.

    It uses gloo even on GPUs: no tensors are exchanged, so ranks may share a GPU.
    """
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    else:
        dist.init_process_group(
            "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT
        )


def stand_alone() -> None:
    """Sets what torchrun would set, so that one process needs no torchrun."""
    if "MASTER_ADDR" in os.environ or "RANK" in os.environ:
        return
    if any(os.environ.get(name, "1") != "1" for name in _RANKS_OF_A_LAUNCHER):
        return  # one of several processes; the script will find out itself
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def rank_0_first[T](action: Callable[[], T]) -> T:
    """Does something that may fail on rank 0 first, and if that succeeds, on all other ranks.

    This way a user's error, which all ranks would meet, is reported once.

    Raises:
        DWMError: rank 0's error on all ranks, or this rank's own.
    """
    rank = dist.get_rank()
    message: list[str | None] = [None]
    result = None
    if rank == 0:
        try:
            result = action()
        except DWMError as error:
            message = [str(error)]
    dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise DWMError(message[0])
    try:
        return action() if rank else result  # type: ignore[return-value]
    except DWMError as error:
        raise DWMError(str(error), this_rank_only=True) from error
