"""Snapshots of the weighting model, one per stage, for transfer to another run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_dwm.checkpoint.state import (
    KEY,
    check_shape,
    has_policy,
    load_sharded_state,
    sharded_state,
)
from megatron_dwm.core.agreement import on_each_rank, on_first_rank
from megatron_dwm.core.stored_state import common_state
from megatron_dwm.errors import DWMError
from megatron_dwm.files import folder_swap
from megatron_dwm.step.train_step import DWMTrainStep


def snapshot_name(stage: int) -> str:
    """Returns the folder name of a stage's snapshot; stages are counted from 1 in names."""
    return f"dwm_stage_{stage + 1:03d}"


def save_snapshot(step: DWMTrainStep, folder: str) -> None:
    """Saves the DWM's weights and shape as a separate checkpoint.

    Args:
        step: holds the DWM.
        folder: the snapshot's folder; an older snapshot there is replaced once this one is
            complete.

    Raises:
        DWMError: on every rank, if rank 0 cannot write there.
    """
    new = folder_swap.beside(folder)

    def begin() -> None:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new, exist_ok=True)

    on_first_rank(partial(_writing, folder, begin))
    state = sharded_state(step, None, with_optimizer=False, loading=False)
    dist_checkpointing.save({KEY: state}, new)
    torch.distributed.barrier()
    on_first_rank(partial(_writing, folder, partial(folder_swap.swap_in, folder)))


def _writing(folder: str, call: Callable[[], None]) -> None:
    try:
        call()
    except OSError as error:
        raise DWMError(
            f"the snapshot {folder} cannot be written ({error}); make room, or resume with another "
            "--save"
        ) from error


def load_snapshot(step: DWMTrainStep, folder: str, stage: int | None = None) -> str:
    """Loads a snapshot of a DWM: weights only, fresh optimizer.

    Args:
        step: receives the weights.
        folder: a snapshot, or a folder of `dwm_stage_*` snapshots.
        stage: 0-based stage whose snapshot to load; the last one if it has none.

    Returns:
        A line for the log.

    Raises:
        DWMError: there is no snapshot, or it has another shape.
    """
    # The folder may belong to another run that is still adding snapshots.
    path = on_first_rank(partial(find_snapshot, folder, stage))
    found = on_each_rank(partial(_snapshot_state, step, path))
    frozen = step.config.schedule == "frozen"
    # A model that keeps learning takes only its weights; the rest of the state belongs to the run,
    # and the language model, that it comes from.
    with_policy = has_policy(found) and (frozen or step.scorer is None)
    load_sharded_state(step, path, False, with_policy, False)
    if not frozen:
        step.policy.forget_evidence()
    step.warm_started = True
    return f"DWM: weights from {path}"


def _snapshot_state(step: DWMTrainStep, path: str) -> dict[str, Any]:
    """Returns a snapshot's common state, after checking its shape."""
    found = common_state(path).get(KEY)
    if found is None or found["shape"] is None:
        raise DWMError(f"--dwm-load {path} holds no weighting model")
    check_shape(step, found["shape"], path)
    return found


def find_snapshot(folder: str, stage: int | None = None) -> str:
    """Returns the snapshot of a stage below a folder, or the last one, or the folder itself."""
    if not os.path.isdir(folder):
        raise DWMError(f"--dwm-load {folder}: no such folder")
    folder_swap.mend(folder)
    names = sorted(
        n
        for n in os.listdir(folder)
        # Written last: a snapshot without it was being saved when its run was killed.
        if re.fullmatch(r"dwm_stage_\d+", n) and _is_whole(os.path.join(folder, n))
    )
    if names:
        wanted = snapshot_name(stage) if stage is not None else names[-1]
        if wanted not in names and os.path.isdir(os.path.join(folder, wanted)):
            raise DWMError(
                f"--dwm-load {folder}: {wanted} has no metadata.json, so its save was cut short; "
                "restore it, or remove it to use the last snapshot"
            )
        return os.path.join(folder, wanted if wanted in names else names[-1])
    if _is_whole(folder):
        return folder
    raise DWMError(
        f"--dwm-load {folder} holds neither dwm_stage_* snapshots nor a snapshot's metadata.json"
    )


def _is_whole(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "metadata.json"))
