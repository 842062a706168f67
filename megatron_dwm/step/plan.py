"""The schedule: when samples are weighted, and when a meta step is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dwm.config import DWMConfig

DENSER = 4  # factor by which meta steps are more frequent at the start
# Share of the training in which losses do not yet tell samples apart: the burn-in of the policies
# that weigh by a function of the loss, as in their paper (1,000 of 20,000 steps).
BURN_IN = 0.05


@dataclass(frozen=True)
class StepPlan:
    """What one training step does.

    Attributes:
        stage: 0-based stage.
        window: `warmup`, `meta` or `frozen`; if nothing is learned and there are no such windows,
            `uniform` (every weight is 1) or `weighted`.
        weighted: whether the DWM's weights apply (else w = 1).
        meta_step: whether the DWM is updated in this step.
        ends_stage: whether this is the stage's last step (a snapshot is taken after it).
    """

    stage: int
    window: str
    weighted: bool
    meta_step: bool
    ends_stage: bool

    @property
    def staged(self) -> bool:
        """Whether the weights depend on the step's stage."""
        return self.window not in ("uniform", "weighted")


class Schedule:
    """Maps an iteration to a `StepPlan`; a pure function of the config, so resume needs no state.

    The training's `train_iters` steps are divided into `stages` equal parts. A stage is a meta
    window of `stage_meta_steps` and a frozen window. The first `warmup_steps` are uniform and do
    not count towards the first stage's meta window.
    """

    def __init__(self, config: DWMConfig, train_iters: int) -> None:
        self.config = config
        self.train_iters = max(1, train_iters)
        self.stages = min(config.stages, self.train_iters)
        burn_in = math.ceil(BURN_IN * self.train_iters) if config.needs.loss_shape else 0
        given = config.warmup_steps
        self.warmup_steps = burn_in if given is None else given
        self.bounds = [self.train_iters * k // self.stages for k in range(self.stages + 1)]

    def plan(self, iteration: int) -> StepPlan:
        """Returns the plan of the step with 0-based index `iteration`."""
        config = self.config
        position = min(max(iteration, 0), self.train_iters - 1)
        stage = next(k for k in range(self.stages) if position < self.bounds[k + 1])
        ends_stage = iteration + 1 == self.bounds[stage + 1]
        if not config.scores:
            return StepPlan(stage, "uniform", False, False, False)
        if iteration < self.warmup_steps:
            return StepPlan(stage, "warmup", False, False, ends_stage)
        window = self._window(stage, iteration)
        due = self._due_before(iteration + 1) > self._due_before(iteration)
        return StepPlan(stage, window, True, config.trains and window == "meta" and due, ends_stage)

    def description(self) -> dict[str, object]:
        """Returns everything that determines the plans, to notice if a resumed run changes it."""
        config = self.config
        return {
            "schedule": config.schedule,
            "bounds": list(self.bounds),
            "warmup_steps": self.warmup_steps,
            "stage_meta_steps": config.stage_meta_steps,
            "meta_interval": config.meta_interval,
            "meta_dense_steps": config.meta_dense_steps,
        }

    def _window(self, stage: int, iteration: int) -> str:
        if not self.config.learned and not self.config.trains:
            return "weighted"
        if self.config.schedule == "frozen":
            return "frozen"
        return "meta" if iteration < self._meta_window(stage)[1] else "frozen"

    def _meta_window(self, stage: int) -> tuple[int, int]:
        """Returns the first step of a stage's meta window, and the one after its last."""
        begin, end = self.bounds[stage], self.bounds[stage + 1]
        begin = min(max(begin, self.warmup_steps), end)
        if self.config.schedule == "joint":
            return begin, end
        length = self.config.stage_meta_steps
        if length is None:
            length = (end - begin + 1) // 2
        return begin, min(end, begin + length)

    def meta_steps(self) -> int:
        """Returns the number of meta steps of the whole training."""
        if not self.config.trains:
            return 0
        windows = [self._meta_window(stage) for stage in range(self.stages)]
        return sum(self._due_before(end) - self._due_before(begin) for begin, end in windows)

    def _due_before(self, iteration: int) -> int:
        """Returns the number of meta steps due before a step, ignoring windows.

        Every `meta_interval` steps from the end of the warm-up on, and four times as often in the
        first `meta_dense_steps` of them.
        """
        interval, dense = self.config.meta_interval or 1, self.config.meta_dense_steps or 0
        passed = max(0, iteration - self.warmup_steps)
        often = max(1, interval // DENSER)
        return -(-min(passed, dense) // often) + -(-max(0, passed - dense) // interval)
