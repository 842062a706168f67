"""Matrix products of the extension.

The extension is column-major: `generic_gemm(A, transa, B, transb)` is `op(B) @ op(A)` of row-major
tensors, with bias, GELU and accumulation on the way out. Shapes: t tokens, i inputs, o outputs.

    forward           TN    A weight [o, i], B input [t, i]          -> [t, o]
    gradient of x     NN    A weight [o, i], B output's grad [t, o]  -> [t, i]
    of the weight     NT    A input [t, i],  B output's grad [t, o]  -> [o, i]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tests.transformer_engine_cpu.enumerations import torch_dtype
from tests.transformer_engine_cpu.unwritten import refuse


def generic_gemm(
    a: torch.Tensor,
    transa: bool,
    b: torch.Tensor,
    transb: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Any]:
    """Returns the product, the bias's gradient (with `grad`), GELU's input, and `extra_output`."""
    refuse(
        "generic_gemm", quantizer=quantizer, comm_overlap=comm_overlap, extra_output=extra_output
    )
    refuse("generic_gemm", alpha=None if alpha == 1.0 else alpha)
    refuse("generic_gemm", beta=None if beta in (0.0, 1.0) else beta)
    leading = None if transb else b.shape[:-1]
    a2, b2 = a.reshape(-1, a.size(-1)), b.reshape(-1, b.size(-1))
    if out is not None:
        dtype = out.dtype
    else:
        dtype = a.dtype if out_dtype is None else torch_dtype(out_dtype)
    # The kernels accumulate in float32, and round once.
    inner = torch.promote_types(a2.dtype, dtype)
    y = (b2.t() if transb else b2).to(inner) @ (a2.t() if transa else a2).to(inner)
    bias_grad = pre_gelu = None
    if bias is not None and grad:
        bias_grad = b2.float().sum(0).to(torch_dtype(bias_dtype))
    elif bias is not None and bias.numel():
        y = y + bias
    if gelu and grad:
        assert gelu_in is not None
        y = _gelu_backward(y, gelu_in)
    elif gelu:
        pre_gelu, y = y.to(dtype), F.gelu(y, approximate="tanh")
    y = y.to(dtype)
    if leading is not None:
        y = y.reshape(*leading, y.size(-1))
    if out is not None:
        y = out.add_(y.view_as(out)) if accumulate else out.copy_(y.view_as(out))
    return y, bias_grad, pre_gelu, extra_output


def te_general_grouped_gemm(
    a: Sequence[torch.Tensor],
    transa: bool,
    b: Sequence[torch.Tensor],
    transb: bool,
    out: Sequence[torch.Tensor],
    out_dtype: Any,
    m_splits: Sequence[int],
    bias: Sequence[torch.Tensor | None],
    bias_dtype: Any,
    single_output: bool,
    gelu_in: Any,
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Sequence[torch.Tensor | None]:
    """Writes one product for each group; with `single_output` they share a tensor, row by row."""
    outs = list(out[0].split([int(m) for m in m_splits])) if single_output else out
    for k, (a_k, b_k, out_k) in enumerate(zip(a, b, outs, strict=True)):
        bias_k = bias[k]
        has_bias = bias_k is not None and bias_k.numel() > 0
        if not a_k.numel() or not b_k.numel():  # a group without rows
            if not accumulate:
                out_k.zero_()
            if grad and has_bias:
                bias_k.zero_()
            continue
        _, bias_grad, _, _ = generic_gemm(
            a_k, transa, b_k, transb, out_k, None, None, bias_k if has_bias else None,
            bias_dtype, False, None, grad, None, 0, accumulate, use_split_accumulator,
        )  # fmt: skip
        if bias_grad is not None:
            bias_k.copy_(bias_grad)
    return bias


def _gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    leaf = x.detach().to(grad.dtype).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, grad)[0]
