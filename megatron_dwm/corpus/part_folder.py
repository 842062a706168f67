"""Arrays that parts of some work save in a folder until they are merged."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_dwm.errors import InputError

# What NumPy raises for a truncated file, as after a power loss.
_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class PartFolder:
    """The parts of some work, by kind and number; each exists whole or not at all.

    Args:
        path: The folder; created when the first part is saved.
        whose: Who makes the parts, for messages: `tasks`, for example.
    """

    def __init__(self, path: str | os.PathLike[str], whose: str) -> None:
        self.path = Path(path)
        self._whose = whose

    def save(self, kind: str, number: int, total: int, **arrays: np.ndarray) -> None:
        """Saves a part, replacing an earlier one.

        Args:
            kind: What it is.
            number: Which one, from 0.
            total: How many there are of its kind.
            arrays: What it holds.
        """
        final = self._file(kind, number, total)
        self.path.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
        with open(partial, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(partial, final)

    def load(self, kind: str, number: int, total: int) -> dict[str, np.ndarray] | None:
        """Returns what a part holds; None if it is missing or damaged."""
        try:
            with np.load(self._file(kind, number, total), allow_pickle=False) as part:
                return dict(part)
        except _DAMAGE:
            return None

    def load_all(self, kind: str) -> Iterator[dict[str, np.ndarray]]:
        """Yields what each part of a kind holds, in numerical order.

        Raises:
            InputError: There are no parts, one is missing, or they do not belong together.
        """
        names = [path.name for path in self.path.glob(f"{kind}-*.npz")]
        totals = {int(m[1]) for name in names if (m := re.search(r"-of-(\d+)\.npz$", name))}
        if len(totals) != 1:
            numbers = " and ".join(map(str, sorted(totals)))
            what = f"{kind} of {numbers or 'no'} {self._whose}"
            raise InputError(
                f"{self.path}: {what}; remove the folder and run the step that makes them again"
            )
        (total,) = totals
        for number in range(total):
            part = self.load(kind, number, total)
            if part is None:
                raise InputError(
                    f"{self.path}: {kind} number {number} of {total} {self._whose} is missing or "
                    f"damaged; run the step that makes it again"
                )
            yield part

    def remove(self) -> None:
        """Removes the folder and everything in it."""
        shutil.rmtree(self.path)

    def _file(self, kind: str, number: int, total: int) -> Path:
        return self.path / f"{kind}-{number:05d}-of-{total:05d}.npz"
