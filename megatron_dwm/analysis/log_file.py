"""The step log as a file: its name, and how it is read. Imports neither torch nor Megatron."""

from __future__ import annotations

import json
from typing import Any

FILE_NAME = "dwm_log.jsonl"


def read_log(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a step log, a torn last line left out."""
    lines = []
    with open(path) as file:
        for text in file:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines
