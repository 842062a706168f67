"""Inner products of attention's own parameter: the softmax offset (a learnable sink).

    p_j = exp(z_j) / (sum_k exp(z_k) + exp(o)),  o: one number per head

The output is not linear in o, and its derivative needs values inside the kernel. So the kernel's
own backward pass is used, for one sample at a time: as much arithmetic as one more pass through the
attention, for any kernel, mask or window.

Shapes: s tokens, b samples, h heads on this rank; queries `[s, b, h, d]`, output `[s, b, h d]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_dwm.meta_gradient.ghost.rule import Call, Direction, Share

DROPS_ATTENTION = "it uses --attention-dropout"


def softmax_offset(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """The offset `[h]`; each tensor-parallel rank has that of its own heads."""
    module = call.module
    offset = module.softmax_offset
    direction = v(offset)
    if direction is None:
        return call.samples.none(grad)
    found = []
    try:
        for i, (inputs, named) in enumerate(_samples(call, grad.size(1))):
            leaf = torch.nn.Parameter(offset.detach())
            module.softmax_offset = leaf
            with torch.enable_grad():
                # Not by calling the module: its hooks are active here.
                output = module.forward(*inputs, **named)
            (gradient,) = torch.autograd.grad(output, leaf, grad[:, i : i + 1])
            found.append((gradient.float() * direction).sum())
    finally:
        module.softmax_offset = offset
    return torch.stack(found)


def _samples(call: Call, b: int) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yields the inputs of each sample separately."""

    def alone(value: Any, dim: int, i: int) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > dim and value.size(dim) == b:
            return value.narrow(dim, i, 1)
        return value  # a mask for all samples

    for i in range(b):
        # Query, key and value; then masks and biases, [b, 1, s, s].
        inputs = [alone(x, 1 if k < 3 else 0, i) for k, x in enumerate(call.inputs)]
        named = {
            name: alone(x, 1 if name in ("query", "key", "value") else 0, i)
            for name, x in call.named_inputs.items()
        }
        yield inputs, named


def reason_against(module: torch.nn.Module) -> str | None:
    """Returns why an attention's softmax offset is not covered; None if it is, or is absent."""
    if not isinstance(getattr(module, "softmax_offset", None), torch.nn.Parameter):
        return None
    dropout = getattr(module, "attention_dropout", 0.0)
    rate = dropout.p if isinstance(dropout, torch.nn.Dropout) else dropout
    return DROPS_ATTENTION if rate else None
