"""Reads the language model's final hidden states as they pass into its output layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_dwm.errors import DWMError


class StateTap:
    """Keeps the last input of the output layer: the states after the final norm.

    Args:
        chunk: the last model chunk of this rank (DDP-wrapped or not), which computes the losses.

    Raises:
        DWMError: the model has no output layer to read from.
    """

    def __init__(self, chunk: Any) -> None:
        model = unwrap_model(chunk)
        self.layer = getattr(model, "output_layer", None)
        if not isinstance(self.layer, torch.nn.Module):
            raise DWMError(
                f"--dwm-form head reads the hidden states where they enter the model's "
                f"`output_layer`, but {type(model).__name__} has none on its last pipeline stage; "
                "name the output layer so, or use --dwm-form model",
                this_rank_only=True,
            )
        self._states: torch.Tensor | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which the states of every forward pass are kept until they are taken."""
        assert self.layer is not None
        handle = self.layer.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._states = None

    def take(self) -> torch.Tensor:
        """Returns the states of the micro-batch whose loss is being computed, and drops them.

        Returns:
            `[s, b, h]`, `[s / tp, b, h]` under sequence parallelism; detached.

        Raises:
            DWMError: the output layer was not called.
        """
        states, self._states = self._states, None
        if states is None or states.dim() != 3:
            found = "was not called" if states is None else f"was given {list(states.shape)}"
            raise DWMError(
                "--dwm-form head reads the hidden states [sequence, batch, hidden] where they "
                f"enter the model's output_layer, which {found}; use --dwm-form model",
                this_rank_only=True,
            )
        return states

    def _keep(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else next(iter(kwargs.values()), None)
        self._states = states.detach() if isinstance(states, torch.Tensor) else None
