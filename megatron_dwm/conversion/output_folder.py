"""Output folders of the subcommands: never half-written, never replaced without being asked."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_dwm.errors import ConversionError


def check_output(out: Path, flag: str, force: bool, foreign: Callable[[Path], str | None]) -> None:
    """Refuses to overwrite without permission, or what the command did not write.

    Args:
        out: The folder to write.
        flag: The flag that names it.
        force: The value of --force.
        foreign: Returns why a folder is not the command's own, or None.

    Raises:
        ConversionError: The folder must not be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ConversionError(f"{flag} {out} is a file; give a folder.")
    if not any(out.iterdir()):
        return
    if not force:
        raise ConversionError(f"{flag} {out} is not empty; give another folder or --force.")
    reason = foreign(out)
    if reason:
        raise ConversionError(
            f"{flag} {out} {reason}, and --force will not replace it; give another folder."
        )


@contextlib.contextmanager
def complete_or_nothing(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` that takes its place when the block succeeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    folder = scratch / "new"
    try:
        folder.mkdir()
        yield folder
        old = scratch / "old"
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(folder, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
