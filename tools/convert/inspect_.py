"""Lists what a run folder holds: which checkpoints are whole, which are damaged, and how."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from megatron_dwm.checkpoint.health import common_state, iterations_of, problems_of, tracked
from megatron_dwm.conversion import ConversionError
from megatron_dwm.conversion.families import FAMILIES, shape_from_args

_HELP = """Lists the checkpoints and stage snapshots of a run: whole or damaged (and how), the
model, the parallel layout that it was written with, and what there is of the weighting model (DWM).
Without --deep no tensor is read: indexes, sizes and the small files are compared. With it every
record's CRC-32 is, and with Megatron's --verify-integrity every file's SHA-256.
Exit code 0: all are whole, 1: some are damaged, 2: bad input."""

# Where a run keeps the weight files that its checkpoints name.
_WEIGHTS = "dwm_weights"
_PARALLEL = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "dp": "data_parallel_size",
    "ranks": "world_size",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers `inspect` and its flags."""
    command = commands.add_parser(
        "inspect",
        help="which checkpoints of a run are whole",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=inspect)
    add = command.add_argument
    add("path", metavar="RUN", help="run folder, or one iter_ or dwm_stage_ folder")
    add("--iteration", type=int, metavar="N", help="look at one iteration only")
    add("--deep", action="store_true", help="read every file and compare checksums")
    add("--json", dest="json_file", metavar="FILE", help="write the findings to FILE")


def inspect(
    path: str, iteration: int | None = None, deep: bool = False, json_file: str | None = None
) -> int:
    """Inspects a run; the arguments are the command line's.

    Returns:
        0: all is whole; 1: something is damaged; 2: bad input, which one line names.
    """
    try:
        found = look_at(Path(path), iteration, deep)
        if json_file is not None:
            _write(Path(json_file), found)
    except (ConversionError, OSError) as error:
        print(f"tools/convert inspect: {error}", file=sys.stderr)
        return 2
    print("\n".join(_lines(found)))
    damaged = found["problems"] or any(entry["problems"] for entry in found["checkpoints"])
    return 1 if damaged else 0


def look_at(root: Path, iteration: int | None = None, deep: bool = False) -> dict[str, Any]:
    """Returns all that `inspect` prints, as plain values.

    Args:
        root: Run folder, or one checkpoint.
        iteration: One iteration only.
        deep: Read every file.

    Returns:
        `run`, `tracker` (folder that the next run loads), `problems` of the run folder, and
        `checkpoints`: `name`, `bytes`, `problems`, and where it could be read `iteration`,
        `model`, `parallel` and `dwm`.

    Raises:
        ConversionError: There is no such folder, or nothing in it to look at.
    """
    if not root.is_dir():
        raise ConversionError(f"{root} is no folder; give a run's --save folder.")
    found: dict[str, Any] = {"run": str(root), "tracker": None, "problems": []}
    if re.fullmatch(r"iter_\d{7,}|release|dwm_stage_\d+", root.name):
        if iteration is not None:
            raise ConversionError(f"--iteration {iteration}: {root} is one checkpoint already.")
        found["checkpoints"] = [_checkpoint(root, deep)]
        return found
    names = [f"iter_{number:07d}" for number in iterations_of(root)]
    names += sorted(
        p.name for p in root.iterdir() if re.fullmatch(r"release|dwm_stage_\d+", p.name)
    )
    try:
        found["tracker"] = tracked(root)
    except ConversionError as error:
        found["problems"].append(str(error))
    if found["tracker"] is not None and found["tracker"] not in names:
        found["problems"].append(f"the tracker names {found['tracker']}, which is not there")
    if iteration is not None:
        wanted = f"iter_{iteration:07d}"
        if wanted not in names:
            raise ConversionError(f"--iteration {iteration}: {root} has {', '.join(names) or '-'}.")
        names = [wanted]
    if not names and not found["problems"]:
        raise ConversionError(f"{root} has no iter_*, release or dwm_stage_* folder.")
    found["checkpoints"] = [_checkpoint(root / name, deep) for name in names]
    return found


def _checkpoint(folder: Path, deep: bool) -> dict[str, Any]:
    problems = problems_of(folder, deep)
    entry: dict[str, Any] = {
        "name": folder.name,
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "problems": problems,
    }
    try:
        common = common_state(folder)
    except (ConversionError, OSError):
        # What there is to say is among the problems; an mp_rank_* folder has no such state.
        return entry
    args = common.get("args")
    entry["iteration"] = common.get("iteration")
    if args is not None:
        entry["model"] = _model(args)
        entry["parallel"] = {key: getattr(args, name, None) for key, name in _PARALLEL.items()} | {
            "distributed_optimizer": bool(getattr(args, "use_distributed_optimizer", False))
        }
    entry["dwm"] = _dwm(common.get("dwm"))
    sampling = (common.get("dwm") or {}).get("sampling")
    if sampling is not None:
        digests = sorted({d for stages in sampling["stages"].values() for _, d in stages})
        entry["weight_files"] = digests
        problems += [
            f"{_WEIGHTS}/{digest}.weights is missing, by which documents were drawn"
            for digest in digests
            if not (folder.parent / _WEIGHTS / f"{digest}.weights").is_file()
        ]
    return entry


def _model(args: Any) -> dict[str, Any]:
    try:
        shape = shape_from_args(args)
    except ConversionError as error:
        return {"family": None, "reason": str(error)}
    return {
        "family": FAMILIES[shape.family].label,
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "heads": shape.num_attention_heads,
        "query_groups": shape.num_query_groups,
        "padded_vocabulary": shape.vocab_size,
        "tied": shape.tied,
    }


def _dwm(state: Any) -> dict[str, Any] | None:
    if not isinstance(state, dict) or not state.get("shape"):
        return None
    shape = state["shape"]
    return {
        "layers": shape.get("num_layers"),
        "hidden_size": shape.get("hidden_size"),
        "pooling": shape.get("pooling"),
        "meta_steps": state.get("meta_steps_taken"),
        "optimizer": bool(state.get("has_optimizer")),
        "stages": state.get("stages"),
    }


# ------------------------------------------------------------------------------------- printing


def _write(path: Path, found: dict[str, Any]) -> None:
    if not path.absolute().parent.is_dir():
        raise ConversionError(f"--json {path}: its folder does not exist.")
    path.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


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
        kept = "with its optimizer" if dwm["optimizer"] else "weights only"
        parts = [f"DWM after {dwm['meta_steps']} meta steps", kept]
    if "weight_files" in entry:
        parts.append(f"{len(entry['weight_files'])} weight file(s)")
    return ", ".join(parts)


def _about_run(entry: dict[str, Any]) -> list[str]:
    """Describes model, layout and weighting model of the last checkpoint that can be read."""
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
        stages = dwm["stages"]
        lines.append(
            f"DWM      layers {dwm['layers']}, hidden size {dwm['hidden_size']}, {dwm['pooling']} "
            f"pooling; schedule {stages}"
        )
    return lines
