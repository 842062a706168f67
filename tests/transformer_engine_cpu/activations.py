"""Activations of the extension: each a function `f`, its backward `df`, and `dbias_df`.

Gated ones take `[..., 2 h]`, activate the first half and multiply by the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.transformer_engine_cpu.unwritten import refuse

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).pow(2)


def _gated(f: Activation) -> Activation:
    def activate(x: torch.Tensor) -> torch.Tensor:
        gate, value = x.chunk(2, -1)
        return f(gate) * value

    return activate


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu,
    "geglu": _gated(_gelu),
    "qgelu": _quick_gelu,
    "qgeglu": _gated(_quick_gelu),
    "relu": F.relu,
    "reglu": _gated(F.relu),
    "srelu": _squared_relu,
    "sreglu": _gated(_squared_relu),
    "silu": F.silu,
    "swiglu": _gated(F.silu),
    "glu": _gated(torch.sigmoid),
}


def functions() -> dict[str, Callable[..., Any]]:
    """Returns the extension's functions by name."""
    found: dict[str, Callable[..., Any]] = {}
    for name, f in _ACTIVATIONS.items():
        found[name] = _forward(f)
        found[f"d{name}"] = _backward(f)
        found[f"dbias_d{name}"] = _with_bias(_backward(f))
    return found


def _forward(f: Activation) -> Callable[..., torch.Tensor]:
    def activate(x: torch.Tensor, quantizer: Any = None) -> torch.Tensor:
        refuse("an activation", quantizer=quantizer)
        return f(x)

    return activate


def _backward(f: Activation) -> Callable[..., torch.Tensor]:
    def backward(grad: torch.Tensor, x: torch.Tensor, quantizer: Any = None) -> torch.Tensor:
        refuse("an activation", quantizer=quantizer)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(f(leaf), leaf, grad)[0]

    return backward


def _with_bias(backward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def both(grad: torch.Tensor, x: torch.Tensor, quantizer: Any = None) -> Any:
        dx = backward(grad, x, quantizer)
        return dx.sum(0), dx

    return both
