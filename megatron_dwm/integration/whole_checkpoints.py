"""What a run that was killed while saving leaves in its folder, and how the next run takes it.

The trainer writes an iteration's shards, then the files that describe them, and then the tracker,
`latest_checkpointed_iteration.txt`, which names the newest whole iteration. Two moments in between
need a hand. The tracker is emptied before its number is written, so that a kill, or a full disk,
can leave it empty, with which the trainer would not start again. And a folder that was whole but
for the tracker still has its description while it is saved once more, and would look whole when
that is cut short.
"""

from __future__ import annotations

import os
import re
from typing import Any

from megatron.training import checkpointing

from megatron_dwm.errors import DWMError

# Written last, in this order.
_DESCRIPTIONS = (".metadata", "metadata.json")


def mend_tracker(run: Any) -> str | None:
    """Makes the tracker of `--load` name a whole iteration again where it names nothing.

    To be called on one rank, before the trainer loads.

    Args:
        run: Megatron's arguments.

    Returns:
        A line for the log where something was done.

    Raises:
        DWMError: the tracker names nothing and no iteration is whole.
    """
    if not run.load:
        return None
    tracker = checkpointing.get_checkpoint_tracker_filename(run.load)
    if not os.path.isfile(tracker) or _named(tracker) is not None:
        return None
    whole = whole_iterations(run.load)
    if not whole:
        raise DWMError(
            f"{tracker} names no iteration and {run.load} holds no whole checkpoint; point --load "
            "to another folder, or leave it out to start anew"
        )
    # Beside, then in its place: a kill in between loses nothing.
    with open(f"{tracker}.tmp", "w") as file:
        file.write(str(whole[-1]))
    os.replace(f"{tracker}.tmp", tracker)
    return (
        f"DWM: NOTE: {tracker} named no iteration, as after a kill or on a full disk; it names the "
        f"newest whole checkpoint now, iteration {whole[-1]}"
    )


def whole_iterations(folder: str) -> list[int]:
    """Returns the iterations of a run's folder that were saved to the end, the newest last."""
    found = []
    for name in os.listdir(folder):
        path = os.path.join(folder, name, _DESCRIPTIONS[-1])
        number = re.fullmatch(r"iter_(\d{7,})", name)
        described = all(os.path.exists(os.path.join(folder, name, x)) for x in _DESCRIPTIONS)
        if number is not None and described:
            found.append((os.path.getmtime(path), int(number[1])))
    return [iteration for _, iteration in sorted(found)]


def forget_unfinished(run: Any, iteration: int | None) -> None:
    """Before an iteration is saved, removes the description of an unfinished save of it.

    To be called on one rank. A folder that the tracker names is left alone.

    Args:
        run: Megatron's arguments.
        iteration: the one that is about to be saved.
    """
    if not run.save or iteration is None:
        return
    tracker = checkpointing.get_checkpoint_tracker_filename(run.save)
    if os.path.isfile(tracker) and _named(tracker) == str(iteration):
        return
    folder = checkpointing.get_checkpoint_name(run.save, iteration, return_base_dir=True)
    for name in reversed(_DESCRIPTIONS):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            os.remove(path)


def _named(tracker: str) -> str | None:
    with open(tracker) as file:
        text = file.read().strip()
    return text if text.isdecimal() or text == "release" else None
