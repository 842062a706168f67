"""CPU stand-in for the CUDA calls of Megatron's trainer; the only place that asks "is this CPU?".

Megatron's trainer assumes a CUDA device. On a machine without one (laptop, CI) `install()`
replaces, before Megatron is imported, the few `torch` entry points that the trainer uses, so
that the stock trainer runs unchanged on the CPU with gloo. If there is a GPU, `install()` only
skips the compilation of the data set helper, which the wheel of megatron-core ships built.

Set `MEGATRON_DWM_HOST` to `cpu` to force the stand-in, to `cuda` to forbid it, or to `auto`
(default) to use it if no CUDA device is visible.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types

import torch
from torch.overrides import TorchFunctionMode

from megatron_dwm.hosts.cpu.cuda_module import replace_cuda_module
from megatron_dwm.hosts.cpu.data_loaders import keep_generator_from_data_loaders
from megatron_dwm.hosts.cpu.distributed import replace_distributed
from megatron_dwm.hosts.cpu.on_import import ON_IMPORT
from megatron_dwm.hosts.cpu.optimizer import mend_distributed_optimizer
from megatron_dwm.hosts.cpu.random_numbers import replace_rng
from megatron_dwm.hosts.cpu.tensors import CudaToCpu, keep_in_backward

# Flags that the local (no Transformer Engine) layer spec needs on the CPU.
CPU_FLAGS = (
    "--transformer-impl",
    "local",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--use-cpu-initialization",
    "--distributed-backend",
    "gloo",
)

_DRIVER_GPUS = "/proc/driver/nvidia/gpus"


class _State:
    """What `install` changed, so that a second call is a no-op."""

    installed = False
    mode: TorchFunctionMode | None = None


def is_cpu() -> bool:
    """Returns whether the CPU stand-in is installed in this process."""
    return _State.installed


def device() -> torch.device:
    """Returns the device that this process trains on."""
    if _State.installed:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def is_idle() -> bool:
    """Returns whether the device has finished all queued work, without waiting for it."""
    if _State.installed:
        return True
    try:
        return torch.cuda.current_stream().query()
    except RuntimeError:  # queued work has failed
        return False


def default_flags() -> list[str]:
    """Returns the trainer flags that the current host needs: none if there is a GPU."""
    return list(CPU_FLAGS) if wanted() else []


def wanted() -> bool:
    """Returns whether this process should use the CPU stand-in.

    Raises:
        ValueError: `MEGATRON_DWM_HOST` holds something other than `auto`, `cpu` or `cuda`.
        RuntimeError: there are GPUs that torch cannot use.
    """
    choice = os.environ.get("MEGATRON_DWM_HOST", "auto").lower()
    if choice not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"MEGATRON_DWM_HOST is '{choice}'; allowed are auto, cpu and cuda. "
            "Unset it or correct it."
        )
    if choice != "auto":
        return choice == "cpu"
    if _State.installed or torch.cuda.device_count() > 0:
        return _State.installed
    if _driver_lists_gpus() and not _gpus_hidden():
        raise RuntimeError(
            "the driver of this machine lists NVIDIA GPUs, but torch finds none "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}): compare nvidia-smi's CUDA "
            "version with torch's, or set MEGATRON_DWM_HOST=cpu to train on the CPU anyway"
        )
    return True


def _driver_lists_gpus() -> bool:
    """Returns whether the kernel driver lists GPUs, whether or not torch can use them."""
    try:
        return bool(os.listdir(_DRIVER_GPUS))
    except OSError:
        return False


def _gpus_hidden() -> bool:
    """Returns whether the user has hidden all GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")


def install() -> bool:
    """Installs the CPU stand-in if it is wanted. Call it before Megatron is imported.

    Returns:
        True when the stand-in is active after the call.

    Raises:
        RuntimeError: Megatron was imported before the stand-in.
    """
    _skip_helper_compilation()
    if _State.installed or not wanted():
        return _State.installed
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "No GPU was found, and megatron.core was imported before the CPU stand-in. Call "
            "megatron_dwm.hosts.cpu.install() first, or start the script with `megatron-dwm train`."
        )
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    replace_cuda_module()
    replace_rng()
    keep_generator_from_data_loaders()
    replace_distributed()
    ON_IMPORT.patch_on_import(
        "megatron.core.optimizer.distrib_optimizer", mend_distributed_optimizer
    )
    # The DataLoader asks torch.accelerator whether pinned memory makes sense.
    torch.accelerator.is_available = lambda: False
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("megatron_dwm: no GPU in use, training on the CPU with gloo", file=sys.stderr)
    mode = CudaToCpu()
    mode.__enter__()
    keep_in_backward(mode)
    _State.mode = mode
    _State.installed = True
    return True


def _skip_helper_compilation() -> None:
    """Makes Megatron's run-time compilation of its data set helper a no-op.

    The wheel ships the built helper but no Makefile, so the trainer's `make` call fails and ends
    the run with exit code 1, on GPUs too. In a source checkout (with a Makefile) nothing changes.
    """
    spec = importlib.util.find_spec("megatron")
    if spec is None or not spec.submodule_search_locations:
        return
    for root in spec.submodule_search_locations:
        folder = os.path.join(root, "core", "datasets")
        if os.path.isdir(folder):
            if os.path.exists(os.path.join(folder, "Makefile")):
                return
            ON_IMPORT.patch_on_import("megatron.core.datasets.utils", _no_compile)
            return


def _no_compile(module: types.ModuleType) -> None:
    module.compile_helpers = lambda: None  # type: ignore[attr-defined]
