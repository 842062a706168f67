"""Standard output for a result alone, with libraries that print there."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def output_to_stderr() -> Iterator[None]:
    """Within it, what is printed goes to standard error.

    The file descriptor is moved as well: log handlers keep the stream that they began with.
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
