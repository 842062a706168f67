"""Learned data weighting for pre-training with NVIDIA Megatron.

A data weighting model (DWM) gives every sample of the global batch a weight while the
language model trains, and is itself trained by bilevel optimisation on a small meta set.
Importing this package has no side effects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["DWMConfig", "DWMError", "add_dwm_args", "attach"]

if TYPE_CHECKING:
    from megatron_dwm.config import DWMConfig
    from megatron_dwm.config.flags import add_dwm_args
    from megatron_dwm.errors import DWMError
    from megatron_dwm.hosts.megatron_lm.attach import attach

_HOMES = {
    "DWMConfig": "megatron_dwm.config",
    "DWMError": "megatron_dwm.errors",
    "add_dwm_args": "megatron_dwm.config.flags",
    "attach": "megatron_dwm.hosts.megatron_lm.attach",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that the import itself stays free of effects."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
