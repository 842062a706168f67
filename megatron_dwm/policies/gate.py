"""The gate: how far weights may move away from one, by out-of-sample correlation.

At every meta step the scores were computed before the influence was known, so their correlation r
with the samples' usefulness -c is out of sample. The gate keeps its running mean and standard error
and scales the weights towards one, w = 1 + a (w - 1):

    a = clip((mean - 2 standard errors) / FULL, 0, 1)

a is 0 if the model knows nothing, or has not shown it yet. The standard error is that of a weighted
mean of the observed r. Their variance is the observed one or that of a correlation without signal,
1 / (N - 1), whichever is larger: a few values that happen to agree prove nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch

DECAY = 0.95  # of past evidence, per meta step
FULL = 0.2  # lower confidence bound at which the gate is fully open
ERRORS = 2.0  # standard errors from the mean to the bound
LEAST = 3  # meta steps that it needs before it opens


class Gate:
    """Running evidence that scores predict influence.

    Plain numbers, the same on every rank that sees losses.
    """

    def __init__(self) -> None:
        self.weight = self.weight2 = self.first = self.second = 0.0
        self.seen = 0
        self.last = math.nan
        self.opening = 0.0
        self._said: str | None = None

    def observe(self, scores: torch.Tensor, influence: torch.Tensor) -> None:
        """Includes one meta step's scores and influence, `[N]` each, computed independently.

        Steps in which either is constant carry no information and are left out.
        """
        r = correlation(scores, -influence)
        self.last = r
        if not math.isfinite(r):
            return
        self.seen += 1
        self.weight = DECAY * self.weight + 1
        self.weight2 = DECAY**2 * self.weight2 + 1
        self.first = DECAY * self.first + r
        self.second = DECAY * self.second + r * r
        self.opening = self._opening(scores.numel())

    @property
    def mean(self) -> float:
        """Running mean of the correlation; NaN before the first one."""
        return self.first / self.weight if self.weight else math.nan

    def standard_error(self, samples: int) -> float:
        """Returns the standard error of the mean.

        Args:
            samples: N, the samples per correlation.
        """
        if not self.weight:
            return math.nan
        scatter = self.second / self.weight - self.mean**2
        variance = max(scatter, 1 / max(1, samples - 1))
        return math.sqrt(variance * self.weight2) / self.weight

    def _opening(self, samples: int) -> float:
        if self.seen < LEAST:
            return 0.0
        bound = self.mean - ERRORS * self.standard_error(samples)
        return min(1.0, max(0.0, bound / FULL))

    def words(self, samples: int) -> str | None:
        """Returns a line if the gate has opened, opened fully, or closed; else None."""
        state = "closed" if self.opening <= 0 else "open" if self.opening >= 1 else "partly open"
        if state == self._said or (self._said is None and state == "closed"):
            return None
        self._said = state
        evidence = (
            f"out-of-sample correlation of scores and influence {self.mean:.3f} +- "
            f"{self.standard_error(samples):.3f} over the last meta steps"
        )
        meaning = {
            "closed": "which does not prove that the scores predict anything: every weight is 1",
            "partly open": f"weights go {self.opening:.0%} of the way from 1",
            "open": "weights apply in full",
        }
        return f"DWM: gate {state}: {evidence}, {meaning[state]}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers."""
        names = ("weight", "weight2", "first", "second", "seen", "opening")
        last = self.last if math.isfinite(self.last) else None
        return {name: getattr(self, name) for name in names} | {"said": self._said, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state."""
        for name in ("weight", "weight2", "first", "second", "seen", "opening"):
            setattr(self, name, state[name])
        self._said = state["said"]
        last = state.get("last")
        self.last = math.nan if last is None else last


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns Pearson's correlation of two `[N]`; NaN if one is constant or not finite."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    value = ((a * b).sum() / scale).item() if scale > 0 else math.nan
    return value if math.isfinite(value) else math.nan
