"""Processor time, which does not grow where others compute on the same cores."""

from __future__ import annotations

import resource


def processor_time_of_children() -> float:
    """Returns the seconds that the children of this process have taken that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
