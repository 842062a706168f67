"""Caches plans on disk: one process computes them, all ranks and later runs memory-map them.

A plan is a few `.npy` files and one `.json` that is written last: without it there is no plan. Each
file is written under a temporary name and renamed, so that a killed run leaves no incomplete file,
and two runs that write the same plan at once do not interfere.
"""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

import numpy as np

from megatron_dwm.data.epoch_plan import Corpus, Segment
from megatron_dwm.files.json_files import read_object

_ARRAYS = ("documents", "starts", "stops", "is_piece", "seen", "sample_index")
_NUMBERS = ("start", "stage", "first_epoch", "entry_bounds", "token_bounds")


def save_segment(path: str, segment: Segment) -> None:
    """Writes a plan.

    Args:
        path: path of its files, without their endings; a missing folder is created.
        segment: the plan.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    arrays = [name for name in _ARRAYS if getattr(segment, name) is not None]
    for name in arrays:
        temporary = f"{path}-{name}.{uuid.uuid4().hex}.tmp"
        with open(temporary, "wb") as file:
            np.save(file, getattr(segment, name), allow_pickle=False)
        os.replace(temporary, f"{path}-{name}.npy")
    numbers = {name: getattr(segment, name) for name in _NUMBERS}
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "w") as file:
        json.dump({"arrays": arrays, **numbers}, file)
    os.replace(temporary, f"{path}.json")


def _is_plan(stored: dict[str, Any]) -> bool:
    whole = all(type(stored.get(name)) is int for name in ("start", "stage", "first_epoch"))
    lists = [stored.get(name) for name in ("entry_bounds", "token_bounds")]
    bounds = all(isinstance(v, list) and all(type(n) is int for n in v) for v in lists)
    return whole and bounds and isinstance(stored.get("arrays"), list)


def load_segment(path: str, corpus: Corpus) -> Segment | None:
    """Returns a plan with memory-mapped arrays; None if it is missing or incomplete.

    Args:
        path: as for `save_segment`.
        corpus: the corpus that it plans; paths must differ between corpora.
    """
    if not os.path.isfile(f"{path}.json"):
        return None
    try:
        stored = read_object(f"{path}.json")
        if not _is_plan(stored):
            return None
        arrays: dict[str, Any] = {
            name: np.load(f"{path}-{name}.npy", mmap_mode="r", allow_pickle=False)
            if name in stored["arrays"]
            else None
            for name in _ARRAYS
        }
    except (OSError, ValueError):
        # A part of the cache was deleted: it is planned and written again.
        return None
    return Segment(
        corpus=corpus,
        start=stored["start"],
        stage=stored["stage"],
        first_epoch=stored["first_epoch"],
        entry_bounds=tuple(stored["entry_bounds"]),
        token_bounds=tuple(stored["token_bounds"]),
        **arrays,
    )
