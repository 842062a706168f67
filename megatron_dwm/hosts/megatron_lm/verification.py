"""Self-check during training: compares the meta-gradient with brute force on the current step.

`--dwm-verify-meta-gradient K` compares both every K meta steps, before the step is taken, and
leaves the trainer exactly as it was. Order and magnitude are compared, see
`meta_gradient/comparison.py`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_dwm.core import collectives
from megatron_dwm.core.batches import StepBatches
from megatron_dwm.core.trainee import Trainee
from megatron_dwm.meta_gradient.comparison import Verification
from megatron_dwm.step import probe
from megatron_dwm.step.influence_passes import StockStep
from megatron_dwm.step.probe import ProbedStep
from megatron_dwm.step.train_step import DWMTrainStep

# Every run of the trainer's step would write these again.
_WRITES = (
    "save_params_interval",
    "save_activations_interval",
    "save_tokens_per_expert_interval",
    "save_wgrads_interval",
    "save_dgrads_interval",
)


class Verifier:
    """Decides when a step is verified, verifies it, and reports the result.

    Args:
        step: the modified step.
        run: Megatron's arguments.
        printer: prints a line, on one rank.
        pending: whether, in the run that is resumed, a verification was due but not possible.
    """

    def __init__(
        self,
        step: DWMTrainStep,
        run: Any,
        printer: Callable[[str], None],
        pending: bool = False,
    ) -> None:
        self.step, self.run, self.printer, self.pending = step, run, printer, pending
        self._told = pending

    def __call__(
        self, stock_step: StockStep, trainee: Trainee, scheduler: Any, iteration: int
    ) -> tuple[Trainee, Verification | None]:
        """Verifies the step that is about to be taken, if it is due.

        Args:
            stock_step: runs the trainer's own step on the data iterator it is given.
            trainee: the LLM.
            scheduler: Megatron's learning-rate scheduler.
            iteration: 0-based.

        Returns:
            The trainee for the step itself (its micro-batches have been read), and what was found.
        """
        if not self._due(iteration):
            return trainee, None
        start = time.perf_counter()
        trainee, probed = probed_step(self.step, stock_step, trainee, scheduler, iteration)
        found = None
        if probed.ready():
            with _writing_nothing(self.run):
                found = probe.verify(probed, self.step.config.verify_samples)
        self.pending = found is None
        if found is not None:
            self._tell(found, iteration)
        elif not self._told:
            self._told = True
            self.printer(
                f"DWM: the meta-gradient of iteration {iteration + 1} cannot be verified yet: the "
                "optimizer has not taken a step before; tried again at the next meta step"
            )
        self._charge(time.perf_counter() - start)
        return trainee, found

    def _due(self, iteration: int) -> bool:
        """Returns, the same on every rank, whether this step is a meta step to be verified."""
        every, budget = self.step.config.verify_meta_gradient, self.step.budget
        if every is None or not self.step.schedule.plan(iteration).meta_step:
            return False
        if budget is not None and not budget.allows_meta_step():
            return False
        return self.pending or self.step.meta_steps_taken % every == 0

    def _tell(self, found: Verification, iteration: int) -> None:
        config = self.step.config
        self.printer(console_line(found, iteration + 1))
        for words in warnings(found, config.verify_correlation, config.estimator):
            self.printer(words)

    def _charge(self, seconds: float) -> None:
        """Counts the time as the DWM's, for `--dwm-overhead-budget`."""
        budget = self.step.budget
        if budget is None:
            return
        longest = torch.tensor(seconds, dtype=torch.float64, device=self.step.shape.device)
        budget.charge(collectives.largest(longest, torch.distributed.group.WORLD).item())


def probed_step(
    step: DWMTrainStep, stock_step: StockStep, trainee: Trainee, scheduler: Any, iteration: int
) -> tuple[Trainee, ProbedStep]:
    """Returns the step at `iteration` in a form that can be repeated.

    The step's micro-batches are read from the trainer's iterator. Random states stay as they were.

    Returns:
        The trainee with the micro-batches put back, for the step itself; and the step to probe.
    """
    plan, num_microbatches = step.schedule.plan(iteration), get_num_microbatches()
    step.start_warm(plan, trainee)  # as the step itself would do first
    batches = StepBatches(trainee.data_iterator, num_microbatches)
    weights = step.weights_of(trainee, batches, iteration) if plan.weighted else None
    if weights is None:
        count = num_microbatches * step.shape.micro_batch_size * step.groups.dp.size()
        weights = torch.ones(count, device=step.shape.device)
    trainee = replace(trainee, data_iterator=batches.replay(RerunDataIterator))
    return trainee, ProbedStep(step, trainee, scheduler, stock_step, batches, weights)


@contextlib.contextmanager
def _writing_nothing(run: Any) -> Iterator[None]:
    """Keeps trial steps from writing anything that the trainer's step can write."""
    kept = {name: getattr(run, name, None) for name in _WRITES}
    for name in kept:
        setattr(run, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(run, name, value)


def log_fields(found: Verification | None) -> dict[str, float | None]:
    """Returns the values for the step log."""
    if found is None:
        return {}
    figures = {
        "verify_correlation": found.correlation,
        "verify_relative_error": found.relative_error,
        "verify_magnitude": found.magnitude,
        "verify_noise": found.noise,
    }
    # JSON has no NaN.
    finite = {name: x if math.isfinite(x) else None for name, x in figures.items()}
    return {**finite, "verify_samples": len(found.samples)}


def passes(found: Verification, threshold: float) -> bool:
    """Returns whether the correlation reaches the threshold and the magnitude is not wrong."""
    correlated = math.isfinite(found.correlation) and found.correlation >= threshold
    return correlated and not found.wrong_magnitude


def drowned(found: Verification, threshold: float) -> bool:
    """Returns whether brute force is so noisy that a perfect estimate would not pass either."""
    finite = all(map(math.isfinite, [*found.estimated, *found.measured]))
    return finite and found.ceiling < threshold


def console_line(found: Verification, iteration: int) -> str:
    """Returns one line in the style of the step log."""
    return (
        f" dwm iteration {iteration:8d} | meta-gradient verified on {len(found.samples)} samples | "
        f"correlation: {found.correlation:.4f} | magnitude: {found.magnitude:.4G} | "
        f"relative error: {found.relative_error:.3E} | noise of brute force: {found.noise:.3E} |"
    )


def warnings(found: Verification, threshold: float, estimator: str) -> Iterator[str]:
    """Yields warnings about a comparison: none if all is well.

    Args:
        found: the comparison.
        threshold: `--dwm-verify-correlation`.
        estimator: the estimator in use.
    """
    if not passes(found, threshold):
        quiet = drowned(found, threshold) and not found.wrong_magnitude
        yield _without_verdict(found, threshold) if quiet else _loud(found, threshold, estimator)
    elif found.unknown_magnitude:
        yield (
            f"DWM: verification without a verdict on the magnitude ({_magnitude(found)}): the "
            f"brute force itself is too noisy, or the step too far from linear in a weight, as "
            f"Adam's first ones are: that alone may be {found.margin:.2f} of the estimate. Verify "
            "more samples (--dwm-verify-samples), later, or a short run in fp32"
        )


def _magnitude(found: Verification) -> str:
    words = f"the estimate is {found.magnitude:.3g} times what brute force measures"
    if found.tolerance is None:
        return words
    return f"{words}, and may be {1 / found.tolerance:.3g} to {found.tolerance:.3g} times that"


def _figures(found: Verification, threshold: float) -> str:
    return f"correlation {found.correlation:.4f}, --dwm-verify-correlation {threshold:g}"


def _without_verdict(found: Verification, threshold: float) -> str:
    return (
        f"DWM: verification without a verdict ({_figures(found, threshold)}): the brute force "
        f"itself is too noisy: raising and lowering a weight differ by {found.noise:.2f} of what "
        f"they measure, so that a perfect meta-gradient would reach {found.ceiling:.2f} only. In "
        "bf16 most parameters do not move when one sample's weight changes. Verify more "
        "samples (--dwm-verify-samples), at a larger learning rate, or a short run in fp32"
    )


def _loud(found: Verification, threshold: float, estimator: str) -> str:
    other = (
        "--dwm-estimator ghost, or another --dwm-fd-relative-step"
        if estimator == "finite_difference"
        else "--dwm-estimator finite_difference, --dwm-lookahead next, --dwm-jacobian exact"
    )
    what = [
        "The meta-gradient does not describe what sample weights do to the meta loss; the",
        "weighting model may be learning noise. The language model's training is not affected",
    ]
    if found.correlation >= threshold:
        what = [
            "The order of the samples is right, but the size of the meta-gradient is not, as if a",
            "loss scale counted twice. The language model's training is not affected",
        ]
    bar = "!" * 100
    return "\n".join(
        [
            bar,
            f"!!! DWM: META-GRADIENT NOT CONFIRMED: {_figures(found, threshold)}",
            *([f"!!! {_magnitude(found)}"] if found.wrong_magnitude else []),
            f"!!! relative error {found.relative_error:.3f}, noise of brute force "
            f"{found.noise:.3f} (a perfect meta-gradient would reach {found.ceiling:.3f})",
            *(f"!!! {line}" for line in what),
            f"!!! by this check. Try {other};",
            "!!! if this persists, train with --dwm-policy uniform and report it with this "
            "message.",
            bar,
        ]
    )
