"""The preference report: an HTML page about what one or several runs preferred.

Sections are lists of HTML parts; if a run has not logged something, the section says so.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from megatron_dwm.errors import DWMError
from megatron_dwm.logs.charts import Chart, against, number, over_steps
from megatron_dwm.logs.html_page import charts, heading, page, paragraph, quotes, table
from megatron_dwm.logs.log_file import PASS_SECONDS
from megatron_dwm.logs.passages import STATISTICS, DocumentSample, passages
from megatron_dwm.logs.run_log import RunLog, WeightByRank
from megatron_dwm.logs.text_statistics import binned

MOST_RUNS = 8  # as many as there are dash patterns
MOST_BYTES = 5 << 20
# In the order of a step with `--dwm-lookahead current`; `influence` has a pass of its own only with
# `--dwm-lookahead next`.
_PASSES = {
    "meta_gradient": "C, meta gradient",
    "inner": "B, weighted step",
    "influence": "D, influence",
    "learn": "E, what the policy learns",
}
_DOMAINS_DRAWN, _DOMAINS_LISTED = 8, 100
_BINS = 10

# Field of the log -> title, unit, and whether the first steps count for the range of the axis.
_OVER_STEPS = {
    "lm_loss": ("Loss of the language model", "nats per token", False),
    "meta_loss": ("Meta loss", "nats per token", False),
    "score_correlation_mean": ("Out-of-sample correlation", "scores with influence", True),
    "gate": ("Gate", "0 closed, 1 open", True),
    "effective_sample_size": ("Effective share of the samples", "share", True),
}
_ERROR = {"score_correlation_mean": "score_correlation_error"}
_NEEDED = {
    "usefulness": "It needs --dwm-log-samples, and meta steps whose weights differ.",
    "loss": "It needs --dwm-log-samples, and a policy that asks for the samples' losses.",
}
_RANKS = (
    "Points are tenths of each step's samples, bars the standard deviation within a tenth. A "
    "sample is useful if, by the meta step, more weight on it lowers the meta loss."
)


@dataclass(frozen=True)
class Documents:
    """A run's documents, or why there are none.

    Attributes:
        sample: the sampled documents, or None.
        why: the reason, if None.
    """

    sample: DocumentSample | None
    why: str = ""


@dataclass(frozen=True)
class Report:
    """The page and its charts.

    Attributes:
        html: the page.
        pictures: the charts.
    """

    html: str
    pictures: list[Chart]

    def write(self, path: str, folder: str | None) -> None:
        """Writes the page, and the charts as PNG if a folder is given.

        Raises:
            DWMError: the page is too large.
            OSError: something cannot be written.
        """
        data = self.html.encode("utf-8", errors="replace")
        if len(data) > MOST_BYTES:
            raise DWMError(
                f"--html {path}: the page would have {len(data) / 2**20:.1f} MiB, more than "
                f"{MOST_BYTES >> 20}; give fewer runs"
            )
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            for chart in self.pictures:
                chart.save_png(os.path.join(folder, f"{chart.name}.png"))
        with open(f"{path}.part", "wb") as file:
            file.write(data)
        os.replace(f"{path}.part", path)


def build(runs: Sequence[RunLog], documents: Sequence[Documents]) -> Report:
    """Makes the report.

    Args:
        runs: the logs, 8 at most.
        documents: documents of each run.
    """
    pictures: list[Chart] = []
    body = _headline(runs)
    body += _steps(runs, pictures)
    body.append(heading(2, "Weight by domain"))
    for k, run in enumerate(runs, start=1):
        body += _domains(run, f"run{k}", pictures)
    body += _cost(runs, pictures)
    body += [heading(2, "Weight by usefulness and by loss"), paragraph(_RANKS)]
    for k, run in enumerate(runs, start=1):
        body.append(heading(3, run.name))
        body += _by_rank(run, run.by_usefulness, "usefulness", f"run{k}", pictures)
        body += _by_rank(run, run.by_loss, "loss", f"run{k}", pictures)
    body.append(heading(2, "Weight by document"))
    for k, (run, found) in enumerate(zip(runs, documents, strict=True), start=1):
        body += _documents(run, found, f"run{k}", pictures)
    title = f"What was preferred: {', '.join(run.name for run in runs)}"
    return Report(page(title, body), pictures)


# ------------------------------------------------------------------ all runs together


def _headline(runs: Sequence[RunLog]) -> list[str]:
    rows = {
        "weighting": [run.kind() for run in runs],
        "steps logged": [f"{run.lines[0]['iteration']} to {run.last}" for run in runs],
        "warm-up steps": [str(run.warmup()) for run in runs],
        "stages": [str(len({line.get("stage") for line in run.lines} - {None})) for run in runs],
        "domains": [str(len(run.samples_by_domain())) for run in runs],
        "loss of the language model": [number(run.at_end("lm_loss"), 4) for run in runs],
        "meta loss": [number(run.at_end("meta_loss"), 4) for run in runs],
        "out-of-sample correlation": [_with_error(run) for run in runs],
        "gate": [number(run.at_end("gate"), 2) for run in runs],
        "effective share of the samples": [
            number(run.at_end("effective_sample_size")) for run in runs
        ],
        "mean weight of a sample": [number(run.mean_weight(0.1)) for run in runs],
        "largest weight": [number(run.at_end("max_weight")) for run in runs],
        "share of the time": [_share(_last(run, "weighting_time_share")) for run in runs],
        "bad steps": [_bad_steps(run) for run in runs],
    }
    return [
        heading(2, "Headline figures"),
        paragraph("Means over the last tenth of each run, as far as its log has the metric."),
        table(
            "Headline figures",
            ["figure", *(run.name for run in runs)],
            [[name, *cells] for name, cells in rows.items()],
        ),
    ]


def _with_error(run: RunLog) -> str:
    value, error = _last(run, "score_correlation_mean"), _last(run, "score_correlation_error")
    return number(value) if math.isnan(error) else f"{number(value)} ± {number(error)}"


def _last(run: RunLog, key: str) -> float:
    _, values = run.series(key)
    return float(values[-1]) if len(values) else math.nan


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _bad_steps(run: RunLog) -> str:
    found = [line["bad_steps"] for line in run.lines if line.get("bad_steps")]
    counts: dict[str, int] = found[-1] if found else {}
    return ", ".join(f"{cause} {count}" for cause, count in counts.items()) or "0"


def _steps(runs: Sequence[RunLog], pictures: list[Chart]) -> list[str]:
    drawn, missing = [], []
    for key, (title, unit, early) in _OVER_STEPS.items():
        lines = {run.name: run.over_run(key) for run in runs}
        bands = {}
        if key in _ERROR:
            for run in runs:
                x, half = run.over_run(_ERROR[key])
                if x and x == lines[run.name][0]:
                    bands[run.name] = half
        if any(x for x, _ in lines.values()):
            marks = runs[0].marks() if len(runs) == 1 else ()
            at = 0.0 if key in _ERROR else None
            drawn.append(over_steps(key, title, unit, lines, bands, marks, at, early))
        missing += [f"{title.lower()} ({run.name})" for run in runs if not lines[run.name][0]]
    pictures += drawn
    found = [heading(2, "Over the run"), charts(drawn)]
    if any(chart.name in _ERROR for chart in drawn):
        found.append(
            paragraph(
                "The band around the correlation is its standard error. It is out of sample: the "
                "scores were computed before the policy learned from their samples' influence."
            )
        )
    if missing:
        found.append(paragraph(f"Not in the log: {', '.join(missing)}."))
    return found


def _cost(runs: Sequence[RunLog], pictures: list[Chart]) -> list[str]:
    rows = []
    for run in runs:
        _, seconds = run.series("meta_seconds")
        rows.append(
            [
                run.name,
                str(len(seconds)),
                number(float(numpy.median(seconds)) if len(seconds) else None),
                number(float(seconds.sum()) if len(seconds) else None, 1),
                _share(_last(run, "weighting_time_share")),
                _share(_last(run, "dwm_time_share")),
                _share(_last(run, "overhead_budget")),
            ]
        )
    header = ["run", "meta steps", "seconds of one (median)", "seconds of all"]
    header += ["share of all time", "share under a budget", "budget"]
    shares = {run.name: run.over_run("weighting_time_share") for run in runs}
    drawn = []
    if any(x for x, _ in shares.values()):
        drawn = [over_steps("time_share", "Weighting's share of the time", "share", shares)]
    pictures += drawn
    found = [heading(2, "Cost"), table("Time that weighting takes", header, rows)]
    found.append(
        paragraph(
            "A meta step has passes B to E: the weighted step, the meta gradient, each sample's "
            "influence, and the policy's learning. The share is the extra time of meta steps over "
            "plain ones, relative to all time."
        )
    )
    found += _cost_by_pass(runs)
    return found + ([charts(drawn)] if drawn else [])


def _cost_by_pass(runs: Sequence[RunLog]) -> list[str]:
    """Returns a table of median seconds and shares of a meta step, if a log has them."""
    timed = [run for run in runs if len(run.series(PASS_SECONDS["inner"])[0])]
    if not timed:
        return [paragraph("Not in the log: the time of each pass of a meta step.")]
    rows = []
    for key, label in _PASSES.items():
        cells = []
        for run in timed:
            _, seconds = run.series(PASS_SECONDS[key])
            _, whole = run.series("meta_seconds")
            if len(seconds):
                median = float(numpy.median(seconds))
                cells += [number(median), _share(median / max(float(numpy.median(whole)), 1e-9))]
            else:
                cells += ["with the weighted step", ""]
        rows.append([label, *cells])
    header = ["pass"]
    for run in timed:
        header += [f"seconds, {run.name}", f"share, {run.name}"]
    return [table("Time by pass of a meta step (medians)", header, rows)]


# ------------------------------------------------------------------ run by run


def _domains(run: RunLog, stem: str, pictures: list[Chart]) -> list[str]:
    samples = run.samples_by_domain()
    found = [heading(3, run.name)]
    if not samples:
        return [*found, paragraph("The log has no domains.")]
    total = samples.total()
    over_run = run.domains()
    drawn = dict(list(over_run.items())[:_DOMAINS_DRAWN])
    title = f"Mean weight by domain: {run.name}"
    chart = over_steps(f"{stem}_domains", title, "mean weight", drawn, None, run.marks(), 1.0)
    pictures.append(chart)
    found.append(charts([chart]))
    stages = list(run.by_stage)
    shown = stages[:1] + stages[1:][-1:]
    rows = []
    for name, count in samples.most_common(_DOMAINS_LISTED):
        cells = [number(run.by_stage[stage].get(name)) for stage in shown]
        rows.append([name, f"{count / total:.1%}", *cells])
    header = ["domain", "share of samples", *(f"mean weight, {stage}" for stage in shown)]
    found.append(table(f"Domains of {run.name}", header, rows))
    if not stages:
        found.append(paragraph("No step was weighted yet: all of them were warm-up."))
    if len(samples) > _DOMAINS_DRAWN:
        listed = min(len(samples), _DOMAINS_LISTED)
        found.append(
            paragraph(
                f"Of {len(samples)} domains, the {_DOMAINS_DRAWN} with most samples are drawn and "
                f"{listed} are listed."
            )
        )
    return found


def _by_rank(
    run: RunLog, found: WeightByRank, what: str, stem: str, pictures: list[Chart]
) -> list[str]:
    bins = found.bins()
    if not bins:
        return [paragraph(f"By {what}: not in the log. {_NEEDED[what]}")]
    chart = against(
        f"{stem}_{what}",
        f"Weight by {what}: {run.name}",
        f"rank of {what} in its step (0 least)",
        "weight over the step's mean",
        bins,
    )
    pictures.append(chart)
    values = numpy.array(found.correlations)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [
        charts([chart]),
        paragraph(
            f"Mean rank correlation of weight and {what} within a step: "
            f"{number(values.mean())} ± {number(error)}, over {len(values)} steps."
        ),
    ]


def _documents(run: RunLog, found: Documents, stem: str, pictures: list[Chart]) -> list[str]:
    sample = found.sample
    if sample is None:
        return [heading(3, run.name), paragraph(found.why)]
    drawn = []
    for name, label in STATISTICS.items():
        drawn.append(
            against(
                f"{stem}_{re.sub(r'[^a-z]+', '_', name)}",
                f"Weight by {name}: {run.name}",
                label,
                "mean weight",
                binned(sample.statistics[name], sample.weights, _BINS),
                logarithmic=name == "length",
            )
        )
    parts = [
        heading(3, run.name),
        paragraph(
            f"{len(sample.weights)} of the {sample.seen} documents that the run has weighed, drawn "
            "at random. A document's weight is the mean over its tokens that were read, each at "
            "the weight of the sample that it stood in; samples are packed, so neighbours share "
            "it. Points are tenths of the documents, bars the standard deviation within a tenth."
        ),
        table(
            f"Rank correlation with the weight: {run.name}",
            ["figure of the text", "correlation", "standard error", "within data sets"],
            [
                [name, *(number(value) for value in sample.correlations(name))]
                for name in STATISTICS
            ],
        ),
        charts(drawn),
    ]
    pictures += drawn
    if len(sample.periods) > 1:
        ends = [float(last) for _, last in sample.periods]
        lines = {name: (ends, sample.over_periods(name)) for name in STATISTICS}
        kept = {
            name: (ends, values)
            for name, (_, values) in lines.items()
            if numpy.isfinite(values).all()
        }
        title = f"Rank correlation by period: {run.name}"
        chart = over_steps(f"{stem}_periods", title, "correlation with weight", kept, at=0.0)
        rows = []
        for k, (first, last) in enumerate(sample.periods):
            count = int(numpy.isfinite(sample.by_period[k]).sum())
            cells = [number(values[k]) for _, values in lines.values()]
            rows.append([f"{first} to {last}", str(count), *cells])
        header = ["iterations", "documents", *STATISTICS]
        chart = dataclasses.replace(chart, header=header, rows=rows)
        pictures.append(chart)
        parts += [
            heading(4, f"From period to period: {run.name}"),
            paragraph(
                "A period's weights are the difference of the sums saved at its ends. A "
                "correlation is drawn at its period's last step, for the documents read in it."
            ),
            charts([chart]),
        ]
    else:
        parts.append(
            paragraph(
                "All documents were weighed in one period between two saved iterations, so there "
                "is nothing to compare; a shorter --save-interval makes more periods."
            )
        )
    for kind, shown in passages(sample).items():
        parts.append(heading(4, f"{kind.capitalize()}: {run.name}"))
        where = [
            f"weight {number(p.weight)}, {os.path.basename(p.prefix)} document {p.number}, "
            f"{p.length} tokens"
            for p in shown
        ]
        parts.append(quotes([(w, p.text) for w, p in zip(where, shown, strict=True)]))
    return parts
