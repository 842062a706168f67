"""Rebinding of module attributes: signature checked first, restored on exit."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from megatron_dwm.errors import DWMError

SUPPORTED = ((0, 19), (0, 20))


def check_version() -> None:
    """Refuses a Megatron outside the supported range.

    Raises:
        DWMError: names the version found and the versions allowed.
    """
    from megatron.core.package_info import __version__ as version

    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise DWMError(
            f"megatron-core {version} was found; megatron_dwm supports >=0.19,<0.20. "
            'Install one of those: pip install "megatron-core>=0.19,<0.20"'
        )


@contextlib.contextmanager
def rebound(
    module: Any,
    name: str,
    parameters: tuple[str, ...],
    wrapper: Callable[..., Any],
) -> Iterator[None]:
    """A context in which `module.name(...)` is `wrapper(original, ...)`.

    Args:
        module: a module of Megatron.
        name: the function to wrap.
        parameters: names that its signature must hold, in this order.
        wrapper: called with the original function first.

    Raises:
        DWMError: the function is missing or its signature has changed.
    """
    original = getattr(module, name, None)
    where = f"{module.__name__}.{name}"
    if original is None:
        raise DWMError(f"{where} is missing; this Megatron is not one that megatron_dwm supports")
    found = tuple(inspect.signature(original).parameters)
    if tuple(name for name in found if name in parameters) != parameters:
        raise DWMError(
            f"{where} takes {', '.join(found)}, but {', '.join(parameters)} were expected in this "
            "order; this Megatron is not one that megatron_dwm supports"
        )

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)
