"""Keeps standard output for a result, although libraries print there."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def output_to_stderr() -> Iterator[None]:
    """A context in which everything printed goes to standard error.

    The file descriptor is redirected as well, because log handlers keep their original stream.
    """
    try:
        output, error = sys.__stdout__.fileno(), sys.__stderr__.fileno()  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):  # there is no such stream
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    sys.__stdout__.flush()  # type: ignore[union-attr]
    kept = os.dup(output)
    os.dup2(error, output)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.__stdout__.flush()  # type: ignore[union-attr]
        os.dup2(kept, output)
        os.close(kept)
