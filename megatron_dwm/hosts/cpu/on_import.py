"""Part of the CPU stand-in: changes a module as soon as it is imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any


class PatchOnImport:
    """Runs a function on a module as soon as it is imported, without importing it now."""

    def __init__(self) -> None:
        self._pending: dict[str, Any] = {}

    def patch_on_import(self, name: str, patch: Any) -> None:
        """Runs `patch` on the module `name`: now if it is imported already, else on import."""
        if name in sys.modules:
            patch(sys.modules[name])
            return
        if not self._pending:
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        self._pending[name] = patch

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Implements a finder on `sys.meta_path`."""
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


ON_IMPORT = PatchOnImport()
