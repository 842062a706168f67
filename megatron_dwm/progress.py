"""Progress bars on standard error: on a terminal only."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

# Seconds of work before a bar appears, and seconds between updates.
_DELAY, _TICK = 1.0, 0.5


def bar(total: int | None, unit: str, label: str, **settings: Any) -> Any:
    """Returns a `tqdm` bar, which is a context manager with `update(n)`.

    Args:
        total: Count at the end; None if unknown.
        unit: What is counted: `B` is shown as kB, MB and so on.
        label: What is being done.
        settings: Further arguments for tqdm.
    """
    from tqdm import tqdm

    values = {"unit_scale": unit == "B", "delay": _DELAY, **settings}
    return tqdm(total=total, unit=unit, desc=label, disable=None, **values)


@contextlib.contextmanager
def working(label: str) -> Iterator[None]:
    """Shows how long a block has taken, for work whose progress is unknown."""
    with bar(None, "", label, bar_format="{desc}: {elapsed}", leave=False) as shown:
        if shown.disable:
            yield
            return
        done = threading.Event()

        def tick() -> None:
            while not done.wait(_TICK):
                shown.update()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()
