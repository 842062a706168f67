"""Has whoever listens see the losses of multi-token prediction before Megatron attaches them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_dwm.core import further_losses
from megatron_dwm.errors import DWMError

# Of `MTPLossAutoScaler.forward`, after the context.
_PARAMETERS = ("output", "mtp_loss")


@contextlib.contextmanager
def interposed() -> Iterator[None]:
    """Within it, every such loss is handed to `further_losses.hand_on` first.

    Not by `rebind.rebound`: `apply` is inherited from torch and takes anything, so that the
    signature to be checked is that of `forward`, and nothing is to be put back but to delete it.

    Raises:
        DWMError: Megatron's function takes other arguments than those that are relied on.
    """
    found = tuple(inspect.signature(MTPLossAutoScaler.forward).parameters)[1:]
    if found != _PARAMETERS:
        raise DWMError(
            f"MTPLossAutoScaler.forward takes {', '.join(found)}, but {', '.join(_PARAMETERS)} "
            "were expected; this Megatron is not one that megatron_dwm supports"
        )
    original = MTPLossAutoScaler.apply

    def apply(output: torch.Tensor, mtp_loss: torch.Tensor) -> Any:
        further_losses.hand_on(mtp_loss)
        return original(output, mtp_loss)

    MTPLossAutoScaler.apply = staticmethod(apply)
    try:
        yield
    finally:
        del MTPLossAutoScaler.apply
