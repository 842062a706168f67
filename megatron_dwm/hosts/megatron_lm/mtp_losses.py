"""Passes the losses of multi-token prediction to listeners before Megatron attaches them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_dwm.core import further_losses
from megatron_dwm.errors import DWMError

# Parameters of `MTPLossAutoScaler.forward`, after the context.
_PARAMETERS = ("output", "mtp_loss")


@contextlib.contextmanager
def interposed() -> Iterator[None]:
    """A context in which every such loss is passed to `further_losses.hand_on` first.

    `rebind.rebound` does not fit: `apply` is inherited from torch and takes anything, so the
    signature to check is that of `forward`, and restoring only means deleting the attribute.

    Raises:
        DWMError: Megatron's function does not take the arguments that are relied on.
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
