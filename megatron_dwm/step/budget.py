"""Keeps the DWM's measured time within a share of the language model's (`--dwm-overhead-budget`).

`OverheadBudget` is the controller: seconds in, decisions out. `StepMeter` measures one step, with
the same result on all ranks; `NoMeter` replaces it, and does nothing, if no budget is set.

DWM time is the time of a step beyond the trainer's own step (which includes reading the
micro-batches): scoring, the meta step, and extra charges (a verification). Scoring inside the
trainer's step, for features and weights in the loss function, is timed there and subtracted from
the trainer's time. Not measured are the product of losses and weights
(benchmarks/uniform_overhead.py), and work between steps (the log, snapshots).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_dwm.config import DWMConfig
from megatron_dwm.core import collectives
from megatron_dwm.core.stopwatch import Stopwatch
from megatron_dwm.step.plan import StepPlan

Value = TypeVar("Value")

NOTICE_INTERVAL = 100  # steps between two warnings
_RECENT = 16  # steps from which a typical time is taken
_ENOUGH = 3  # measurements needed before the user is told anything


@dataclass
class Overhead:
    """The budget's values for a step's log line.

    Attributes:
        time_share: DWM seconds / seconds of the trainer's own steps, since the budget was set.
        budget: the share that is allowed.
        put_off: whether a meta step was due but not taken.
        notice: an occasional line for the user.
    """

    time_share: float
    budget: float
    put_off: bool
    notice: str | None = None


class OverheadBudget:
    """Decides which of the meta steps that are due can be afforded.

    Every step earns `share` x the seconds of the trainer's own step and pays its DWM seconds; the
    balance is the credit. A meta step is taken when the credit is not negative and, together with
    what the step itself will earn, covers the usual cost of a meta step. The DWM's total therefore
    never exceeds its share by more than the cost of one meta step, as long as scoring fits.

    - The first meta step is taken whatever the credit, to measure it. It is paid in full, but is
      not used for the usual cost: it includes one-time work (warm start, memory, choice of
      kernels).
    - Credit is capped at the cost of one meta step. After a frozen window there is therefore credit
      for one meta step, not for a burst of them; the rest is given up, so the final share may be
      below the budget. Until the first meta step all credit is kept, because its one-time costs are
      unknown: what the warm-up saves pays for them, and the rest is given up then.
    - Usual times are medians of the last measurements: one slow step (the first one, or one that
      waited for a file system) neither blocks nor allows meta steps for long.

    It is pure arithmetic on the seconds that it is given: with the same input, all ranks decide the
    same.

    Args:
        share: DWM time that is allowed, over the time of the trainer's own step.
        hooked: whether the trainer's own step does DWM work on meta steps (`--dwm-lookahead
            current`), so that its time there is estimated from steps without a meta step. Until
            there is one, its time with the hooks is used.
    """

    def __init__(self, share: float, hooked: bool = False) -> None:
        self.share, self.hooked = share, hooked
        self.credit = 0.0
        self.stock_seconds = 0.0
        self.dwm_seconds = 0.0
        self.measured = False
        self._charged = 0.0
        self._stock: deque[float] = deque(maxlen=_RECENT)
        self._scoring: deque[float] = deque(maxlen=_RECENT)
        self._meta: deque[float] = deque(maxlen=_RECENT)
        self._told = False
        self._warned_ago: int | None = None

    @classmethod
    def from_config(cls, config: DWMConfig) -> OverheadBudget | None:
        """Returns the budget that the settings ask for; None without `--dwm-overhead-budget`.

        With a budget, measured times decide which steps are meta steps. Such a run cannot be
        reproduced bit for bit, and a resumed run does not repeat what an uninterrupted one would
        have done.
        """
        if config.overhead_budget is None or not config.scores:
            return None
        return cls(config.overhead_budget, hooked=config.lookahead == "current")

    def allows_meta_step(self) -> bool:
        """Returns whether a meta step that is due now can be afforded."""
        if not self.measured:
            return True
        earned = self.share * _usual(self._stock)
        return self.credit >= 0 and self.credit + earned >= _usual(self._meta)

    def charge(self, dwm_seconds: float) -> None:
        """Adds DWM time that was spent outside the coming step, before it.

        It is booked with that step, so that it does not change what was just decided about it.

        Args:
            dwm_seconds: the same on all ranks.
        """
        self._charged += dwm_seconds

    def settle(
        self, stock_seconds: float, dwm_seconds: float, meta_step: bool, scoring_only: bool
    ) -> None:
        """Books one step.

        Args:
            stock_seconds: time of the trainer's own step.
            dwm_seconds: time of everything else.
            meta_step: whether a meta step was taken.
            scoring_only: whether the DWM only scored.
        """
        if meta_step and self.hooked:
            # Hooks can only add time.
            stock = min(stock_seconds, _usual(self._stock, stock_seconds))
            stock_seconds, dwm_seconds = stock, dwm_seconds + stock_seconds - stock
        else:
            self._stock.append(stock_seconds)
        if meta_step and self.measured:
            self._meta.append(dwm_seconds)
        if scoring_only:
            self._scoring.append(dwm_seconds)
        self.measured = self.measured or meta_step
        dwm_seconds, self._charged = dwm_seconds + self._charged, 0.0
        self.stock_seconds += stock_seconds
        self.dwm_seconds += dwm_seconds
        saved = self.credit + self.share * stock_seconds - dwm_seconds
        self.credit = min(saved, _usual(self._meta)) if self.measured else saved

    @property
    def time_share(self) -> float:
        """DWM seconds divided by the trainer's own, so far."""
        return self.dwm_seconds / self.stock_seconds if self.stock_seconds > 0 else 0.0

    @property
    def starved(self) -> bool:
        """Whether scoring alone uses up the budget, so that no meta step can follow."""
        if len(self._scoring) < _ENOUGH:
            return False
        return _usual(self._scoring) >= self.share * _usual(self._stock)

    def notice(self) -> str | None:
        """Returns a line for the user after a step; None if there is nothing new to say.

        Once: how far apart meta steps will be. At once and every `NOTICE_INTERVAL` steps: that
        scoring alone exceeds the budget.
        """
        if self._warned_ago is not None:
            self._warned_ago += 1
        if self.starved:
            if self._warned_ago is not None and self._warned_ago < NOTICE_INTERVAL:
                return None
            self._warned_ago = 0
            return (
                f"DWM: WARNING: scoring alone takes {self._part(self._scoring)} of the language "
                f"model's step time ({_usual(self._scoring):.4g} s of {_usual(self._stock):.4g} s),"
                f" --dwm-overhead-budget allows {self.share:.2%}: NO FURTHER META STEP IS TAKEN, "
                "the weighting model stays as it is. Raise the budget, or with --dwm-form model "
                "make it smaller (--dwm-num-layers, --dwm-hidden-size, or llm:K with a smaller K)"
            )
        enough = len(self._meta) >= _ENOUGH and len(self._scoring) >= _ENOUGH
        if self._told or not enough:
            return None
        self._told = True
        return (
            f"DWM: overhead budget {self.share:.2%} of the language model's step time; scoring "
            f"takes {self._part(self._scoring)}, a meta step {self._part(self._meta)}: where meta "
            f"steps are due, one is taken about every {self.spacing():.0f} steps"
        )

    def spacing(self) -> float:
        """Returns the number of steps from one meta step to the next that the budget allows."""
        scoring, meta = _usual(self._scoring), _usual(self._meta)
        left = self.share * _usual(self._stock) - scoring
        return max(1.0, (meta - scoring) / left) if left > 0 else math.inf

    def _part(self, seconds: deque[float]) -> str:
        return f"{_usual(seconds) / max(_usual(self._stock), 1e-9):.2%}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a resumed run, as plain values."""
        return {
            "share": self.share,
            "credit": self.credit,
            "stock_seconds": self.stock_seconds,
            "dwm_seconds": self.dwm_seconds,
            "measured": self.measured,
            "recent": {name: list(values) for name, values in self._recent().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state; the account is reset if the budget has changed."""
        if state["share"] == self.share:
            self.credit = state["credit"]
            self.stock_seconds = state["stock_seconds"]
            self.dwm_seconds = state["dwm_seconds"]
        self.measured = state["measured"]
        for name, values in self._recent().items():
            values.clear()
            values.extend(state["recent"][name])

    def _recent(self) -> dict[str, deque[float]]:
        return {"stock": self._stock, "scoring": self._scoring, "meta": self._meta}


class StepMeter:
    """Measures one training step, and lets the budget decide about it and book it.

    Args:
        budget: the controller.
        device: device on which the ranks' times are compared.
    """

    def __init__(self, budget: OverheadBudget, device: torch.device) -> None:
        self.budget, self.device = budget, device
        self.stopwatch = Stopwatch(device)
        self.plan: StepPlan | None = None
        self._put_off = False
        self._own = 0.0
        self._start = now()

    def admitted(self, plan: StepPlan) -> StepPlan:
        """Returns the plan, without its meta step if the budget does not allow it now."""
        self._put_off = plan.meta_step and not self.budget.allows_meta_step()
        self.plan = dataclasses.replace(plan, meta_step=False) if self._put_off else plan
        return self.plan

    def own(self, call: Callable[..., Value]) -> Callable[..., Value]:
        """Returns `call`, its time counted as the trainer's own, except what `stopwatch` measured.

        Only the first call counts: a step that is re-run to verify a meta-gradient is DWM time.
        """
        first = True

        def timed(*args: Any) -> Value:
            nonlocal first
            if not first:
                return call(*args)
            first, start = False, now()
            self.stopwatch.take()
            result = call(*args)
            self._own += now() - start
            self._own -= self.stopwatch.take()
            return result

        return timed

    def finish(self, meta_step: bool) -> Overhead:
        """Books the step.

        Args:
            meta_step: whether a meta step was actually taken.
        """
        assert self.plan is not None
        whole = now() - self._start
        # The longest step and the longest DWM time over all ranks: a rank that waits inside the
        # trainer's step for another rank's scoring would count the wait as the trainer's time.
        seconds = torch.tensor([whole, whole - self._own], dtype=torch.float64, device=self.device)
        seconds = collectives.largest(seconds, torch.distributed.group.WORLD)
        longest, dwm = seconds.tolist()
        scoring_only = self.plan.weighted and not self.plan.meta_step
        self.budget.settle(longest - dwm, dwm, meta_step, scoring_only)
        return Overhead(
            time_share=self.budget.time_share,
            budget=self.budget.share,
            put_off=self._put_off,
            notice=self.budget.notice(),
        )


class NoMeter:
    """A step without a budget: no clock, no synchronisation, no collective."""

    stopwatch = staticmethod(contextlib.nullcontext)

    def admitted(self, plan: StepPlan) -> StepPlan:
        """Returns the plan as it is."""
        return plan

    def own(self, call: Callable[..., Value]) -> Callable[..., Value]:
        """Returns `call` as it is."""
        return call

    def finish(self, meta_step: bool) -> None:
        """Returns nothing for the log."""


def now() -> float:
    """Returns the time in seconds, after the device has finished all queued work."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _usual(seconds: deque[float], missing: float = 0.0) -> float:
    """Returns the (lower) median; `missing` without any measurement."""
    return statistics.median_low(seconds) if seconds else missing
