"""Compares runs, read from what the trainer printed, at equal tokens and at equal time.

A run's time is that of its training steps, without evaluation and saving: processor time if the
output has it (`examples/demo_train.py`), because wall-clock time says little on a busy machine;
else the trainer's `elapsed time per iteration`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy

from megatron_dwm.errors import DWMError

_ITERATION = re.compile(
    r"iteration +(\d+)/ *\d+ \| consumed samples: +(\d+) \|.*?"
    r"elapsed time per iteration \(ms\): ([\d.]+)"
)
_PROCESSOR = re.compile(
    r"processor time of steps (\d+) to (\d+) on rank (\d+) \(s\): (\d+\.\d+)(?!\d)"
)
_VALIDATION = re.compile(
    r"validation loss at iteration (\d+)(?: on validation set)? \| lm loss value: (\S+)"
)
# Each process of a run begins its output with its arguments.
_ARGUMENTS = re.compile(r"^-+ arguments -+$", re.MULTILINE)
_SEQUENCE = re.compile(r"^ *seq_length \.+ (\d+)$", re.MULTILINE)


@dataclass
class StepTimes:
    """Seconds of single steps, as far as known.

    Attributes:
        known: iteration (from 1) -> seconds.
    """

    known: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean seconds per step; NaN if none is known."""
        return sum(self.known.values()) / len(self.known) if self.known else float("nan")

    def until(self, iteration: int) -> float:
        """Returns the seconds of all steps up to an iteration; unknown ones count as the mean."""
        mean = self.mean
        return sum(self.known.get(step, mean) for step in range(1, iteration + 1))


@dataclass
class Run:
    """What one run's output contains.

    Attributes:
        name: what the run is called in tables.
        losses: iteration -> validation loss.
        samples: iteration -> samples read until then.
        sequence_length: tokens per sample, None if the output does not say.
        clock: wall-clock times of the steps.
        processor: processor times of the steps, mean over ranks.
    """

    name: str
    losses: dict[int, float] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    sequence_length: int | None = None
    clock: StepTimes = field(default_factory=StepTimes)
    processor: StepTimes = field(default_factory=StepTimes)

    def samples_until(self, iteration: int) -> int:
        """Returns the samples read until an iteration, even if no line states it."""
        known = self.samples.get(iteration)
        if known is None:
            last = max(self.samples)
            known = round(iteration * self.samples[last] / last)
        return known


def read_run(name: str, path: str) -> Run:
    """Reads a trainer's output; for a resumed run, all outputs one after the other.

    Args:
        name: what the run is called.
        path: the file.

    Raises:
        DWMError: it has no validation loss, or no line of an iteration.
    """
    with open(path, errors="replace") as file:
        text = file.read()
    run = Run(name)
    run.losses = {int(i): _number(loss) for i, loss in _VALIDATION.findall(text)}
    if not run.losses:
        raise DWMError(f"{path}: no line 'validation loss at ...'; give the trainer's output")
    run.samples = {int(i): int(count) for i, count, _ in _ITERATION.findall(text)}
    if not run.samples:
        raise DWMError(f"{path}: no line 'iteration ... consumed samples'; give the whole output")
    length = _SEQUENCE.search(text)
    run.sequence_length = None if length is None else int(length[1])
    run.clock, run.processor = StepTimes(_clock_times(text)), StepTimes(_processor_times(text))
    return run


def _clock_times(text: str) -> dict[int, float]:
    """Returns each step's wall-clock seconds, without the first line of each process."""
    found: dict[int, float] = {}
    for process in _ARGUMENTS.split(text):
        before = None
        for number, _, milliseconds in _ITERATION.findall(process):
            if before is not None:
                steps = range(before + 1, int(number) + 1)
                found.update(dict.fromkeys(steps, float(milliseconds) / 1000))
            before = int(number)
    return found


def _processor_times(text: str) -> dict[int, float]:
    """Returns each step's processor seconds, mean over ranks, without first lines as above."""
    by_rank: dict[str, dict[int, float]] = {}
    for process in _ARGUMENTS.split(text):
        seen = set()
        for start, stop, rank, seconds in _PROCESSOR.findall(process):
            steps = range(int(start), int(stop) + 1)
            if rank in seen:
                known = by_rank.setdefault(rank, {})
                known.update(dict.fromkeys(steps, float(seconds) / len(steps)))
            seen.add(rank)
    common = set.intersection(*(set(known) for known in by_rank.values())) if by_rank else set()
    return {s: sum(known[s] for known in by_rank.values()) / len(by_rank) for s in sorted(common)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


@dataclass(frozen=True)
class Curve:
    """A run's validation losses over tokens and over time, in order.

    Attributes:
        name: name of the run.
        losses: validation losses.
        amounts: tokens (or samples) read until then.
        seconds: training time until then; NaN if unknown.
    """

    name: str
    losses: list[float]
    amounts: list[int]
    seconds: list[float]


@dataclass(frozen=True)
class Comparison:
    """Runs that can be compared.

    Attributes:
        runs: the runs; the others are compared with the first.
        clock: `processor` or `clock`, the times used for `Curve.seconds`.
        unit: what `Curve.amounts` counts: `tokens` or `samples`.
    """

    runs: list[Run]
    clock: str
    unit: str

    @classmethod
    def of(cls, runs: list[Run]) -> Comparison:
        """Uses processor time if all runs have it, and tokens if all lengths are known."""
        processor = all(run.processor.known for run in runs)
        known = all(run.sequence_length for run in runs)
        return cls(runs, "processor" if processor else "clock", "tokens" if known else "samples")

    def curves(self) -> list[Curve]:
        """Returns each run's curve."""
        found = []
        for run in self.runs:
            times: StepTimes = getattr(run, self.clock)
            length = (run.sequence_length or 1) if self.unit == "tokens" else 1
            steps = sorted(run.losses)
            found.append(
                Curve(
                    run.name,
                    [run.losses[step] for step in steps],
                    [run.samples_until(step) * length for step in steps],
                    [times.until(step) for step in steps],
                )
            )
        return found


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: name of the run.
        at_tokens: validation loss when the shortest run ended; None before the first evaluation.
        at_time: validation loss after as much time as the first run took; None as above, or
            unknown.
        ended: whether the run ended earlier than that, so that `at_time` is its last loss.
        step_processor: processor seconds of a step, mean over ranks; NaN unknown.
        step_clock: seconds of a step by the clock; NaN unknown.
    """

    name: str
    at_tokens: float | None
    at_time: float | None
    ended: bool
    step_processor: float
    step_clock: float


def rows(comparison: Comparison) -> tuple[list[Row], float, float]:
    """Returns a row for each run, and the tokens and the seconds at which they are compared."""
    curves = comparison.curves()
    amount = min(curve.amounts[-1] for curve in curves)
    seconds = curves[0].seconds[-1]
    found = [
        Row(
            curve.name,
            interpolated(amount, curve.amounts, curve.losses),
            interpolated(seconds, curve.seconds, curve.losses),
            curve.seconds[-1] < seconds,
            run.processor.mean,
            run.clock.mean,
        )
        for run, curve in zip(comparison.runs, curves, strict=True)
    ]
    return found, amount, seconds


def interpolated(at: float, x: Sequence[float], y: Sequence[float]) -> float | None:
    """Interpolates `y` linearly at a point; the last value after the end, None before the start."""
    if not numpy.isfinite([at, *x]).all() or at < x[0]:
        return None
    return float(numpy.interp(at, x, y))


def format_comparison(comparison: Comparison) -> str:
    """Returns the table: loss at equal tokens and at equal time, and the cost of a step."""
    found, amount, seconds = rows(comparison)
    first = found[0]
    header = (
        "validation loss",
        "at equal tokens",
        "at equal time",
        "step, processor",
        "step, clock",
    )
    units = (
        "on the held-out target",
        f"{amount / 1e6:.2f}M {comparison.unit}",
        f"{seconds:.1f} s" if numpy.isfinite(seconds) else "time unknown",
        f"over {first.name}",
        f"over {first.name}",
    )
    table = [header, units]
    for row in found:
        at_time = _against(row.at_time, first.at_time, row is first)
        table.append(
            (
                f"  {row.name}",
                _against(row.at_tokens, first.at_tokens, row is first),
                f"{at_time}*" if row.ended and row is not first else at_time,
                _ratio(row.step_processor, first.step_processor),
                _ratio(row.step_clock, first.step_clock),
            )
        )
    widths = [max(len(line[k]) for line in table) for k in range(len(header))]
    lines = []
    for name, *cells in table:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    what = {
        "processor": "processor time of training steps, mean over ranks",
        "clock": "the trainer's own elapsed time",
    }
    lines.append(f"time: {what[comparison.clock]}, evaluation and saving left out")
    if any(row.ended for row in found[1:]):
        lines.append("* ended before that time: its last loss")
    return "\n".join(lines)


def _against(value: float | None, first: float | None, alone: bool) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if alone or first is None else f"{value:.4f} ({value - first:+.4f})"


def _ratio(value: float, first: float) -> str:
    return f"{value / first:.2f}" if value > 0 and first > 0 else "-"
