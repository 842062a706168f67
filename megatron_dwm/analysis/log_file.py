"""The step log as a file: its name, and how it is read. Imports neither torch nor Megatron."""

from __future__ import annotations

from typing import Any

from megatron_dwm.json_files import JsonError, parse_object

FILE_NAME = "dwm_log.jsonl"


def read_log(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a step log, a torn last line left out."""
    lines = []
    with open(path) as file:
        for text in file:
            try:
                line = parse_object(text)
            except JsonError:
                continue
            if isinstance(line.get("iteration"), int):
                lines.append(line)
    return lines
