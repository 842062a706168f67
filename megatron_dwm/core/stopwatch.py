"""Times what happens inside the trainer's own step, without waiting for the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Sums the time that passes within it.

    On the CPU by the clock. On a GPU by a pair of CUDA events, which are read when the device has
    come past them: between the two lies what the device did, and its wait where it was ahead of
    the CPU. A pair costs two marks in the stream, next to the dozens of kernels that it is put
    around.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it, time counts."""
        if self.on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Returns the seconds since this was last called; the device must be done."""
        seconds = self._seconds
        seconds += sum(first.elapsed_time(last) for first, last in self._events) / 1e3
        self._seconds = 0.0
        self._events.clear()
        return seconds


class PassTimes:
    """Times the passes of one meta step, each by a `Stopwatch`.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._watches: dict[str, Stopwatch] = {}

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Within it, time counts as that pass's."""
        if name not in self._watches:
            self._watches[name] = Stopwatch(self.device)
        return self._watches[name]()

    def start(self) -> None:
        """Forgets what was timed: a step that came to nothing is no one's."""
        self._watches.clear()

    def take(self) -> dict[str, float]:
        """Returns the seconds of each pass since `start`; the device must be done."""
        return {name: watch.take() for name, watch in self._watches.items()}
