"""Loads the C++ data engine when needed: only drawing by weight needs it."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from megatron_dwm.errors import DWMError


@cache
def engine() -> Any:
    """Returns the compiled module.

    Raises:
        DWMError: it was not built, or does not match this Python.
    """
    try:
        return importlib.import_module("megatron_dwm._data_engine")
    except ImportError as error:
        raise DWMError(
            f"the data engine, which draws documents by weight, cannot be loaded ({error}); build "
            "it with `make setup` or `pip install .`"
        ) from error
