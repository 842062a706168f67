"""Which data the weighting model preferred, by stage: read from the step log."""

from __future__ import annotations

from collections import defaultdict
from typing import Any


def domain_weights_by_stage(log: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns stage name -> domain -> mean weight over the stage's samples.

    Warm-up steps, in which every weight is 1, are left out. A stage's meta window, in which the
    DWM still learns, and its frozen window are named apart: `stage 2 meta`, `stage 2 frozen`.

    Args:
        log: lines of `dwm_log.jsonl`.
    """
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for line in log:
        if line["window"] == "warmup":
            continue
        stage = f"stage {line['stage']} {line['window']}"
        for domain, weight in line["domain_weight"].items():
            samples = line["domain_samples"][domain]
            sums[stage][domain] += weight * samples
            counts[stage][domain] += samples
    return {
        stage: {domain: total / counts[stage][domain] for domain, total in domains.items()}
        for stage, domains in sums.items()
    }


def format_table(by_stage: dict[str, dict[str, float]]) -> str:
    """Returns a text table: a row a domain, a column a stage and window.

    Args:
        by_stage: what `domain_weights_by_stage` returns.
    """
    stages = list(by_stage)
    domains = sorted({domain for weights in by_stage.values() for domain in weights})
    width = max([len("mean weight"), *(len(domain) for domain in domains)])
    header = "mean weight".ljust(width) + "".join(f"  {stage:>14}" for stage in stages)
    rows = [header]
    for domain in domains:
        cells = [by_stage[stage].get(domain) for stage in stages]
        texts = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
        rows.append(domain.ljust(width) + "".join(f"  {text:>14}" for text in texts))
    return "\n".join(rows)


def mean_over_last_stage(log: list[dict[str, Any]]) -> dict[str, float]:
    """Returns each domain's mean weight in the last stage and window of the log."""
    by_stage = domain_weights_by_stage(log)
    return by_stage[list(by_stage)[-1]] if by_stage else {}
