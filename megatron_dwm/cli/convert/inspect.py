"""Lists the checkpoints and stage snapshots of a run, and whether each is whole or damaged.

    megatron-dwm convert inspect runs/dwm --deep

also names the model, the parallel layout that it was written with, and what the checkpoints hold of
the weighting model (DWM). Without --deep no tensor is read: only indexes, sizes and small files are
checked. With --deep every record's CRC-32 is checked too, and every file's SHA-256 if the run used
Megatron's --verify-integrity.
Exit code 0: all are whole; 1: some are damaged; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_dwm.errors import ConversionError
from megatron_dwm.progress import working

_STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's flags."""
    add = parser.add_argument
    add(
        "path",
        nargs="?",
        metavar="RUN",
        help="run folder, or one iter_ or dwm_stage_ folder",
    )
    add("--iteration", type=int, metavar="N", help="look at one iteration only")
    add("--deep", action="store_true", help="read every file and compare checksums")
    add(
        "--json",
        dest="json_file",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="print one JSON object and nothing else; with FILE, write it there beside the text",
    )


def run(
    path: str | None = None,
    iteration: int | None = None,
    deep: bool = False,
    json_file: str | None = None,
) -> int:
    """Inspects a run; the arguments are the command line's.

    Returns:
        0: all is whole; 1: something is damaged.

    Raises:
        ConversionError: Bad input.
    """
    if path is None and json_file is not None and Path(json_file).is_dir():
        # `--json RUN`
        path, json_file = json_file, _STDOUT
    if path is None:
        raise ConversionError("RUN is missing; give a run's --save folder.")
    from megatron_dwm.checkpoint.overview import look_at

    with working("reading"):
        found = look_at(Path(path), iteration, deep)
    if json_file not in (None, _STDOUT):
        _write(Path(json_file), found)
    if json_file == _STDOUT:
        sys.stdout.write(_as_json(found))
    else:
        print("\n".join(_lines(found)))
    damaged = found["problems"] or any(entry["problems"] for entry in found["checkpoints"])
    return 1 if damaged else 0


# ------------------------------------------------------------------------------------- printing


def _write(path: Path, found: dict[str, Any]) -> None:
    if not path.absolute().parent.is_dir():
        raise ConversionError(f"--json {path}: its folder does not exist.")
    path.write_text(_as_json(found), encoding="utf-8")


def _as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, default=str) + "\n"


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [found["run"]]
    lines += [f"  PROBLEM: {problem}" for problem in found["problems"]]
    described: list[str] = []
    for entry in found["checkpoints"]:
        state = "DAMAGED" if entry["problems"] else "whole"
        latest = "  <- loaded next" if entry["name"] == found["tracker"] else ""
        size = f"{entry['bytes'] / 1e6:.1f} MB"
        lines.append(f"  {entry['name']:<15} {state:<8} {size:>10}  {_about_dwm(entry)}{latest}")
        lines += [f"      {problem}" for problem in entry["problems"]]
        if "model" in entry:
            described = _about_run(entry)
    return [*lines, *described]


def _about_dwm(entry: dict[str, Any]) -> str:
    if "dwm" not in entry:
        return ""
    dwm = entry["dwm"]
    parts = ["no DWM"]
    if dwm is not None:
        parts = [f"DWM after {dwm['meta_steps']} meta steps"]
        if dwm["layers"] is not None:  # a head has no optimizer
            parts.append("with its optimizer" if dwm["optimizer"] else "weights only")
    if "weight_files" in entry:
        parts.append(f"{len(entry['weight_files'])} weight file(s)")
    return ", ".join(parts)


def _about_run(entry: dict[str, Any]) -> list[str]:
    """Describes the model, layout and weighting model of the last readable checkpoint."""
    model, parallel, dwm = entry["model"], entry["parallel"], entry["dwm"]
    if model["family"] is None:
        lines = [f"model    {model['reason']}"]
    else:
        numbers = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in model.items() if name != "family"
        )
        lines = [f"model    {model['family']}: {numbers}"]
    sizes = ", ".join(
        f"{name} {value}" for name, value in parallel.items() if value not in (None, False)
    )
    lines.append(f"written  {sizes.replace('_', ' ')}")
    if dwm is not None:
        kind = "no separate model: a head on the language model's states, or a fixed rule"
        if dwm["layers"] is not None:
            sizes = f"layers {dwm['layers']}, hidden size {dwm['hidden_size']}"
            kind = f"{sizes}, {dwm['pooling']} pooling"
        stages = dwm["stages"]
        if isinstance(stages, dict):
            stages = ", ".join(f"{name} {value}" for name, value in stages.items())
        lines.append(f"DWM      {kind}; {stages}")
    return lines
