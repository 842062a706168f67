"""Which step does what: stages, windows, warm-up and the count of meta steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm.config import DWMConfig
from megatron_dwm.step.plan import Schedule


def plans(train_iters, **options):
    schedule = Schedule(DWMConfig(**options), train_iters)
    return [schedule.plan(i) for i in range(train_iters)]


def letters(found):
    """One letter a step: w(arm-up), m(eta window), f(rozen); capital where a meta step is due."""
    return "".join(plan.window[0].upper() if plan.meta_step else plan.window[0] for plan in found)


class TestStaged:
    def test_each_stage_is_a_meta_window_and_a_frozen_window(self):
        found = plans(20, stages=4, stage_meta_steps=2)
        assert letters(found) == "MMfff" * 4
        assert [plan.stage for plan in found] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5

    def test_default_window_is_half_of_the_stage(self):
        assert letters(plans(12, stages=2)) == "MMMfffMMMfff"

    def test_stages_that_do_not_divide_differ_by_one_step_at_most(self):
        found = plans(23, stages=5, stage_meta_steps=1)
        lengths = [sum(plan.stage == k for plan in found) for k in range(5)]
        assert sum(lengths) == 23 and set(lengths) == {4, 5}
        assert sum(plan.meta_step for plan in found) == 5

    def test_a_window_longer_than_its_stage_ends_with_it(self):
        found = plans(12, stages=3, stage_meta_steps=100)
        assert letters(found) == "M" * 12
        assert [i for i, plan in enumerate(found) if plan.ends_stage] == [3, 7, 11]

    def test_more_stages_than_steps_are_one_step_each(self):
        found = plans(3, stages=5, stage_meta_steps=1)
        assert letters(found) == "MMM"
        assert all(plan.ends_stage for plan in found)

    def test_warm_up_does_not_count_towards_the_first_window(self):
        """The first stage gives its window's full length after the uniform steps."""
        assert letters(plans(20, stages=2, stage_meta_steps=3, warmup_steps=4)) == (
            "wwwwMMMfff" + "MMMfffffff"
        )

    def test_default_window_is_half_of_what_warm_up_leaves_of_the_stage(self):
        assert letters(plans(20, stages=2, warmup_steps=4)) == "wwwwMMMfff" + "MMMMMfffff"

    def test_warm_up_over_a_whole_stage_begins_with_the_next(self):
        found = plans(20, stages=4, stage_meta_steps=2, warmup_steps=7)
        assert letters(found) == "wwwwwwwMMf" + "MMfffMMfff"

    def test_meta_steps_are_denser_at_the_start(self):
        found = plans(22, schedule="joint", meta_interval=8, meta_dense_steps=4, warmup_steps=2)
        assert letters(found) == "ww" + "MmMm" + "Mmmmmmmm" * 2
        # No step has more than one.
        found = plans(8, schedule="joint", meta_interval=2, meta_dense_steps=4)
        assert letters(found) == "MMMM" + "MmMm"

    def test_meta_interval_thins_the_meta_steps_and_leaves_the_windows(self):
        assert letters(plans(12, stages=2, stage_meta_steps=4, meta_interval=2)) == ("MmMmff" * 2)


class TestOtherSchedules:
    def test_joint_takes_a_meta_step_every_interval_and_is_never_frozen(self):
        found = plans(10, schedule="joint", meta_interval=3, warmup_steps=2)
        assert letters(found) == "wwMmmMmmMm"

    def test_joint_still_ends_stages_so_that_snapshots_are_taken(self):
        found = plans(10, schedule="joint", stages=2)
        assert [i for i, plan in enumerate(found) if plan.ends_stage] == [4, 9]

    def test_frozen_is_weighted_without_meta_steps(self):
        found = plans(6, schedule="frozen", load="x", warmup_steps=2)
        assert letters(found) == "wwffff"
        assert [plan.weighted for plan in found] == [False] * 2 + [True] * 4

    @pytest.mark.parametrize("schedule", ["staged", "joint", "frozen"])
    def test_uniform_is_never_weighted_and_takes_no_snapshot(self, schedule):
        found = plans(10, policy="uniform", schedule=schedule, warmup_steps=3, load="x")
        assert not any(plan.weighted or plan.meta_step or plan.ends_stage for plan in found)
        assert {(plan.window, plan.staged) for plan in found} == {("uniform", False)}

    @pytest.mark.parametrize("policy", ["linupper", "truncation", "influence"])
    @pytest.mark.parametrize("schedule", ["staged", "joint"])
    def test_policies_that_do_not_learn_have_no_windows_to_name(self, policy, schedule):
        found = plans(10, policy=policy, schedule=schedule, warmup_steps=3, load="x")
        windows = [(plan.window, plan.staged, plan.weighted) for plan in found]
        assert windows == [("warmup", True, False)] * 3 + [("weighted", False, True)] * 7

    @pytest.mark.parametrize("policy, steps", [("linupper", 6), ("extremes", 6), ("static", 0)])
    def test_policies_by_a_shape_of_the_loss_have_a_burn_in(self, policy, steps):
        """A twentieth of 101 steps, rounded up, unless another warm-up is asked for."""
        for options, expected in (({}, steps), ({"warmup_steps": 3}, 3), ({"warmup_steps": 0}, 0)):
            windows = [plan.window for plan in plans(101, policy=policy, **options)]
            assert windows == ["warmup"] * expected + ["weighted"] * (101 - expected)

    def test_shuffled_takes_the_meta_steps_of_learned(self):
        """The control differs in the order of the weights alone."""
        assert plans(20, policy="shuffled") == plans(20, policy="learned")


class TestBeyondTheEnd:
    def test_steps_after_the_last_belong_to_the_last_stage_and_end_nothing(self):
        schedule = Schedule(DWMConfig(stages=2, stage_meta_steps=2), 10)
        after = [schedule.plan(i) for i in (10, 11, 1000)]
        assert all(plan.stage == 1 and plan.window == "frozen" for plan in after)
        assert not any(plan.ends_stage or plan.meta_step for plan in after)

    def test_a_run_of_no_steps_has_a_plan(self):
        """`--train-iters 0` evaluates only; building the schedule must not fail."""
        assert Schedule(DWMConfig(), 0).plan(0).stage == 0


@st.composite
def settings_of_runs(draw):
    train_iters = draw(st.integers(1, 120))
    options = {
        "schedule": draw(st.sampled_from(["staged", "joint", "frozen"])),
        "policy": draw(st.sampled_from(["learned", "uniform", "shuffled"])),
        "stages": draw(st.integers(1, 12)),
        "stage_meta_steps": draw(st.none() | st.integers(1, 40)),
        "warmup_steps": draw(st.integers(0, 140)),
        "meta_interval": draw(st.integers(1, 7)),
        "meta_dense_steps": draw(st.integers(0, 30)),
    }
    return train_iters, options


class TestProperties:
    @settings(max_examples=200, deadline=None)
    @given(settings_of_runs())
    def test_what_holds_for_every_run(self, run):
        train_iters, options = run
        config = DWMConfig(**options)
        schedule = Schedule(config, train_iters)
        found = [schedule.plan(i) for i in range(train_iters)]
        stages = min(options["stages"], train_iters)

        # Stages come in order, none is left out, none is empty.
        numbers = [plan.stage for plan in found]
        assert numbers == sorted(numbers) and set(numbers) == set(range(stages))

        # Each stage ends once, at its last step, wherever there is a DWM to keep.
        ends = [plan.stage for plan in found if plan.ends_stage]
        assert ends == (list(range(stages)) if config.scores else [])
        for i, plan in enumerate(found[:-1]):
            assert not plan.ends_stage or found[i + 1].stage == plan.stage + 1

        # Warm-up is the beginning and nothing else; it is stock training, as all of a uniform run.
        stock = "warmup" if config.scores else "uniform"
        warm = [plan.window == stock for plan in found]
        length = options["warmup_steps"] if config.scores else train_iters
        assert warm == [i < length for i in range(train_iters)]
        assert [plan.weighted for plan in found] == [not w for w in warm]
        assert all(plan.staged == config.scores for plan in found)

        # Meta steps are taken in meta windows only, by policies that learn only.
        assert all(plan.window == "meta" for plan in found if plan.meta_step)
        assert config.trains or not any(plan.meta_step for plan in found)
        assert schedule.meta_steps() == sum(plan.meta_step for plan in found)

    @settings(max_examples=200, deadline=None)
    @given(settings_of_runs())
    def test_number_of_meta_steps_by_hand(self, run):
        """With interval 1: the windows' lengths, cut at the stages' ends, summed."""
        train_iters, options = run
        options.update(schedule="staged", policy="learned", meta_interval=1)
        stages, warmup = min(options["stages"], train_iters), options["warmup_steps"]
        expected = 0
        for k in range(stages):
            begin, end = train_iters * k // stages, train_iters * (k + 1) // stages
            left = max(0, end - max(begin, warmup))
            wanted = options["stage_meta_steps"]
            expected += -(-left // 2) if wanted is None else min(left, wanted)
        assert Schedule(DWMConfig(**options), train_iters).meta_steps() == expected

    @settings(max_examples=100, deadline=None)
    @given(settings_of_runs())
    def test_a_window_is_one_piece_at_the_beginning_of_its_stage(self, run):
        train_iters, options = run
        options.update(schedule="staged", policy="learned")
        found = plans(train_iters, **options)
        for k in range(min(options["stages"], train_iters)):
            windows = [plan.window[0] for plan in found if plan.stage == k]
            assert windows == sorted(windows, key="wmf".index)
