"""Decisions that all ranks must take alike."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.core import collectives


def agreed(found: dict[str, Any], device: torch.device) -> list[str]:
    """Returns the causes that any rank has found, on every rank alike.

    Args:
        found: whether this rank sees each cause, as bools or scalar tensors; on every rank for the
            same causes.
        device: of the collective.
    """
    flags = [torch.as_tensor(v, device=device).double() for v in found.values()]
    # One wait for the device.
    worst = collectives.largest(torch.stack(flags), torch.distributed.group.WORLD).tolist()
    return [cause for cause, seen in zip(found, worst, strict=True) if seen]
