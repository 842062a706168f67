"""Part of the CPU stand-in: the functions and classes of `torch.cuda` that the trainer uses."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch


class _Stream:
    """A stream or event that has always finished."""

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

    Each name gets a new one: torch.compile's rule table refuses one function under two names.
    """
    return lambda *args, **kwargs: value


def replace_cuda_module() -> None:
    """Replaces them with harmless ones."""
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
