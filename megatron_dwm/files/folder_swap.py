"""Replaces a folder so that a whole one exists at every moment.

The new folder is written beside the old one, under a name that does not look like a snapshot, and
swapped with it in one file system operation. Where that operation is not available (some network
file systems), the old folder is moved aside first; `mend` restores it after a kill in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil

# Written last: a snapshot with it is whole.
MARKER = "metadata.json"

# Constants of renameat2(2), which neither Python nor an installed library wraps.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOT_AVAILABLE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV)


def beside(folder: str) -> str:
    """Returns the path where the new folder is written."""
    return _named(folder, "new")


def swap_in(folder: str) -> None:
    """Moves the finished folder `beside(folder)` into place, and removes the old one."""
    new, old = beside(folder), _named(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if not os.path.lexists(folder):
        os.rename(new, folder)
        return
    if _exchange(new, folder):
        shutil.rmtree(new)
        return
    os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old)


def mend(parent: str | os.PathLike) -> None:
    """Restores a snapshot that a kill during a two-step swap has left beside its place.

    It may be called on all ranks at once, and on a read-only file system.

    Args:
        parent: folder of the snapshots.
    """
    found = [re.fullmatch(r"\.(dwm_stage_\d+)\.(?:new|old)", name) for name in os.listdir(parent)]
    for name in {match[1] for match in found if match}:
        folder = os.path.join(parent, name)
        for path in (beside(folder), _named(folder, "old")):
            if not os.path.lexists(folder) and os.path.exists(os.path.join(path, MARKER)):
                with contextlib.suppress(OSError):
                    os.rename(path, folder)


def _named(folder: str, ending: str) -> str:
    parent, name = os.path.split(os.path.abspath(folder))
    return os.path.join(parent, f".{name}.{ending}")


def _exchange(one: str, other: str) -> bool:
    """Swaps two folders in one operation; returns whether the file system supports it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_AVAILABLE:
        return False
    raise OSError(code, os.strerror(code), other)
