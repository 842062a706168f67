"""Puts Transformer Engine's Python classes on top of the reference of their extension.

To be called in a process of its own, after `megatron_dwm.hosts.cpu.install()` (which sends tensors
for CUDA to the CPU) and before Megatron is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from typing import Any

import torch

from tests.transformer_engine_cpu import extension


def install(folder: str) -> None:
    """Makes `import transformer_engine` work in this process.

    Args:
        folder: where its Python files lie (`source.folder()`).
    """
    if extension.NAME in sys.modules:
        return
    sys.path.append(folder)
    # No CUDA libraries are loaded, and pip is not asked what is installed.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    sys.modules[extension.NAME] = extension.module()
    sys.modules[_FUSED_WGRAD] = _fused_weight_gradients()
    torch.Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment,method-assign]
    _import_package()


def _import_package() -> None:
    """Imports the package, whose first act is to load its extension's library."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None
    package = sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    # Its export to ONNX, which imports packages of ONNX.
    export = "transformer_engine.pytorch.onnx_extensions"
    sys.modules[export] = extension.Partial(export)
    pytorch = importlib.import_module("transformer_engine.pytorch")
    spec.loader.exec_module(package)
    # Kept by it for as long as it lives; made here, while the host sends CUDA to the CPU.
    pytorch.utils._empty_tensor()


def _is_cuda(tensor: torch.Tensor) -> bool:
    """What Transformer Engine asks of its inputs; nobody else is told so."""
    return sys._getframe(1).f_globals.get("__name__", "").startswith("transformer_engine")


_FUSED_WGRAD = "fused_weight_gradient_mlp_cuda"


def _fused_weight_gradients() -> types.ModuleType:
    """Apex's extension, which Megatron's own output layer takes for gradients that are added up."""

    def accumulate(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad.add_(grad.to(main_grad.dtype).t() @ x.to(main_grad.dtype))

    module: Any = types.ModuleType(_FUSED_WGRAD)
    module.wgrad_gemm_accum_fp32 = accumulate
    module.wgrad_gemm_accum_fp16 = accumulate
    return module
