"""A run's step log, read once for a report: metrics over steps, stages, weights of samples."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from megatron_dwm.errors import DWMError
from megatron_dwm.logs.plot import domain_weights_over_run
from megatron_dwm.logs.report import domain_weights_by_stage
from megatron_dwm.logs.summary import read_lines, step_log
from megatron_dwm.logs.text_statistics import rank_correlation, ranks

# Fields with one value per sample; far too much to keep for a long run.
_OF_SAMPLES = ("weights", "scores", "domains", "influence", "losses")
_PARTS = 40  # number of points of a line over the run
_END = 0.1  # share of the run that "at the end" means
BINS = 10


@dataclass
class WeightByRank:
    """How the weights of a step relate to another number of its samples.

    Steps differ in scale, so it uses a sample's rank in its step, and its weight relative to the
    step's mean.

    Attributes:
        counts: `[BINS]` number of samples, from the lowest tenth of a step to the highest.
        sums: `[BINS]` sums of their weights relative to the step's mean.
        squares: the same, squared.
        correlations: rank correlation of weight and number, for each step.
    """

    counts: numpy.ndarray = field(default_factory=lambda: numpy.zeros(BINS))
    sums: numpy.ndarray = field(default_factory=lambda: numpy.zeros(BINS))
    squares: numpy.ndarray = field(default_factory=lambda: numpy.zeros(BINS))
    correlations: list[float] = field(default_factory=list)

    def add(self, weights: Sequence[float | None], numbers: Sequence[float | None]) -> None:
        """Includes a step, unless all its weights are equal, which carries no information."""
        w = numpy.array(weights, dtype=float)
        x = numpy.array(numbers, dtype=float)
        if w.shape != x.shape or len(w) < 3 or not numpy.isfinite([w, x]).all():
            return
        correlation = rank_correlation(w, x)
        if not (math.isfinite(correlation) and w.mean() > 0):
            return
        self.correlations.append(correlation)
        place = (ranks(x) * BINS / len(w)).astype(int)
        relative = w / w.mean()
        self.counts += numpy.bincount(place, minlength=BINS)
        self.sums += numpy.bincount(place, relative, minlength=BINS)
        self.squares += numpy.bincount(place, relative**2, minlength=BINS)

    def bins(self) -> list[tuple[float, float, float, int]]:
        """Returns middle of the tenth, mean weight, standard deviation and count of each bin."""
        found = []
        for k in numpy.flatnonzero(self.counts):
            mean = self.sums[k] / self.counts[k]
            variance = max(0.0, self.squares[k] / self.counts[k] - mean**2)
            middle = (float(k) + 0.5) / BINS
            found.append((middle, float(mean), math.sqrt(variance), int(self.counts[k])))
        return found


@dataclass(frozen=True)
class RunLog:
    """One run's log, as shown in a report.

    Attributes:
        name: of the run.
        folder: its `--save` folder.
        lines: lines of the log, without per-sample fields.
        by_stage: see `domain_weights_by_stage`.
        by_usefulness: weights by the negative influence that the meta step finds; empty unless the
            run had `--dwm-log-samples` and took meta steps.
        by_loss: weights by the mean token loss; empty unless the run had `--dwm-log-samples`, with
            a policy that asks for losses.
    """

    name: str
    folder: str
    lines: list[dict[str, Any]]
    by_stage: dict[str, dict[str, float]]
    by_usefulness: WeightByRank
    by_loss: WeightByRank

    @property
    def last(self) -> int:
        """The last logged iteration."""
        return self.lines[-1]["iteration"]

    def series(self, key: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Returns the iterations and values of a metric, where it was logged."""
        pairs = [
            (line["iteration"], line[key])
            for line in self.lines
            if isinstance(line.get(key), int | float) and math.isfinite(line[key])
        ]
        found = numpy.array(pairs, dtype=float).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def over_run(self, key: str, parts: int = _PARTS) -> tuple[list[float], list[float]]:
        """Returns a metric's means over equal pieces of the run, and their middles."""
        x, y = self.series(key)
        place = numpy.minimum((x - 1) * parts // self.last, parts - 1).astype(int)
        counts, sums = numpy.bincount(place), numpy.bincount(place, y)
        filled = numpy.flatnonzero(counts)
        middles = (filled + 0.5) * self.last / parts
        return middles.tolist(), (sums[filled] / counts[filled]).tolist()

    def at_end(self, key: str) -> float:
        """Returns a metric's mean over the last tenth of the run, else its last value, else NaN."""
        x, y = self.series(key)
        late = y[x > self.last * (1 - _END)]
        return float(late.mean() if len(late) else y[-1] if len(y) else math.nan)

    def domains(self, parts: int = _PARTS) -> dict[str, tuple[list[float], list[float]]]:
        """Returns `domain_weights_over_run`, with the domains with most samples first."""
        over_run = domain_weights_over_run(self.lines, parts)
        return {name: over_run[name] for name, _ in self.samples_by_domain().most_common()}

    def samples_by_domain(self) -> Counter[str]:
        """Returns the number of logged samples of each domain."""
        found: Counter[str] = Counter()
        for line in self.lines:
            found.update(line["domain_samples"])
        return found

    def mean_weight(self, share: float = 1.0) -> float:
        """Returns the mean weight of the samples in the last share of the run; NaN if unknown."""
        total = count = 0.0
        for line in self.lines:
            if line["iteration"] > self.last * (1 - share):
                for name, weight in line["domain_weight"].items():
                    if weight is not None:
                        total += weight * line["domain_samples"][name]
                        count += line["domain_samples"][name]
        return total / count if count else math.nan

    def marks(self) -> list[tuple[int, str]]:
        """Returns the first iteration of each stage except the first, and the end of the warm-up.

        Returns:
            Iteration and name, in order.
        """
        found = []
        for before, line in zip(self.lines, self.lines[1:], strict=False):
            if line.get("stage") != before.get("stage"):
                found.append((line["iteration"], f"stage {line.get('stage', '-')}"))
            elif before["window"] == "warmup" != line["window"]:
                found.append((line["iteration"], "weighted"))
        return found

    def kind(self) -> str:
        """Returns how the run was weighted, as far as its log shows."""
        meta, _ = self.series("meta_loss")
        if len(meta):
            spacing = float(numpy.median(numpy.diff(meta))) if len(meta) > 1 else 0.0
            # The typical interval: meta steps are denser early on, and a stage may end without any.
            often = {0.0: "", 1.0: ", mostly in every step"}
            every = often.get(spacing, f", mostly every {spacing:g} steps")
            return f"learned, {len(meta)} meta steps{every}"
        if all(line["window"] == "uniform" for line in self.lines):
            return "uniform weights"
        return "weighted without meta steps"

    def warmup(self) -> int:
        """Returns the number of steps before anything was weighted."""
        return sum(line["window"] == "warmup" for line in self.lines)


def read_run_log(name: str, folder: str) -> RunLog:
    """Reads a run's step log.

    Raises:
        DWMError: there is none, it is empty, or a line does not belong to a step log.
    """
    path = step_log(folder)
    lines, by_usefulness, by_loss = [], WeightByRank(), WeightByRank()
    try:
        for line in read_lines(path, f"reading {name}"):
            _check(line)
            if "weights" in line and "influence" in line:
                useful = [None if c is None else -c for c in line["influence"]]
                by_usefulness.add(line["weights"], useful)
            if "weights" in line and "losses" in line:
                by_loss.add(line["weights"], line["losses"])
            lines.append({key: line[key] for key in line if key not in _OF_SAMPLES})
        by_stage = domain_weights_by_stage(lines)
    except DWMError as error:
        raise DWMError(f"{path}: {error}") from None
    if not lines:
        raise DWMError(
            f"{path}: has no whole line; the run has logged no step yet, or the file is damaged"
        )
    return RunLog(name, folder, lines, by_stage, by_usefulness, by_loss)


def _check(line: dict[str, Any]) -> None:
    """Refuses a line whose fields do not have a step log's types."""
    weights, samples = line.get("domain_weight", {}), line.get("domain_samples", {})
    right = (
        isinstance(weights, dict)
        and isinstance(samples, dict)
        and weights.keys() <= samples.keys()
        and all(isinstance(value, int | float | None) for value in weights.values())
        and all(isinstance(value, int) for value in samples.values())
        and isinstance(line.get("window", ""), str)
        and line["iteration"] > 0
        and all(isinstance(line.get(key, []), list) for key in _OF_SAMPLES)
    )
    if not right:
        raise DWMError(
            f"the line of iteration {line['iteration']} is damaged (fields of other types than a "
            "step log has); give the step log of a run with --dwm"
        )


def run_names(folders: Sequence[str]) -> list[str]:
    """Returns names for runs: their folders' names, or whole paths if two are the same."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return [
        folder if names.count(name) > 1 else name
        for name, folder in zip(names, folders, strict=True)
    ]
