"""What rank 0 does for all ranks: it looks at files, and tells what it found or what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_dwm.errors import DWMError


def from_first_rank[T](make: Callable[[], T]) -> T:
    """Returns on every rank what a function returns on rank 0. A collective of all ranks.

    Args:
        make: called on rank 0 only; returns something small.

    Raises:
        DWMError: on every rank, when it raises anything on rank 0; so no rank is left waiting.
    """
    found: list[Any] = [None, None]
    cause: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = make()
        except (DWMError, OSError) as error:
            found[1] = str(error)
        except Exception as error:  # or the other ranks hang
            found[1], cause = f"{type(error).__name__}: {error}", error
    torch.distributed.broadcast_object_list(found, src=0)
    result, message = found
    if message is not None:
        raise DWMError(message) from cause
    return result
