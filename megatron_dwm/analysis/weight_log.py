"""The step log: one JSON line a step, a console line every log interval, TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from megatron_dwm.analysis.log_file import FILE_NAME, read_log
from megatron_dwm.meta import finite_difference
from megatron_dwm.weighting.weights import weight_statistics

if TYPE_CHECKING:
    from megatron_dwm.train_step import StepRecord


class WeightLog:
    """Writes what each step's weights were.

    Args:
        folder: the run's `--save` folder, where `dwm_log.jsonl` goes; None: no file.
        domains: names of the blend's data sets, in the order of the loader's `dataset_id`.
        writer: a TensorBoard writer, or None.
        log_interval: steps between console lines.
        first_iteration: iterations done before this run; later lines of an older log of the
            same folder are dropped, because this run takes those steps again.
        samples: whether every sample's weight is written.
        printer: prints one line.
        writes: whether this rank writes at all (the last one does).
    """

    def __init__(
        self,
        folder: str | None,
        domains: list[str],
        writer: Any,
        log_interval: int,
        first_iteration: int,
        samples: bool,
        printer: Callable[[str], None],
        writes: bool,
    ) -> None:
        self.domains, self.writer, self.log_interval = domains, writer, log_interval
        self.samples, self.printer, self.writes = samples, printer, writes
        self.notices = Notices()
        self.file = None
        if folder is not None and writes:
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, FILE_NAME)
            kept = _lines_up_to(path, first_iteration)
            # Beside, then in place of, the old log: a kill in between loses nothing.
            with open(f"{path}.tmp", "w") as file:
                file.writelines(kept)
            os.replace(f"{path}.tmp", path)
            self.file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the run

    def write(self, record: StepRecord, extra: dict[str, Any] | None = None) -> None:
        """Logs one step.

        Args:
            record: the step.
            extra: further figures for the step's line.
        """
        if not self.writes or record.weights is None:
            return
        line = {**describe(record, self.domains, self.samples), **(extra or {})}
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
        if record.iteration % self.log_interval == 0:
            self.printer(console_line(line))
        warning = finite_difference.warning(record.meta.quality) if record.meta else None
        if warning is not None:
            self.printer(warning)
        for notice in [*record.notices, *self.notices.of(line)]:
            self.printer(notice)
        if record.overhead is not None and record.overhead.notice is not None:
            self.printer(record.overhead.notice)
        if self.writer is not None:
            for name, value in line.items():
                if name not in ("iteration", "stage") and isinstance(value, int | float):
                    self.writer.add_scalar(f"dwm/{name}", value, record.iteration)
            for name, value in line["domain_weight"].items():
                self.writer.add_scalar(f"dwm/domain_weight/{name}", value, record.iteration)


class Notices:
    """Says when a guard acted or a step was bad: at first, then each time the count has ten-folded.

    Counts of guards are those of this process; those of bad steps are the run's.
    """

    def __init__(self) -> None:
        self.floor = self.cap = 0

    def of(self, line: dict[str, Any]) -> list[str]:
        """Returns what is to be printed after a step.

        Args:
            line: the step's line of the log.
        """
        found = []
        at = f"DWM: iteration {line['iteration']}: "
        if "guard_temperature" in line:
            self.floor += 1
            if _is_power_of_ten(self.floor):
                found.append(
                    f"{at}--dwm-min-effective-samples raised the temperature to "
                    f"{line['guard_temperature']:.4g}; {_times(self.floor)} so far"
                )
        if "guard_capped" in line:
            self.cap += 1
            if _is_power_of_ten(self.cap):
                found.append(
                    f"{at}--dwm-max-weight cut the weights of {line['guard_capped']} samples; "
                    f"{_times(self.cap)} so far"
                )
        causes = line.get("bad_step", [])
        worth = [cause for cause in causes if _is_power_of_ten(line["bad_steps"][cause])]
        if worth:
            weights = ", and every weight was 1" if "scores" in causes else ""
            counts = ", ".join(f"{cause} {n}" for cause, n in line["bad_steps"].items())
            found.append(
                f"{at}NaN or infinite: {', '.join(causes)}; the weighting model stays as it was"
                f"{weights} (bad steps so far: {counts})"
            )
        return found


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _is_power_of_ten(count: int) -> bool:
    return str(count).strip("0") == "1"


def describe(record: StepRecord, domains: list[str], samples: bool = False) -> dict[str, Any]:
    """Returns a step's log line as a dict.

    Args:
        record: the step; its weights must not be None.
        domains: names of the blend's data sets.
        samples: include every sample's weight and domain.
    """
    weights = record.weights
    assert weights is not None
    weights = weights.detach().float().cpu()
    line: dict[str, Any] = {
        "iteration": record.iteration,
        "stage": record.plan.stage + 1,
        "window": record.plan.window,
        "lm_loss": None if record.lm_loss is None else _finite(float(record.lm_loss)),
        **{name: round(value, 6) for name, value in weight_statistics(weights).items()},
        "domain_weight": {},
        "domain_samples": {},
    }
    if record.domains is not None:
        ids = record.domains.cpu()
        if len(domains) == 1 and bool((ids < 0).all()):
            ids = torch.zeros_like(ids)  # a single data set is not numbered by the loader
        for i in sorted({int(i) for i in ids.tolist() if i >= 0}):
            name = domains[i] if i < len(domains) else str(i)
            chosen = weights[ids == i]
            line["domain_weight"][name] = round(chosen.mean().item(), 6)
            line["domain_samples"][name] = chosen.numel()
    if record.meta is not None:
        line.update(
            meta_loss=_finite(record.meta.loss),
            meta_gradient_norm=_finite(torch.linalg.vector_norm(record.meta.influence).item()),
            dwm_grad_norm=_finite(record.meta.grad_norm),
            dwm_updated=int(record.meta.updated),
            meta_seconds=round(record.meta.seconds, 4),
        )
        line.update({name: _finite(value) for name, value in record.meta.quality.items()})
    line.update({name: _finite(float(value)) for name, value in record.figures.items()})
    line.update(_guards(record))
    if record.causes:
        line["bad_step"] = record.causes
    if record.bad_steps:
        line["bad_steps"] = record.bad_steps
    if record.overhead is not None:
        line["dwm_time_share"] = round(record.overhead.time_share, 6)
        line["overhead_budget"] = record.overhead.budget
        if record.overhead.put_off:
            line["meta_put_off"] = 1
    if samples:
        line["weights"] = [_finite(round(w, 6)) for w in weights.tolist()]
        if record.domains is not None:
            line["domains"] = record.domains.tolist()
        if record.meta is not None:
            line["influence"] = [_finite(c) for c in record.meta.influence.tolist()]
    return line


def _guards(record: StepRecord) -> dict[str, Any]:
    """Returns what the guards of the weights did, where they acted."""
    batch, found = record.batch, {}
    if batch is None or "scores" in record.causes:
        return {}
    if batch.raised is not None and math.isfinite(batch.raised.item()):
        found["guard_temperature"] = batch.raised.item()
    if batch.capped is not None and batch.capped.item():
        found["guard_capped"] = int(batch.capped.item())
    return found


def console_line(line: dict[str, Any]) -> str:
    """Returns one line for the console, in the manner of Megatron's own."""
    parts = [
        f" dwm iteration {line['iteration']:8d}",
        f"stage {line['stage']} {line['window']}",
        f"entropy: {line['entropy']:.4f}",
        f"effective sample size: {line['effective_sample_size']:.3f}",
        f"max weight: {line['max_weight']:.3f}",
    ]
    if "meta_loss" in line:
        parts.insert(2, f"meta loss: {_number(line['meta_loss'], '.6E')}")
        parts.insert(3, f"meta-gradient norm: {_number(line['meta_gradient_norm'], '.3E')}")
        if not line["dwm_updated"]:
            parts.insert(4, "DWM update skipped")
    if "gate" in line and line.get("score_correlation_mean") is not None:
        parts.append(f"score correlation: {line['score_correlation_mean']:.3f}")
        parts.append(f"gate: {line['gate']:.2f}")
    if "guard_temperature" in line:
        parts.append(f"temperature raised to: {line['guard_temperature']:.4g}")
    if "guard_capped" in line:
        parts.append(f"weights capped: {line['guard_capped']}")
    if "bad_steps" in line:
        parts.append("bad steps: " + ", ".join(f"{k} {n}" for k, n in line["bad_steps"].items()))
    if "dwm_time_share" in line:
        parts.append(f"DWM time: {line['dwm_time_share']:.2%} of {line['overhead_budget']:.2%}")
    if "meta_put_off" in line:
        parts.append("meta step put off")
    for name, weight in line["domain_weight"].items():
        parts.append(f"{name}: {weight:.3f}")
    return " | ".join(parts) + " |"


def _lines_up_to(path: str, iteration: int) -> list[str]:
    if iteration == 0 or not os.path.exists(path):
        return []
    return [json.dumps(x) + "\n" for x in read_log(path) if x["iteration"] <= iteration]


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
