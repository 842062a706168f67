"""Snapshots by stage: saved by a run that learns, loaded by one whose weights are frozen."""

from __future__ import annotations

import os
from collections.abc import Callable

from megatron_dwm.checkpoint import snapshots
from megatron_dwm.step.plan import StepPlan
from megatron_dwm.step.train_step import DWMTrainStep


class StageSnapshots:
    """What a run does with snapshots when a stage begins or ends; the same on every rank.

    Args:
        step: holds the weighting.
        say: prints a line once for all ranks.
    """

    def __init__(self, step: DWMTrainStep, say: Callable[[str], None]) -> None:
        self.step, self.say = step, say
        self._taken: int | None = None

    def resumed(self, iteration: int) -> None:
        """Records that a checkpoint after this many steps was loaded.

        The stage's snapshot is in it, with its running state since then.
        """
        if iteration > 0:
            self._taken = self.step.schedule.plan(iteration - 1).stage

    def take(self, iteration: int) -> None:
        """With the frozen schedule, loads the snapshot that matches a new stage, or the last."""
        config = self.step.config
        if config.schedule != "frozen" or not config.load or not config.learned:
            return
        stage = self.step.schedule.plan(iteration).stage
        if stage != self._taken:
            self._taken = stage
            self.say(snapshots.load_snapshot(self.step, config.load, stage))

    def keep(self, plan: StepPlan, folder: str | None) -> None:
        """Saves the DWM at the end of a stage, for transfer to another LLM or data set.

        Args:
            plan: plan of the step that was taken.
            folder: the run's folder; None: nothing is saved.
        """
        config = self.step.config
        if folder and plan.ends_stage and config.learned and config.trains:
            path = os.path.join(folder, snapshots.snapshot_name(plan.stage))
            snapshots.save_snapshot(self.step, path)
            self.say(f"DWM: snapshot of stage {plan.stage + 1} in {path}")
