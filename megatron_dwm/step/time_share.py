"""Estimates weighting's share of the training time without waiting for the device."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

_RECENT = 16  # meta steps from which a typical time is taken
_ENOUGH = 3  # meta steps needed for a share


class TimeShare:
    """The extra time of meta steps over plain ones: `(t_meta - t_plain) / (t_meta + n t_plain)`.

    A meta step waits for the device when the influence is read, so the clock at its end and at the
    beginning of the next one bounds the n plain steps in between, and t_plain is that time over n.
    All three are medians over the last meta steps, which excludes occasional work between steps:
    evaluation, saving, a stage without meta steps. Without plain steps in between there is nothing
    to compare with. What weighting adds to a plain step is not measured: it is part of t_plain.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._meta: deque[float] = deque(maxlen=_RECENT)
        self._plain: deque[float] = deque(maxlen=_RECENT)
        self._counts: deque[int] = deque(maxlen=_RECENT)
        self._begin = 0.0
        self._last_end: float | None = None  # end of the last meta step
        self._since = 0  # plain steps since then

    def begin(self) -> None:
        """To be called at the beginning of a step."""
        self._begin = self.clock()

    def end(self, meta_step: bool) -> float | None:
        """To be called at the end of a step.

        Args:
            meta_step: whether a meta step was actually taken.

        Returns:
            The share, at meta steps, as soon as it can be estimated.
        """
        if not meta_step:
            self._since += 1
            return None
        now = self.clock()
        # The first meta step includes one-time work, so it only marks a beginning.
        if self._last_end is not None and self._since > 0:
            self._meta.append(now - self._begin)
            self._plain.append((self._begin - self._last_end) / self._since)
            self._counts.append(self._since)
        self._last_end, self._since = now, 0
        return self._share()

    def _share(self) -> float | None:
        if len(self._meta) < _ENOUGH:
            return None
        meta, plain = statistics.median(self._meta), statistics.median(self._plain)
        whole = meta + statistics.median(self._counts) * plain
        return (meta - plain) / whole if whole > 0 else None
