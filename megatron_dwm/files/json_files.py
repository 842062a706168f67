"""Reads JSON from others, and checks its types before it is used.

Python's own reader raises three kinds of errors for bad JSON, two of which are not JSON errors: a
`ValueError` for integers of more than 4,300 digits, and a `RecursionError` for deep nesting.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

# Maximum characters of a value in a message.
_SHOWN = 60


class JsonError(ValueError):
    """What is wrong with a JSON text, in one line that does not name the file."""


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON text.

    Args:
        text: The text; bytes are UTF-8.

    Raises:
        JsonError: It is not JSON, or not representable.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise JsonError(str(error)) from error
    except RecursionError as error:
        raise JsonError("nested too deeply") from error
    except ValueError as error:
        raise JsonError("it has an integer of several thousand digits") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parses a JSON text that must be an object.

    Raises:
        JsonError: It is not JSON, or not an object.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise JsonError(f"not a JSON object, but a {json_type(value)}")
    return value


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        JsonError: It does not hold JSON, or not an object.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return parse_object(file.read())


def repeated_keys(text: str) -> set[str]:
    """Returns the keys that an object has twice; JSON readers use the last one.

    Args:
        text: A JSON object that parses.
    """
    objects: list[list[str]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        objects.append([name for name, _ in pairs])

    json.loads(text, object_pairs_hook=keep)
    # The outermost object is completed last.
    return {name for name in objects[-1] if objects[-1].count(name) > 1}


def json_type(value: object) -> str:
    """Returns the name of a parsed value's type, for messages."""
    return "null" if value is None else type(value).__name__


def shown(value: object) -> str:
    """Returns the beginning of a value, for a one-line message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {json_type(value)} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def json_text(value: Any) -> str:
    """Returns a value as JSON for others to read; NaN and infinity, which JSON lacks, as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
