"""CPU stand-in for the CUDA calls of Megatron's trainer: nobody else asks "is this CPU?".

Megatron's trainer assumes a CUDA device. On a machine without one (laptop, CI) `install()`
replaces, before Megatron is imported, the few `torch` entry points that the trainer uses, so
that the stock trainer runs unchanged on the CPU with gloo. Where a GPU is found, `install()`
does nothing but guard the data set helper compilation that the wheel of megatron-core needs.

Set `MEGATRON_DWM_HOST=cpu` to ask for the stand-in, `cuda` to forbid it, `auto` (default) to
decide by whether a CUDA device is visible.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_dwm.host_data import keep_generator_from_data_loaders
from megatron_dwm.host_optimizer import mend_distributed_optimizer

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
_RNG_WARNING = "CPU RNG state changed within GPU RNG context"


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
    """Returns whether the device has done all that it was given, without waiting for it."""
    if _State.installed:
        return True
    try:
        return torch.cuda.current_stream().query()
    except RuntimeError:  # what it was given has failed
        return False


def default_flags() -> list[str]:
    """Returns the trainer flags that the current host needs: none where there is a GPU."""
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
            "version with torch's, or set MEGATRON_DWM_HOST=cpu to train on the CPU all the same"
        )
    return True


def _driver_lists_gpus() -> bool:
    """Returns whether the kernel's driver knows GPUs, whatever torch makes of them."""
    try:
        return bool(os.listdir(_DRIVER_GPUS))
    except OSError:
        return False


def _gpus_hidden() -> bool:
    """Returns whether the user has asked for none of them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")


def install() -> bool:
    """Installs the CPU stand-in when it is wanted. Call it before Megatron is imported.

    Returns:
        True when the stand-in is active after the call.

    Raises:
        RuntimeError: Megatron was imported before the stand-in that it needs.
    """
    _skip_helper_compilation()
    if _State.installed or not wanted():
        return _State.installed
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "No GPU was found, and megatron.core was imported before the CPU stand-in. Import "
            "megatron_dwm and call megatron_dwm.host.install() first, or start the script with "
            "`python -m megatron_dwm.launch`."
        )
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _replace_cuda_module()
    _replace_rng()
    keep_generator_from_data_loaders()
    _replace_distributed()
    _ON_IMPORT.patch_on_import(
        "megatron.core.optimizer.distrib_optimizer", mend_distributed_optimizer
    )
    # The DataLoader asks torch.accelerator whether pinned memory makes sense.
    torch.accelerator.is_available = lambda: False
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("megatron_dwm: no GPU in use, training on the CPU with gloo", file=sys.stderr)
    mode = _CudaToCpu()
    mode.__enter__()
    _State.mode = mode
    _State.installed = True
    return True


def _skip_helper_compilation() -> None:
    """Makes Megatron's run-time compilation of its data set helper a no-op.

    The wheel ships the built helper and no Makefile, so the trainer's `make` call fails and
    ends the run with exit code 1, on GPUs as well. In a source checkout (with a Makefile)
    nothing is changed.
    """
    spec = importlib.util.find_spec("megatron")
    if spec is None or not spec.submodule_search_locations:
        return
    for root in spec.submodule_search_locations:
        folder = os.path.join(root, "core", "datasets")
        if os.path.isdir(folder):
            if os.path.exists(os.path.join(folder, "Makefile")):
                return
            _ON_IMPORT.patch_on_import("megatron.core.datasets.utils", _no_compile)
            return


def _no_compile(module: types.ModuleType) -> None:
    module.compile_helpers = lambda: None  # type: ignore[attr-defined]


class _PatchOnImport:
    """Runs a function on a module as soon as it is imported, without importing it now."""

    def __init__(self) -> None:
        self._pending: dict[str, Any] = {}

    def patch_on_import(self, name: str, patch: Any) -> None:
        if name in sys.modules:
            patch(sys.modules[name])
            return
        if not self._pending:
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        self._pending[name] = patch

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        patch = self._pending.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            load(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_ON_IMPORT = _PatchOnImport()


# --------------------------------------------------------------------------- tensors


class _CudaToCpu(TorchFunctionMode):
    """Sends every tensor operation that names a CUDA device to the CPU.

    `tensor.type()` reports the CUDA name, because Megatron's optimizers compare that string.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs:
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": _to_cpu(kwargs["device"])}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        name = getattr(func, "__name__", "")
        if name in _TENSOR_METHODS and args and isinstance(args[0], torch.Tensor):
            handler = _TENSOR_METHODS[name]
            return handler(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, str):
        return "cpu" if value.startswith("cuda") else value
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.device("cpu")
    return value


def _tensor_to(func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    args = (args[0],) + tuple(
        _to_cpu(a) if isinstance(a, str | torch.device) or type(a) is int else a for a in args[1:]
    )
    return func(*args, **kwargs)


def _tensor_type(func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) == 1 and not kwargs:
        name = func(args[0])
        if name.startswith("torch.") and not name.startswith("torch.cuda."):
            name = "torch.cuda." + name[len("torch.") :]
        return name
    wanted_type = args[1] if len(args) > 1 else kwargs.get("dtype")
    if isinstance(wanted_type, str):
        return func(args[0], wanted_type.replace("torch.cuda.", "torch."))
    return func(*args, **kwargs)


def _identity(func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0]


_TENSOR_METHODS = {
    "to": _tensor_to,
    "type": _tensor_type,
    "cuda": _identity,
    "pin_memory": _identity,
    "record_stream": lambda func, args, kwargs: None,
}


# --------------------------------------------------------------------------- torch.cuda


class _Stream:
    """A stream or event that is always finished."""

    cuda_stream = 0
    stream_id = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: Any = None) -> _Stream:
        return _Stream()


class _Properties:
    """Device properties with the fields that the trainer prints or compares."""

    name = "CPU (megatron_dwm host stand-in)"
    major, minor = 0, 0
    multi_processor_count = 1
    warp_size = 32

    def __init__(self) -> None:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.total_memory = pages


def _returning(value: Any) -> Any:
    """Returns a new function of any arguments that returns `value`.

    A new one for each name: torch.compile's rule table refuses one function under two names.
    """
    return lambda *args, **kwargs: value


def _replace_cuda_module() -> None:
    cuda = torch.cuda
    stream = _Stream()

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        "current_device": lambda: int(os.environ.get("LOCAL_RANK", "0")),
        "get_device_name": lambda *a: _Properties.name,
        "get_device_capability": lambda *a: (0, 0),
        "get_device_properties": lambda *a: _Properties(),
        "get_arch_list": lambda: [],
        "current_stream": lambda *a: stream,
        "default_stream": lambda *a: stream,
        "stream": lambda *a: contextlib.nullcontext(),
        "device": lambda *a: contextlib.nullcontext(),
        "Stream": _Stream,
        "ExternalStream": _Stream,
        "Event": _Stream,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *a: True,
        "memory_stats": lambda *a: {},
        "memory_snapshot": lambda *a: [],
        "mem_get_info": lambda *a: (_Properties().total_memory,) * 2,
    }
    for name in (
        "synchronize",
        "set_device",
        "set_stream",
        "empty_cache",
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
        "check_error",
        "ipc_collect",
        "init",
        "_lazy_init",
    ):
        stand_ins[name] = _returning(None)
    for name in (
        "memory_allocated",
        "memory_reserved",
        "max_memory_allocated",
        "max_memory_reserved",
        "device_memory_used",
        "utilization",
    ):
        stand_ins[name] = _returning(0)
    for name, value in stand_ins.items():
        setattr(cuda, name, value)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _returning(None))
    cuda.nvtx.range = lambda *a, **k: contextlib.nullcontext()


# --------------------------------------------------------------------------- random numbers


def _replace_rng() -> None:
    """Maps the CUDA generators to the CPU's.

    `megatron.core.tensor_parallel.random` keeps its own accessors, which reach for the CUDA
    default generators, so those two are replaced when that module is imported.
    """

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *a, **k: torch.get_rng_state()
        module.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed))
        module.initial_seed = lambda: torch.default_generator.initial_seed()
    torch.cuda.default_generators = (torch.default_generator,) * max(1, torch.cuda.device_count())

    def patch(module: types.ModuleType) -> None:
        module._get_cuda_rng_state = get_state  # type: ignore[attr-defined]
        module._set_cuda_rng_state = set_state  # type: ignore[attr-defined]
        logging.getLogger(module.__name__).addFilter(
            lambda record: _RNG_WARNING not in record.getMessage()
        )

    _ON_IMPORT.patch_on_import("megatron.core.tensor_parallel.random", patch)


# --------------------------------------------------------------------------- torch.distributed


def _replace_distributed() -> None:
    dist = torch.distributed
    init_process_group, barrier, new_group = (dist.init_process_group, dist.barrier, dist.new_group)
    all_to_all_single = dist.all_to_all_single

    @functools.wraps(init_process_group)
    def gloo_init(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("backend", None)
        kwargs.pop("device_id", None)
        return init_process_group("gloo", *args[1:], **kwargs)

    @functools.wraps(barrier)
    def host_barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    @functools.wraps(new_group)
    def gloo_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        if kwargs.get("backend") not in (None, "gloo"):
            kwargs["backend"] = "gloo"
        kwargs.pop("pg_options", None)
        return new_group(*args, **kwargs)

    @functools.wraps(all_to_all_single)
    def list_all_to_all(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any):
        # gloo's binding takes split sizes as lists of int; the token dispatcher hands arrays.
        args = tuple(_as_int_list(a) for a in args)
        for key in ("output_split_sizes", "input_split_sizes"):
            if key in kwargs:
                kwargs[key] = _as_int_list(kwargs[key])
        return all_to_all_single(output, input.contiguous(), *args, **kwargs)

    for module in (dist, dist.distributed_c10d):
        module.init_process_group = gloo_init
        module.barrier = host_barrier
        module.new_group = gloo_group
        module.all_to_all_single = list_all_to_all


def _as_int_list(value: Any) -> Any:
    if value is None or not hasattr(value, "__len__"):
        return value
    return [int(v) for v in (value.tolist() if hasattr(value, "tolist") else value)]
