"""Counting bad steps: two kinds of runs of them, the message, and a state that survives."""

from __future__ import annotations

import pytest

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.step.bad_steps import CAUSES, BadSteps  # noqa: E402


def taken(steps: BadSteps, *causes: str, scored: bool = True, meta_step: bool = True) -> BadSteps:
    steps.note(list(causes), scored, meta_step)
    return steps


class TestLimit:
    @pytest.mark.parametrize("cause", CAUSES)
    @pytest.mark.parametrize("limit", [1, 3])
    def test_is_reached_by_that_many_in_a_row_and_not_before(self, cause, limit):
        steps = BadSteps(limit)
        for n in range(1, limit + 1):
            assert steps.problem(n) is None
            taken(steps, cause)
        text = steps.problem(limit)
        assert text is not None and "\n" not in text
        assert f"iteration {limit}: {CAUSES[cause][0]} is NaN or infinite" in text
        assert f"--dwm-max-bad-steps {limit}" in text and f"{cause} {limit}" in text
        assert CAUSES[cause][1] in text and "--ckpt-step" in text

    @pytest.mark.parametrize("cause", CAUSES)
    def test_a_good_step_begins_anew(self, cause):
        steps = BadSteps(2)
        for _ in range(5):
            assert taken(taken(steps, cause)).problem(1) is None
        assert steps.counts[cause] == 5 == steps.steps

    @pytest.mark.parametrize("cause", ["loss", "meta_gradient", "gradient", "parameters"])
    def test_frozen_steps_between_bad_meta_steps_do_not_hide_them(self, cause):
        steps = BadSteps(3)
        for n in range(3):
            assert steps.problem(n) is None
            taken(taken(steps, meta_step=False), cause)
        assert "meta steps in a row" in steps.problem(6)

    def test_bad_scores_of_frozen_steps_count(self):
        steps = BadSteps(2)
        assert taken(steps, "scores", meta_step=False).problem(1) is None
        assert "a score of the weighting policy" in taken(steps, "scores", meta_step=False).problem(
            2
        )

    def test_steps_that_do_not_score_change_nothing(self):
        steps = taken(BadSteps(2), "scores")
        assert taken(steps, scored=False, meta_step=False).problem(2) is None
        assert taken(steps, "scores").problem(3) is not None

    def test_different_causes_in_a_row_count_together(self):
        steps = taken(taken(BadSteps(3), "gradient"), "loss")
        text = taken(steps, "scores", "parameters").problem(3)
        assert "a score of the weighting policy and a parameter of" in text
        assert "loss 1, scores 1, gradient 1, parameters 1" in text


def test_state_survives_a_resume():
    """Counts and runs go on where they were."""
    whole = BadSteps(4)
    for _ in range(3):
        taken(whole, "gradient")
    resumed = BadSteps(4)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.summary() == {"gradient": 3} and resumed.steps == 3
    assert taken(resumed, "gradient").problem(9) == taken(whole, "gradient").problem(9) is not None
