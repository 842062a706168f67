"""Before the trainer loads a checkpoint: is it whole?"""

from __future__ import annotations

import os
from typing import Any

from megatron_dwm.conversion.checkpoint_health import last_whole, problems_of, tracked
from megatron_dwm.conversion.errors import ConversionError
from megatron_dwm.errors import DWMError

_SHOWN = 3


def check_checkpoint(run: Any) -> None:
    """Checks, on one rank, the checkpoint that the trainer is about to load.

    No tensor is read; see `problems_of` for what is noticed.

    Args:
        run: Megatron's arguments.

    Raises:
        DWMError: It is damaged; names the files and the latest earlier iteration that is whole.
    """
    if not run.load or run.ckpt_format != "torch_dist":
        return  # Other formats are the trainer's own affair.
    if not os.path.isdir(run.load):
        return
    try:
        name = f"iter_{run.ckpt_step:07d}" if run.ckpt_step else tracked(run.load)
    except ConversionError as error:
        raise DWMError(f"--load {run.load}: {error} {_way_out(run, None)}") from error
    if name is None:
        return  # Nothing was saved there: the trainer starts at iteration 0.
    # A start with --finetune does not look at the iteration that is written inside.
    problems = problems_of(os.path.join(run.load, name), any_iteration=run.finetune)
    if not problems:
        return
    shown = "; ".join(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown += f"; and {len(problems) - _SHOWN} more"
    before = int(name[5:]) if name.startswith("iter_") else None
    raise DWMError(
        f"--load {run.load}: the checkpoint {name} is damaged: {shown}. {_way_out(run, before)}"
    )


def _way_out(run: Any, before: int | None) -> str:
    whole = last_whole(run.load, before)
    if whole is None:
        return (
            "No earlier iteration is whole: restore the files from a copy, or start anew with "
            "another --save and --load"
        )
    return f"Iteration {whole} is whole: go on from there with --ckpt-step {whole}"
