"""Shares what only some ranks do, or where only some fail, with all ranks, so that none hangs.

torchrun ends the other ranks when one has failed. Other launchers (srun) may not: those ranks then
wait in their next collective until its timeout (NCCL), or end with an error about a closed
connection (gloo).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch

from megatron_dwm.core import collectives
from megatron_dwm.errors import DWMError


def agreed(found: dict[str, Any], device: torch.device) -> list[str]:
    """Returns the causes that any rank has found, the same on every rank.

    Args:
        found: whether this rank sees each cause, as bools or scalar tensors; every rank must pass
            the same causes.
        device: device of the collective.
    """
    flags = [torch.as_tensor(v, device=device).double() for v in found.values()]
    # A single wait for the device.
    worst = collectives.largest(torch.stack(flags), torch.distributed.group.WORLD).tolist()
    return [cause for cause, seen in zip(found, worst, strict=True) if seen]


def on_first_rank[T](call: Callable[[], T]) -> T:
    """Calls on rank 0 and returns on every rank what that returned, which must be picklable.

    A collective over all ranks.

    Raises:
        DWMError: on every rank, what `call` raised on rank 0.
    """
    found: list[Any] = [None, None]
    cause: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            found = [call(), None]
        except Exception as error:
            found, cause = [None, _text(error)], error
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise DWMError(found[1]) from cause
    return found[0]


def on_each_rank[T](call: Callable[[], T]) -> T:
    """Calls on every rank, and returns once it has succeeded on all.

    This is a collective over all ranks. If `call` has collectives of its own, any failure before
    them must occur on all ranks.

    Raises:
        DWMError: on every rank, what `call` raised on the lowest rank on which it failed.
    """
    result: Any = None
    cause: Exception | None = None
    try:
        result = call()
    except Exception as error:
        cause = error
    texts: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, None if cause is None else _text(cause))
    for rank, text in enumerate(texts):
        if text is not None:
            raise DWMError(text if rank == 0 else f"rank {rank}: {text}") from cause
    return result


def _text(error: Exception) -> str:
    """Returns the error in one line; prints an unexpected one in full, on its own rank."""
    if isinstance(error, DWMError | OSError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"
