"""The files of the step log: their names, reading, and what a resumed run keeps.

The newest lines are in `dwm_log.jsonl`. When it reaches its size limit it is renamed to a part,
`dwm_log.1.jsonl`, the next one to `dwm_log.2.jsonl`, and so on: the lowest number is the oldest.
Lines are in the order of iterations throughout. This module imports neither torch nor Megatron.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from megatron_dwm.files.json_files import JsonError, parse_object

FILE_NAME = "dwm_log.jsonl"
# Seconds of a meta step's passes, by the pass's name.
PASS_SECONDS = {
    "meta_gradient": "seconds_meta_gradient",
    "inner": "seconds_inner",
    "influence": "seconds_influence",
    "learn": "seconds_learn",
}
# Values that differ between repetitions of the same training.
CLOCK_FIGURES = ("meta_seconds", *PASS_SECONDS.values(), "weighting_time_share")
# Bytes read at once on the way back from the end.
_BLOCK = 1 << 16


def older_parts(path: str) -> list[str]:
    """Returns the finished parts of a step log, oldest first.

    Args:
        path: path of `dwm_log.jsonl`.
    """
    folder, name = os.path.split(path)
    stem, ending = os.path.splitext(name)
    numbered = re.compile(rf"{re.escape(stem)}\.(\d+){re.escape(ending)}")
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    found = [match for match in map(numbered.fullmatch, names) if match]
    found.sort(key=lambda match: int(match[1]))
    return [os.path.join(folder, match[0]) for match in found]


def next_part(path: str) -> str:
    """Returns the name under which `dwm_log.jsonl` becomes a finished part."""
    stem, ending = os.path.splitext(path)
    older = older_parts(path)
    last = int(older[-1].removesuffix(ending).rpartition(".")[2]) if older else 0
    return f"{stem}.{last + 1}{ending}"


def parts(path: str) -> list[str]:
    """Returns all files of a step log, oldest first.

    Args:
        path: path of `dwm_log.jsonl`.
    """
    return older_parts(path) + ([path] if os.path.isfile(path) else [])


def iterate_log(path: str, counted: Callable[[int], Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the lines of all parts of a step log, without torn lines.

    Args:
        path: path of `dwm_log.jsonl`.
        counted: called with the bytes of each line read, including torn ones.

    Raises:
        FileNotFoundError: there is none.
    """
    for part in parts(path) or [path]:
        with open(part, "rb") as file:
            for text in file:
                if counted is not None:
                    counted(len(text))
                line = _parsed(text)
                if line is not None:
                    yield line


def read_log(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a step log, see `iterate_log`."""
    return list(iterate_log(path))


def cut_after(path: str, iteration: int) -> None:
    """Drops the lines of later iterations, and a torn last line.

    Only the end of the last part is read, as far back as later lines go; lines that stay are not
    rewritten. A part with only later lines is removed, and the one before it is checked. At every
    moment the log is whole up to the iteration: a kill loses nothing.

    Args:
        path: path of `dwm_log.jsonl`.
        iteration: the last iteration to keep.
    """
    for part in reversed(parts(path)):
        end = _end_of_kept(part, iteration) if iteration > 0 else 0
        if end > 0:
            if end < os.path.getsize(part):
                os.truncate(part, end)
            return
        os.remove(part)


def _end_of_kept(part: str, iteration: int) -> int:
    """Returns the number of bytes of a part that hold lines up to the iteration."""
    with open(part, "rb") as file:
        first = _parsed(file.read(_BLOCK).partition(b"\n")[0])
        if first is not None and first["iteration"] > iteration:
            return 0
        for end, text in _lines_from_the_end(file):
            line = _parsed(text)
            if line is not None and line["iteration"] <= iteration:
                return end
    return 0


def _lines_from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields the complete lines of a file, the last one first, and where each ends."""
    start = end = file.seek(0, os.SEEK_END)
    text = b""  # bytes of the file from `start` to `end`
    while start > 0:
        size = min(_BLOCK, start)
        start -= size
        file.seek(start)
        text = file.read(size) + text
        # The first line in the buffer is complete only at the beginning of the file.
        whole = 0 if start == 0 else text.find(b"\n") + 1
        if whole == 0 and start > 0:
            continue
        *lines, torn = text[whole:].split(b"\n")
        end -= len(torn)
        for line in reversed(lines):
            yield end, line
            end -= len(line) + 1
        text = text[:whole]


def _parsed(text: bytes) -> dict[str, Any] | None:
    """Returns a line of the log, or None if it is not one."""
    try:
        line = parse_object(text)
    except JsonError:
        return None
    return line if isinstance(line.get("iteration"), int) else None
