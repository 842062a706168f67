"""Learned data weighting for pre-training with NVIDIA Megatron.

A data weighting model (DWM) gives every sample of the global batch a weight while the
language model trains, and is itself trained by bilevel optimisation on a small meta set.
Importing this package has no side effects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["DWMConfig", "DWMError", "__version__", "add_dwm_args", "attach"]

if TYPE_CHECKING:
    from megatron_dwm.config import DWMConfig
    from megatron_dwm.config.flags import add_dwm_args
    from megatron_dwm.errors import DWMError
    from megatron_dwm.hosts.megatron_lm.attach import attach

    __version__: str

_HOMES = {
    "DWMConfig": "megatron_dwm.config",
    "DWMError": "megatron_dwm.errors",
    "add_dwm_args": "megatron_dwm.config.flags",
    "attach": "megatron_dwm.hosts.megatron_lm.attach",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that importing the package has no side effects."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        return _built_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _built_version() -> str:
    """Returns the version that the build recorded; a checkout may never have been built."""
    try:
        from megatron_dwm._version import version
    except ImportError:
        return "0+checkout"
    return version
