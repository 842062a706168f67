"""Repairs what a run that was killed while saving leaves in its folder.

The trainer writes an iteration's shards, then the files that describe them, and then the tracker,
`latest_checkpointed_iteration.txt`, which names the newest whole iteration. Two cases need repair.
The tracker is emptied before its number is written, so that a kill, or a full disk, can leave it
empty, and the trainer would not start again. And a folder that the tracker does not name still has
its description while it is saved again, and would look whole if that save is cut short.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megatron.training import checkpointing

from megatron_dwm.checkpoint.health import INDEX, MARKER, iterations_of, problems_of


def mend_tracker(run: Any, printer: Callable[[str], None]) -> None:
    """Makes an empty tracker in `--load` or `--save` name the checkpoint that was completed last.

    To be called on one rank, before the trainer loads. If no checkpoint is whole, nothing is done.

    Args:
        run: Megatron's arguments.
        printer: prints a line.
    """
    if run.ckpt_format != "torch_dist":
        return
    for folder in dict.fromkeys(f for f in (run.load, run.save) if f):
        _mend_tracker_of(folder, printer)


def _mend_tracker_of(folder: str, printer: Callable[[str], None]) -> None:
    tracker = checkpointing.get_checkpoint_tracker_filename(folder)
    # A file system that lost data before it reached the disk leaves zeros.
    if not os.path.isfile(tracker) or _text(tracker):
        return
    whole = _finished_last(folder)
    if whole is None:
        return
    # Written beside it, then moved into its place: a kill in between loses nothing.
    with open(f"{tracker}.tmp", "w") as file:
        file.write(str(whole))
    os.replace(f"{tracker}.tmp", tracker)
    printer(
        f"DWM: NOTE: {tracker} was empty, as after a kill or on a full disk; it now names "
        f"iteration {whole}, the whole checkpoint that was completed last"
    )


def forget_unfinished(run: Any, iteration: int | None) -> None:
    """Removes the description of an unfinished save of an iteration, before it is saved again.

    To be called on one rank. A folder that the tracker names is left alone.

    Args:
        run: Megatron's arguments.
        iteration: the one that is about to be saved.
    """
    if not run.save or iteration is None:
        return
    tracker = checkpointing.get_checkpoint_tracker_filename(run.save)
    if os.path.isfile(tracker) and _text(tracker) == str(iteration):
        return
    folder = checkpointing.get_checkpoint_name(run.save, iteration, return_base_dir=True)
    # In the reverse order of writing.
    for name in (MARKER, INDEX):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            os.remove(path)


def _finished_last(run: str) -> int | None:
    """Returns the whole iteration with the newest marker: a run may go back, so not the highest."""

    def folder(iteration: int) -> str:
        return os.path.join(run, f"iter_{iteration:07d}")

    whole = [iteration for iteration in iterations_of(run) if not problems_of(folder(iteration))]
    return max(
        whole, key=lambda k: os.stat(os.path.join(folder(k), MARKER)).st_mtime_ns, default=None
    )


def _text(tracker: str) -> str:
    with open(tracker, "rb") as file:
        return file.read().decode("utf-8", "replace").strip("\0 \t\r\n")
