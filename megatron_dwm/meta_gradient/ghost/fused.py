"""Modules that run their layers as one fused operation, where no hook sees a layer's input.

They still hold the layers, and can run them one by one. So when the gradient of such a module's
output is known, its layers are run again, forward and backward, with their own hooks active. This
repeats the module's arithmetic, without the weight gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from megatron_dwm.core import fused_layers
from megatron_dwm.core.contexts import without_gradients


def reason_against(module: torch.nn.Module) -> str | None:
    """Returns why a module's layers cannot be run one by one; None if they can or need not."""
    if fused_layers.is_quantising_mlp(module):
        return "its layers are one quantised operation"
    return None


def hooks(model: torch.nn.Module, later: list[Any]) -> Iterator[Any]:
    """Registers hooks that run the layers of fused modules again; yields their handles.

    Args:
        model: contains the modules.
        later: receives the handles that are added in forward passes.
    """
    for module in model.modules():
        if fused_layers.is_fused_mlp(module):
            yield module.register_forward_hook(partial(_run_again, later))


def _run_again(later: list[Any], module: Any, args: tuple, output: Any) -> None:
    # The fused operation also calls the hooks of its layers, without an output.
    if output is None or not torch.is_grad_enabled() or not output[0].requires_grad:
        return
    x = args[0].detach()

    def run(grad: torch.Tensor) -> None:
        leaf = x.requires_grad_()
        with torch.enable_grad(), without_gradients(module.parameters()):
            again = fused_layers.run_layers(module, leaf)
            torch.autograd.grad(again, leaf, grad)

    later.append(output[0].register_hook(run))
