"""Lists a run folder's checkpoints: which are whole, and which are damaged and how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_dwm.checkpoint.health import common_state, iterations_of, problems_of, tracked
from megatron_dwm.conversion.families import FAMILIES, shape_from_args
from megatron_dwm.errors import ConversionError

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


def look_at(root: Path, iteration: int | None = None, deep: bool = False) -> dict[str, Any]:
    """Returns everything that `inspect` prints, as plain values.

    Args:
        root: Run folder, or one checkpoint.
        iteration: One iteration only.
        deep: Read every file.

    Returns:
        `run`, `tracker` (folder that the next run loads), `problems` of the run folder, and
        `checkpoints`: `name`, `bytes`, `problems`, and, if readable, `iteration`, `model`,
        `parallel` and `dwm`.

    Raises:
        ConversionError: There is no such folder, or nothing in it to look at.
    """
    if not root.is_dir():
        raise ConversionError(f"{root} is not a folder; give a run's --save folder.")
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
        # Errors are already among the problems; an mp_rank_* folder has no such state.
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
