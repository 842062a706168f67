"""The overhead budget: which due meta steps are taken, what is booked, what is said.

Clocks are simulated. Not exercised here: real clocks and ranks (tests/functional/test_learning.py).
"""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm.hosts import cpu

cpu.install()

import torch  # noqa: E402

from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.core import stopwatch  # noqa: E402
from megatron_dwm.step import budget as module  # noqa: E402
from megatron_dwm.step.budget import (  # noqa: E402
    NOTICE_INTERVAL,
    NoMeter,
    OverheadBudget,
    StepMeter,
)
from megatron_dwm.step.plan import StepPlan  # noqa: E402

PLAN = StepPlan(stage=0, window="meta", weighted=True, meta_step=True, ends_stage=False)


class Run:
    """A training on simulated clocks: a stock step takes 1 s, scoring and meta steps as given.

    Args:
        share: of the budget.
        scoring: seconds of pass A, every step.
        meta: seconds of a meta step beyond scoring.
        noise: sigma of the log-normal noise on every time (mean 1).
        vetoes: whether the budget's word counts.
    """

    def __init__(
        self, share, scoring=0.005, meta=2.0, noise=0.0, vetoes=True, hooked=False, first=1.0
    ):
        self.budget = OverheadBudget(share, hooked)
        self.scoring, self.meta, self.noise, self.vetoes = scoring, meta, noise, vetoes
        self.first, self.random = first, random.Random(7)
        self.taken, self.costs, self.notices = [], [], []
        self.stock_seconds = self.dwm_seconds = 0.0

    def noisy(self, seconds):
        return seconds * self.random.lognormvariate(-(self.noise**2) / 2, self.noise)

    def steps(self, count, due=True, weighted=True):
        for _ in range(count):
            allowed = self.budget.allows_meta_step() or not self.vetoes
            meta_step = due and allowed
            stock, dwm = self.noisy(1.0), self.noisy(self.scoring) if weighted else 0.0
            if meta_step:
                cost = self.noisy(self.meta) * (1.0 if self.costs else self.first)
                self.costs.append(dwm + cost)
                dwm += cost
            self.stock_seconds += stock
            self.dwm_seconds += dwm
            self.budget.settle(stock, dwm, meta_step, weighted and not meta_step)
            self.notices.append(self.budget.notice())
            self.taken.append(meta_step)
        return self

    @property
    def share(self):
        return self.dwm_seconds / self.stock_seconds

    def excess(self):
        """Seconds beyond the budget."""
        return self.dwm_seconds - self.budget.share * self.stock_seconds


class TestShare:
    @pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
    @pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
    def test_is_kept_within_one_meta_step_and_used(self, share, noise):
        """At every moment of a long run, not only at its end; and nothing is wasted either."""
        run = Run(share, noise=noise)
        for _ in range(5000):
            run.steps(1)
            assert run.excess() <= max(run.costs)
        assert 0.85 * share < run.share <= share + max(run.costs) / run.stock_seconds
        assert run.budget.time_share == pytest.approx(run.share)

    @pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
    def test_is_exceeded_when_the_veto_is_ignored(self, share):
        """What the test above shows is the controller's doing."""
        run = Run(share, vetoes=False).steps(5000)
        assert run.excess() > 100 * max(run.costs) and run.share > 2

    def test_meta_steps_are_evenly_spaced(self):
        """Earned: 0.05 - 0.005 a step; a meta step costs 2 beyond: every 44 to 45 steps."""
        run = Run(0.05).steps(2000)
        at = [i for i, taken in enumerate(run.taken) if taken]
        gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
        assert set(gaps[2:]) <= {44, 45}
        assert run.budget.spacing() == pytest.approx(2.0 / 0.045)

    @pytest.mark.parametrize("noise", [0.0, 0.3])
    def test_large_enough_puts_nothing_off(self, noise):
        assert all(Run(10.0, noise=noise).steps(500).taken)

    def test_just_large_enough_puts_nothing_off(self):
        """The step's own earnings count: a meta step costs 2.005, and so much is allowed."""
        assert all(Run(2.01).steps(500).taken)

    def test_a_slow_first_meta_step_is_paid_once_and_blocks_no_longer(self):
        """It costs 40 s instead of 2: 0.045 a step pay it back, then the usual spacing follows."""
        run = Run(0.05, first=20.0).steps(3000)
        at = [i for i, taken in enumerate(run.taken) if taken]
        assert at[0] == 0 and 40 / 0.045 - 50 < at[1] < 40 / 0.045 + 50
        # The second begins the measurement of usual costs, so it is taken without credit at hand.
        assert at[2] - at[1] < 95 and at[3] - at[2] < 50 and run.share <= 0.05 + 2.01 / 3000

    def test_a_slow_first_stock_step_does_not_buy_a_burst(self):
        """A first step of 100 s (compilation) buys the two meta steps that measure, no more."""
        run = Run(0.05)
        run.budget.settle(100.0, 0.0, False, False)
        assert sum(run.steps(50).taken) <= 2

    def test_meta_steps_that_become_dearer_become_rarer(self):
        run = Run(0.05).steps(1000)
        run.meta, before = 6.0, sum(run.taken)
        run.steps(3000)
        assert sum(run.taken[1000:]) == pytest.approx(before, abs=3)
        assert run.excess() <= max(run.costs)


class TestPauses:
    @pytest.mark.parametrize("weighted", [True, False])
    def test_a_long_one_is_followed_by_one_meta_step_not_by_a_burst(self, weighted):
        """Frozen windows score, warm-up does not; either way, one meta step lies ready after it."""
        run = Run(0.05).steps(500).steps(5000, due=False, weighted=weighted)
        after = run.steps(60).taken[-60:]
        assert after[0] and sum(after) <= 2 and not any(after[1:40])

    def test_warm_up_pays_for_a_slow_first_meta_step_and_for_nothing_else(self):
        """1000 steps earn 50 s: 40 for the first; the second measures usual costs, on credit."""
        run = Run(0.05, first=20.0).steps(1000, due=False, weighted=False).steps(60)
        assert [i for i, taken in enumerate(run.taken) if taken] == [1000, 1001]
        assert run.budget.credit < 2.0

    def test_an_interval_keeps_the_share(self):
        """A due meta step that is put off is not made up for before the next one is due."""
        run = Run(0.3)
        for _ in range(1000):
            run.steps(1).steps(3, due=False)
        assert run.excess() <= max(run.costs) and run.share > 0.2
        assert not any(taken for i, taken in enumerate(run.taken) if i % 4)


class TestScoringAboveTheBudget:
    def test_no_meta_step_follows_and_it_is_said_again_and_again(self):
        run = Run(0.02, scoring=0.03).steps(2 * NOTICE_INTERVAL + 20)
        assert sum(run.taken) == 1
        said = [i for i, notice in enumerate(run.notices) if notice]
        assert len(said) == 3 and said[0] < 5
        assert [b - a for a, b in zip(said, said[1:], strict=False)] == [NOTICE_INTERVAL] * 2

    def test_the_warning_names_figures_and_ways_out(self):
        run = Run(0.02, scoring=0.03).steps(10)
        text = next(notice for notice in run.notices if notice)
        for word in ("WARNING", "3.00%", "2.00%", "0.03 s of 1 s", "NO FURTHER META STEP"):
            assert word in text
        for way in ("Raise the budget", "--dwm-num-layers", "--dwm-hidden-size", "llm:K"):
            assert way in text
        assert run.budget.spacing() == math.inf

    def test_one_slow_scoring_is_no_reason(self):
        run = Run(0.05).steps(20)
        run.budget.settle(1.0, 5.0, False, True)
        assert not run.budget.starved

    def test_below_the_budget_the_spacing_is_said_once(self):
        """The first meta step says nothing of the usual cost, the next three do."""
        run = Run(0.05).steps(1000)
        said = [notice for notice in run.notices if notice]
        assert len(said) == 1
        for word in ("5.00%", "0.50%", "200.50%", "about every 44 steps"):
            assert word in said[0]
        assert "WARNING" not in said[0]

    def test_time_that_is_not_scoring_alone_is_not_taken_for_it(self):
        """A planned meta step that the trainer skipped has cost more than scoring."""
        run = Run(0.05)
        for _ in range(10):
            run.budget.settle(1.0, 0.9, False, False)
        assert not run.budget.starved


class TestCharge:
    def test_time_outside_the_step_is_paid_and_is_not_part_of_a_usual_meta_step(self):
        budget = Run(0.3).steps(100).budget
        spacing, spent = budget.spacing(), budget.dwm_seconds
        budget.charge(30.0)
        assert budget.dwm_seconds == spent
        budget.settle(1.0, 0.005, False, True)
        assert budget.dwm_seconds == pytest.approx(spent + 30.005)
        assert budget.credit < -25 and budget.spacing() == spacing
        budget.settle(1.0, 0.005, False, True)
        assert budget.dwm_seconds == pytest.approx(spent + 30.01)

    def test_it_leaves_the_meta_step_that_it_is_for(self):
        """Else a step that is verified before it is taken would never be taken."""
        run = Run(0.3).steps(100)
        while not run.budget.allows_meta_step():
            run.steps(1)
        run.budget.charge(30.0)
        assert run.budget.allows_meta_step()
        run.steps(1)
        assert run.taken[-1] and not run.budget.allows_meta_step()


class TestHookedStep:
    """`--dwm-lookahead current`: the trainer's step does DWM work on meta steps."""

    def test_its_stock_time_is_that_of_steps_without_a_meta_step(self):
        budget = OverheadBudget(0.5, hooked=True)
        for _ in range(3):
            budget.settle(1.0, 0.1, False, True)
        budget.settle(1.4, 0.8, True, False)
        assert budget.stock_seconds == pytest.approx(4.0)
        assert budget.dwm_seconds == pytest.approx(0.3 + 1.2)

    def test_before_there_is_one_what_it_took_must_do(self):
        budget = OverheadBudget(0.5, hooked=True)
        budget.settle(1.4, 0.8, True, False)
        assert budget.stock_seconds == pytest.approx(1.4)
        assert budget.dwm_seconds == pytest.approx(0.8)

    def test_hooks_never_shorten_a_step(self):
        """Not even where the only step to compare with was the slow first one."""
        budget = OverheadBudget(0.5, hooked=True)
        budget.settle(50.0, 0.1, False, True)
        budget.settle(1.4, 0.8, True, False)
        assert budget.stock_seconds == pytest.approx(51.4)
        assert budget.dwm_seconds == pytest.approx(0.9)


class TestState:
    def test_round_trip_decides_and_books_alike(self):
        """Through JSON: the checkpoint's common part holds plain values."""
        run = Run(0.3, noise=0.3).steps(200)
        other = Run(0.3, noise=0.3)
        other.budget.load_state_dict(json.loads(json.dumps(run.budget.state_dict())))
        assert other.budget.state_dict() == run.budget.state_dict()
        run.random.seed(1), other.random.seed(1)
        run.steps(300), other.steps(300)
        assert run.taken[200:] == other.taken and any(other.taken)
        assert run.budget.state_dict() == other.budget.state_dict()

    def test_a_state_before_any_step(self):
        fresh = OverheadBudget(0.05)
        fresh.load_state_dict(OverheadBudget(0.05).state_dict())
        assert fresh.allows_meta_step() and fresh.time_share == 0.0

    def test_another_budget_starts_a_new_account_with_the_measured_costs(self):
        run = Run(0.3).steps(200)
        other = Run(0.05)
        other.budget.load_state_dict(run.budget.state_dict())
        assert other.budget.time_share == 0.0 and other.budget.credit == 0.0
        other.costs = [2.005]
        other.steps(1000)
        assert not any(other.taken[:40]) and other.excess() <= 0


@st.composite
def times(draw):
    share = draw(st.floats(0.005, 3.0))
    seconds = st.floats(1e-3, 50.0)
    steps = draw(st.lists(st.tuples(seconds, st.floats(0, 1), seconds, st.booleans()), min_size=1))
    # Scoring fits: without that no controller could keep the share.
    return share, [(stock, part * share * stock, meta, due) for stock, part, meta, due in steps]


@settings(max_examples=300, deadline=None)
@given(times())
def test_never_more_than_one_meta_step_beyond_the_budget(run):
    """Whatever the times are, and whenever meta steps are due."""
    share, steps = run
    budget, dearest = OverheadBudget(share), 0.0
    for stock, scoring, meta, due in steps:
        taken = due and budget.allows_meta_step()
        dwm = scoring + (meta if taken else 0.0)
        dearest = max(dearest, dwm if taken else 0.0)
        budget.settle(stock, dwm, taken, not taken)
        budget.notice()
        excess = budget.dwm_seconds - share * budget.stock_seconds
        assert excess <= dearest + 1e-9 * (1 + budget.stock_seconds)


class Clock:
    """Stands in for the time, in `StepMeter`."""

    def __init__(self, monkeypatch, others=(0.0, 0.0)):
        self.now, self.others = 0.0, torch.tensor(others, dtype=torch.float64)
        monkeypatch.setattr(module, "now", lambda: self.now)
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module.torch.distributed, "group", type("G", (), {"WORLD": None}))
        monkeypatch.setattr(module.collectives, "largest", self.largest)

    def largest(self, seconds, group):
        return torch.maximum(seconds, self.others)

    def passes(self, seconds):
        self.now += seconds
        return seconds


class TestMeter:
    def finished(self, clock, budget, plan=PLAN, again=0):
        """Reads for 0.5 s, scores for 0.25, steps for 2, and for 1 more on meta steps."""
        meter = StepMeter(budget, torch.device("cpu"))
        plan = meter.admitted(plan)
        assert meter.own(clock.passes)(0.5) == 0.5
        stock_step = meter.own(clock.passes)
        clock.passes(0.25)
        stock_step(2.0)
        for _ in range(again):
            stock_step(2.0)
        if plan.meta_step:
            clock.passes(1.0)
        return meter.finish(plan.meta_step)

    def test_reading_and_the_trainers_step_are_its_own_all_else_is_the_dwms(self, monkeypatch):
        budget = OverheadBudget(0.2)
        found = self.finished(Clock(monkeypatch), budget)
        assert (budget.stock_seconds, budget.dwm_seconds) == (2.5, 1.25)
        assert found.time_share == 0.5 and found.budget == 0.2 and not found.put_off

    def test_scoring_inside_the_trainers_step_is_the_dwms(self, monkeypatch):
        """A step of 2 s, of two micro-batches that are scored for 0.125 s each in their forward."""
        clock, budget = Clock(monkeypatch), OverheadBudget(0.2)

        def stock_step(seconds):
            for _ in range(2):
                clock.passes(seconds / 2 - 0.125)
                with meter.stopwatch():
                    clock.passes(0.125)

        meter = StepMeter(budget, torch.device("cpu"))
        meter.admitted(StepPlan(0, "frozen", True, False, False))
        with meter.stopwatch():
            clock.passes(0.5)  # outside the trainer's step: the DWM's anyway, and counted once
        meter.own(stock_step)(2.0)
        meter.finish(False)
        assert (budget.stock_seconds, budget.dwm_seconds) == (1.75, 0.75)

    def test_scoring_inside_the_step_can_use_up_the_budget(self, monkeypatch):
        """A head has no pass of its own, and its scoring is a cost all the same."""
        clock, budget = Clock(monkeypatch), OverheadBudget(0.02)
        for _ in range(5):
            meter = StepMeter(budget, torch.device("cpu"))
            meter.admitted(StepPlan(0, "frozen", True, False, False))

            def stock_step():
                clock.passes(1.0)
                with meter.stopwatch():  # noqa: B023 - called in this iteration
                    clock.passes(0.05)

            meter.own(stock_step)()
            meter.finish(False)
        assert budget.starved and budget.time_share == pytest.approx(0.05)

    def test_a_step_that_is_run_again_is_dwm_time(self, monkeypatch):
        budget = OverheadBudget(0.2)
        self.finished(Clock(monkeypatch), budget, again=3)
        assert (budget.stock_seconds, budget.dwm_seconds) == (2.5, 1.25 + 6.0)

    def test_a_due_meta_step_is_put_off_and_that_is_recorded(self, monkeypatch):
        clock, budget = Clock(monkeypatch), OverheadBudget(0.2)
        found = [self.finished(clock, budget) for _ in range(4)]
        # 1.25 - 0.5 to be paid back by 0.5 - 0.25 a step
        assert [x.put_off for x in found] == [False, True, True, True]
        assert not self.finished(clock, budget).put_off

    def test_a_step_without_a_due_meta_step_puts_nothing_off(self, monkeypatch):
        clock, budget = Clock(monkeypatch), OverheadBudget(0.01)
        self.finished(clock, budget)
        frozen = StepPlan(0, "frozen", True, False, False)
        assert not self.finished(clock, budget, frozen).put_off

    def test_the_slowest_rank_counts(self, monkeypatch):
        """Another rank took 4 s in all, 1.5 of them for the DWM: 2.5 are left for the trainer."""
        budget = OverheadBudget(0.2)
        self.finished(Clock(monkeypatch, others=(4.0, 1.5)), budget)
        assert (budget.stock_seconds, budget.dwm_seconds) == (2.5, 1.5)

    def test_without_a_budget_nothing_is_measured(self, monkeypatch):
        def refuse(*args):
            raise AssertionError("neither clock nor collective without a budget")

        monkeypatch.setattr(module, "now", refuse)
        monkeypatch.setattr(module.collectives, "largest", refuse)
        monkeypatch.setattr(stopwatch.time, "perf_counter", refuse)
        meter = NoMeter()
        assert meter.admitted(PLAN) is PLAN and meter.own(refuse) is refuse
        with meter.stopwatch():
            pass
        assert meter.finish(True) is None


class Event:
    """Stands in for a CUDA event on a device that is behind the CPU by `lag`."""

    clock, lag, waits = None, 7.0, 0

    def __init__(self, enable_timing=False):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = self.clock.now + self.lag

    def synchronize(self):
        Event.waits += 1

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class TestStopwatch:
    def test_on_a_gpu_events_are_read_later_and_nothing_waits(self, monkeypatch):
        clock = Event.clock = Clock(monkeypatch)

        def refuse(*args):
            raise AssertionError("waited for the device")

        monkeypatch.setattr(stopwatch.torch.cuda, "Event", Event)
        monkeypatch.setattr(stopwatch.torch.cuda, "synchronize", refuse)
        watch = stopwatch.Stopwatch(torch.device("cuda"))
        for seconds in (0.25, 0.5):
            clock.passes(1.0)
            with watch():
                clock.passes(seconds)
        assert watch.take() == pytest.approx(0.75) and Event.waits == 0
        assert watch.take() == 0.0

    def test_on_the_cpu_the_clock_is_read(self, monkeypatch):
        clock = Clock(monkeypatch)
        watch = stopwatch.Stopwatch(torch.device("cpu"))
        for seconds in (0.25, 0.5):
            clock.passes(1.0)
            with watch():
                clock.passes(seconds)
        assert (watch.take(), watch.take()) == (0.75, 0.0)


class TestFromConfig:
    def test_none_unless_asked_for(self):
        assert OverheadBudget.from_config(DWMConfig()) is None

    def test_none_where_no_weighting_model_is_built(self):
        config = DWMConfig(policy="uniform", overhead_budget=0.05)
        assert OverheadBudget.from_config(config) is None

    @pytest.mark.parametrize("lookahead", ["next", "current"])
    def test_takes_share_and_lookahead(self, lookahead):
        found = OverheadBudget.from_config(DWMConfig(overhead_budget=0.05, lookahead=lookahead))
        assert found.share == 0.05 and found.hooked == (lookahead == "current")
