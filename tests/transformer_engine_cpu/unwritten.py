"""What the reference does not compute is refused by name: the tests do not need it."""

from __future__ import annotations

from typing import Any


def refuse(function: str, **settings: Any) -> None:
    """Refuses settings that are not None.

    Args:
        function: of the extension.
        settings: of its call, by name.

    Raises:
        NotImplementedError: one of them was given.
    """
    for name, value in settings.items():
        if value is not None:
            raise NotImplementedError(f"the reference of {function} takes no {name}")
