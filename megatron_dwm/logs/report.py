"""Reports which data the weighting model preferred, by stage, from the step log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from megatron_dwm.errors import DWMError

_FIELDS = ("window", "domain_weight", "domain_samples")


def domain_weights_by_stage(log: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns stage name -> domain -> mean weight over the stage's samples.

    Warm-up steps, in which every weight is 1, are left out. A stage's meta window, in which the DWM
    still learns, and its frozen window have separate names: `stage 2 meta`, `stage 2 frozen`. Steps
    without stages, as with uniform weights, are named by their window alone.

    Args:
        log: lines of `dwm_log.jsonl`.

    Raises:
        DWMError: a line is not one of a step log.
    """
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for line in log:
        missing = [name for name in _FIELDS if name not in line]
        if missing:
            raise DWMError(
                f"the line of iteration {line.get('iteration')} has no {', '.join(missing)}; "
                "give the step log of a run with --dwm"
            )
        if line["window"] == "warmup":
            continue
        stage = f"stage {line['stage']} {line['window']}" if "stage" in line else line["window"]
        for domain, weight in line["domain_weight"].items():
            if weight is None:
                continue
            samples = line["domain_samples"][domain]
            sums[stage][domain] += weight * samples
            counts[stage][domain] += samples
    return {
        stage: {domain: total / counts[stage][domain] for domain, total in domains.items()}
        for stage, domains in sums.items()
    }


def format_table(by_stage: dict[str, dict[str, float]]) -> str:
    """Returns a text table: one row per domain, one column per stage and window.

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
