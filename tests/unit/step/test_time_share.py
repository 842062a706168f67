"""The weighting's share of the time, from a clock that is only read."""

import pytest

from megatron_dwm.step.time_share import TimeShare


class Run:
    """Steps on a clock of their own."""

    def __init__(self):
        self.now = 100.0
        self.share = TimeShare(lambda: self.now)

    def step(self, seconds, meta):
        self.share.begin()
        self.now += seconds
        return self.share.end(meta)

    def cycles(self, number, interval, plain, meta, between=0.0):
        """Meta steps with `interval - 1` plain steps before each; returns the last share."""
        found = None
        for _ in range(number):
            self.now += between
            for _ in range(interval - 1):
                assert self.step(plain, meta=False) is None
            found = self.step(meta, meta=True)
        return found


@pytest.mark.parametrize("interval", [2, 4, 16])
def test_is_the_extra_time_of_a_meta_step_over_all_time(interval):
    """(1.5 - 1) / (1.5 + (K - 1) 1)."""
    found = Run().cycles(10, interval, plain=1.0, meta=1.5)
    assert found == pytest.approx(0.5 / (1.5 + interval - 1))


def test_a_run_whose_meta_steps_cost_nothing_spends_nothing():
    assert Run().cycles(10, 4, plain=1.0, meta=1.0) == pytest.approx(0.0)


def test_evaluation_and_saving_between_steps_are_kept_out():
    """A third of the cycles has a pause of a hundred steps' length in it."""
    run = Run()
    for k in range(16):
        found = run.cycles(1, 4, plain=1.0, meta=1.5, between=100.0 if k % 3 == 0 else 0.0)
    assert found == pytest.approx(0.5 / 4.5)


def test_the_first_meta_step_is_not_counted():
    """What happens once (kernels, memory) takes a minute."""
    run = Run()
    run.step(60.0, meta=True)
    assert run.cycles(3, 4, plain=1.0, meta=1.5) == pytest.approx(0.5 / 4.5)


def test_nothing_is_said_before_there_is_enough_to_say():
    run = Run()
    assert run.cycles(3, 4, plain=1.0, meta=1.5) is None
    assert run.cycles(1, 4, plain=1.0, meta=1.5) is not None


def test_without_plain_steps_there_is_nothing_to_compare_with():
    assert Run().cycles(20, 1, plain=1.0, meta=1.5) is None


def test_follows_a_change():
    """Of the last 16 meta steps: what was before is forgotten."""
    run = Run()
    run.cycles(20, 4, plain=1.0, meta=3.0)
    assert run.cycles(16, 8, plain=2.0, meta=2.2) == pytest.approx(0.2 / (2.2 + 14))


def test_steps_after_a_frozen_window_do_not_count_it_as_an_interval():
    """300 plain steps once: the typical interval stays what it was."""
    run = Run()
    run.cycles(16, 4, plain=1.0, meta=1.5)
    for _ in range(300):
        run.step(1.0, meta=False)
    assert run.step(1.5, meta=True) == pytest.approx(0.5 / 4.5)
