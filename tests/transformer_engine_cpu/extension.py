"""The module `transformer_engine_torch`: a reference in plain torch, by the extension's names."""

from __future__ import annotations

import types
from typing import Any

from tests.transformer_engine_cpu import (
    activations,
    enumerations,
    multi_tensor,
    norms,
    products,
    softmaxes,
)

NAME = "transformer_engine_torch"
_ROOMS = (products, norms, softmaxes, multi_tensor)


class Partial(types.ModuleType):
    """What is not written is there for imports and comparisons, and raises when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _missing(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Placeholder(type):
    """A function, class or enumeration that no test needs."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Member(len(vars(cls)))  # a number of its own
        setattr(cls, name, member)
        return member


class _Member(int):
    """A member of an enumeration that is not written."""


def _missing(name: str) -> type:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name} is not in tests/transformer_engine_cpu")

    return _Placeholder(name, (), {"__new__": refuse})


def module() -> Partial:
    """Returns the module, ready to be put where Python finds it."""
    found = Partial(NAME)
    for kind in enumerations.ALL:
        setattr(found, kind.__name__, kind)
    for room in _ROOMS:
        for name, value in vars(room).items():
            own = getattr(value, "__module__", None) == room.__name__
            if isinstance(value, types.FunctionType) and own and not name.startswith("_"):
                setattr(found, name, value)
    for name, function in (activations.functions() | _DEVICE).items():
        setattr(found, name, function)
    return found


_DEVICE = {
    "get_cublasLt_version": lambda: 130000,
    "get_cudnn_version": lambda: 91900,
    "get_num_cublas_streams": lambda: 4,
    "get_fused_attn_backend": lambda *args, **kwargs: (
        enumerations.NVTE_Fused_Attn_Backend.NVTE_No_Backend,
        "no GPU",
    ),
}
