"""What `report` shows about a run and about runs side by side: as text, and as plain values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dwm.errors import DWMError
from megatron_dwm.logs.compare import Comparison, Run, format_comparison, read_run, rows
from megatron_dwm.logs.log_file import FILE_NAME, iterate_log, parts
from megatron_dwm.logs.report import domain_weights_by_stage, format_table
from megatron_dwm.progress import bar

_VALIDATION = re.compile(r"validation loss at (.+?) \| lm loss value: ([\d.E+-]+)")
_STEP_TIME = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


@dataclass(frozen=True)
class Pair:
    """A weighted run compared with the stock trainer.

    Attributes:
        stock: last validation loss of the stock trainer.
        weighted: the same for the weighted run.
        step_time_ratio: mean step time of the weighted run divided by the stock trainer's.
    """

    stock: float
    weighted: float
    step_time_ratio: float


@dataclass(frozen=True)
class Verdict:
    """How a domain that is known to be bad ended.

    Attributes:
        domain: its name.
        weight: its mean weight at the end.
        lowest: the good domain with the lowest weight.
        lowest_weight: that weight.
    """

    domain: str
    weight: float
    lowest: str
    lowest_weight: float


@dataclass(frozen=True)
class Summary:
    """Everything that is reported.

    Attributes:
        by_stage: stage -> domain -> mean weight; None without a run.
        comparison: the runs side by side, or None.
        pair: the two outputs, or None.
        verdict: verdict on the bad domain, or None.
    """

    by_stage: dict[str, dict[str, float]] | None
    comparison: Comparison | None
    pair: Pair | None
    verdict: Verdict | None

    def text(self) -> str:
        """Returns the tables."""
        texts = [] if self.by_stage is None else [format_table(self.by_stage)]
        if self.comparison is not None:
            texts.append(format_comparison(self.comparison))
        if self.pair is not None:
            stock, weighted = self.pair.stock, self.pair.weighted
            texts.append(
                f"validation loss on the held-out target, equal tokens\n"
                f"  stock trainer            {stock:.4f}\n"
                f"  data weighting model     {weighted:.4f}   ({weighted - stock:+.4f})\n"
                f"mean step time, DWM over stock: {self.pair.step_time_ratio:.2f}"
            )
        if (bad := self.verdict) is not None:
            where = "below" if bad.weight < bad.lowest_weight else "NOT below"
            texts.append(
                f"the known-bad domain '{bad.domain}' ends at mean weight {bad.weight:.3f}, "
                f"{where} every good domain (lowest: {bad.lowest}, {bad.lowest_weight:.3f})"
            )
        return "\n\n".join(texts)

    def figures(self) -> dict[str, Any]:
        """Returns the same as plain values."""
        return {
            "mean_weight_by_stage": self.by_stage,
            "comparison": None if self.comparison is None else _compared(self.comparison),
            "pair": None if self.pair is None else vars(self.pair),
            "bad_domain": None if self.verdict is None else vars(self.verdict),
        }


def _compared(comparison: Comparison) -> dict[str, Any]:
    found, amount, seconds = rows(comparison)
    return {
        f"equal_{comparison.unit}": amount,
        "equal_seconds": seconds,
        "clock": comparison.clock,
        "runs": [
            {
                "name": row.name,
                f"loss_at_equal_{comparison.unit}": row.at_tokens,
                "loss_at_equal_time": row.at_time,
                "ended_before_that_time": row.ended,
                "step_processor_seconds": row.step_processor,
                "step_clock_seconds": row.step_clock,
            }
            for row in found
        ],
    }


def step_log(run: str) -> str:
    """Returns the path of a run's step log.

    Raises:
        DWMError: the folder has none.
    """
    path = os.path.join(run, FILE_NAME)
    if not parts(path):
        raise DWMError(
            f"{path}: no such file; name the --save folder of a run with --dwm (to compare with "
            "stock training, that of a run with --dwm --dwm-policy uniform)"
        )
    return path


def read_lines(path: str, label: str) -> Iterator[dict[str, Any]]:
    """Yields the lines of a step log, with a progress bar."""
    with bar(sum(os.path.getsize(part) for part in parts(path)), "B", label) as shown:
        yield from iterate_log(path, shown.update)


def stages_of(path: str) -> dict[str, dict[str, float]]:
    """Returns `domain_weights_by_stage` of a step log.

    Raises:
        DWMError: a line is not one of a step log.
    """
    try:
        return domain_weights_by_stage(read_lines(path, "reading the log"))
    except DWMError as error:
        raise DWMError(f"{path}: {error}") from None


def last_validation_loss(path: str) -> float:
    """Returns the last validation loss that the trainer printed.

    Raises:
        DWMError: there is none in the file.
    """
    with open(path, errors="replace") as file:
        found = [m for m in _VALIDATION.findall(file.read()) if "test set" not in m[0]]
    if not found:
        raise DWMError(f"{path}: no line 'validation loss at ...'; give the trainer's output")
    return float(found[-1][1])


def mean_step_seconds(path: str) -> float:
    """Returns the mean printed step time of a trainer's output, without the first line."""
    with open(path, errors="replace") as file:
        times = [float(text) for text in _STEP_TIME.findall(file.read())][1:]
    return sum(times) / len(times) / 1000 if times else float("nan")


def pair_of(log: str | None, stock_log: str | None) -> Pair | None:
    """Reads both outputs; None unless there are both.

    Raises:
        DWMError: one of them has no validation loss.
    """
    if not (log and stock_log):
        return None
    weighted, stock = last_validation_loss(log), last_validation_loss(stock_log)
    return Pair(stock, weighted, mean_step_seconds(log) / mean_step_seconds(stock_log))


def compared_runs(words: Sequence[str]) -> Comparison | None:
    """Reads the runs of `NAME=LOG` words; None without any.

    Raises:
        DWMError: a word is not `NAME=LOG`, or two have the same name.
    """
    runs: dict[str, Run] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise DWMError(f"--compare {word}: give NAME=LOG, a name and what the trainer printed")
        if name in runs:
            raise DWMError(
                f"--compare {word}: there is already a run named {name}; give it another name"
            )
        runs[name] = read_run(name, path)
    return Comparison.of(list(runs.values())) if runs else None


def verdict_on(
    bad: str, good: Sequence[str], by_stage: dict[str, dict[str, float]]
) -> Verdict | None:
    """Compares a bad domain with good ones in the last stage; None if one side is missing."""
    last = list(by_stage.values())[-1] if by_stage else {}
    weights = {name: last[name] for name in good if name in last}
    if bad not in last or not weights:
        return None
    lowest = min(weights, key=weights.__getitem__)
    return Verdict(bad, last[bad], lowest, weights[lowest])
