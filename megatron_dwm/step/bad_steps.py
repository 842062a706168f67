"""Counts steps in which something was NaN or infinite, by cause, and decides when to give up.

A bad step leaves the weighting model and its optimizer as they were, and the LLM never takes a step
with a bad weight: if a score is bad, the sample's weight is 1; under a softmax, every weight of the
batch is. A NaN in the LLM's own loss is left to the trainer.
"""

from __future__ import annotations

from typing import Any

from megatron_dwm.config import flag

# What was not finite, and what to do about it.
CAUSES = {
    "loss": (
        "the language model's loss",
        "it has diverged by itself: lower --lr; the trainer's --check-for-nan-in-loss-and-grad, on "
        "by default, ends such a run at once",
    ),
    "scores": (
        "a score of the weighting policy",
        "with --dwm-form model lower --dwm-head-lr and --dwm-backbone-lr; else the language "
        "model's own states or losses are not finite: lower --lr",
    ),
    "meta_gradient": (
        "the meta loss or the meta-gradient",
        "look at the meta set's data and at the language model's gradient norm; lower --lr",
    ),
    "gradient": (
        "the weighting model's gradient",
        "lower --dwm-head-lr and --dwm-backbone-lr, or set --dwm-clip-grad",
    ),
    "parameters": (
        "a parameter of the weighting model",
        "it cannot recover: resume from an earlier checkpoint, with --dwm-form model at lower "
        "--dwm-head-lr and --dwm-backbone-lr",
    ),
}


class BadSteps:
    """Counts bad steps, the same on every rank; its state is in the checkpoint.

    Two kinds of runs of bad steps are counted separately, because not every step is a meta step:
    steps with bad scores, among those that score, and bad meta steps, among meta steps.

    Args:
        limit: `--dwm-max-bad-steps`.

    Attributes:
        counts: bad steps by cause; a step may have several.
        steps: number of bad steps.
        in_a_row: consecutive bad steps, by `scores` and `update`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts = dict.fromkeys(CAUSES, 0)
        self.steps = 0
        self.in_a_row = {"scores": 0, "update": 0}
        self.causes: list[str] = []

    def note(self, causes: list[str], scored: bool, meta_step: bool) -> None:
        """Counts one step.

        Args:
            causes: what was not finite.
            scored: whether the DWM scored the step's samples.
            meta_step: whether an update of the DWM was due that only such a cause can have
                prevented.
        """
        self.causes = causes
        self.steps += bool(causes)
        for cause in causes:
            self.counts[cause] += 1
        if scored:
            bad = "scores" in causes
            self.in_a_row["scores"] = self.in_a_row["scores"] + 1 if bad else 0
        if meta_step:
            self.in_a_row["update"] = self.in_a_row["update"] + 1 if causes else 0

    def problem(self, iteration: int) -> str | None:
        """Returns why the run must end after this step; None if it may continue.

        Args:
            iteration: 1-based.
        """
        longest = max(self.in_a_row.values())
        if not self.causes or longest < self.limit:
            return None
        what = " and ".join(CAUSES[cause][0] for cause in self.causes)
        advice = "; ".join(dict.fromkeys(CAUSES[cause][1] for cause in self.causes))
        counts = ", ".join(f"{cause} {n}" for cause, n in self.counts.items() if n)
        steps = "meta steps" if self.in_a_row["update"] == longest else "steps"
        return (
            f"iteration {iteration}: {what} is NaN or infinite, in the last of {longest} bad "
            f"{steps} in a row, as many as {flag('max_bad_steps')} {self.limit} allows (bad steps "
            f"so far by cause: {counts}). Resume from an earlier checkpoint (--load, --ckpt-step), "
            f"and: {advice}"
        )

    def summary(self) -> dict[str, int]:
        """Returns the number of bad steps by cause, for causes that occurred."""
        return {cause: n for cause, n in self.counts.items() if n}

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts as plain values."""
        return {"counts": dict(self.counts), "steps": self.steps, "in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the counts of a checkpoint."""
        self.counts.update(state["counts"])
        self.steps = int(state["steps"])
        self.in_a_row.update(state["in_a_row"])
