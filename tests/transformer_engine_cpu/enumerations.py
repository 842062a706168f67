"""Enumerations of the extension, with the numbers of its header `transformer_engine.h`."""

from __future__ import annotations

import enum

import torch


class DType(enum.IntEnum):
    """Types of tensors."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def torch_dtype(dtype: int) -> torch.dtype:
    """Returns torch's type of a tensor type."""
    return _TORCH[DType(int(dtype))]


class FP8FwdTensors(enum.IntEnum):
    """Places of a layer's tensors in the scaling factors of a forward pass."""

    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    """The same of a backward pass."""

    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class CommOverlapType(enum.IntEnum):
    """Collectives that overlap with products."""

    RS = 0
    AG = 1


class NVTEScalingMode(enum.IntEnum):
    """Scaling of quantised tensors."""

    NVTE_DELAYED_TENSOR_SCALING = 0
    NVTE_MXFP8_1D_SCALING = 1


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    """Kernels of fused attention."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


ALL = (
    DType,
    FP8FwdTensors,
    FP8BwdTensors,
    CommOverlapType,
    NVTEScalingMode,
    NVTE_Fused_Attn_Backend,
)
