"""Part of the CPU stand-in: tensor operations that name a CUDA device go to the CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaToCpu(TorchFunctionMode):
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


def keep_in_backward(mode: TorchFunctionMode) -> None:
    """Keeps the mode active in nested backward passes, as in activation recomputation.

    torch calls a mode with the mode itself switched off. It then stays off for everything that a
    call such as `torch.autograd.backward` does, including Megatron's backward functions.
    """
    run = torch.autograd._engine_run_backward

    @functools.wraps(run)
    def under_mode(*args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_function_stack():
            return run(*args, **kwargs)
        with mode:
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = under_mode


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
