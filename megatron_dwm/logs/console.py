"""The step log on the console: a line per step, and notices when something goes wrong."""

from __future__ import annotations

from heapq import nlargest
from typing import Any

# Maximum number of domains in one line: those with the most samples in the step.
_DOMAINS_IN_LINE = 32


def console_line(line: dict[str, Any]) -> str:
    """Returns one line for the console, in the style of Megatron's own."""
    parts = [
        f" dwm iteration {line['iteration']:8d}",
        f"stage {line['stage']} {line['window']}" if "stage" in line else line["window"],
        f"entropy: {_number(line['entropy'], '.4f')}",
        f"effective sample size: {_number(line['effective_sample_size'], '.3f')}",
        f"max weight: {_number(line['max_weight'], '.3f')}",
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
    weights, samples = line["domain_weight"], line["domain_samples"]
    shown = list(weights)
    if len(weights) > _DOMAINS_IN_LINE:
        shown = nlargest(_DOMAINS_IN_LINE, weights, key=samples.__getitem__)
    parts += [f"{name}: {_number(weights[name], '.3f')}" for name in shown]
    if len(shown) < len(weights):
        parts.append(f"and {len(weights) - len(shown)} more domains")
    return " | ".join(parts) + " |"


class Notices:
    """Reports when a guard acted or a step was bad: the first time, then at each tenfold count.

    Counts of guards are those of this process; those of bad steps are the run's.
    """

    def __init__(self) -> None:
        self.floor = self.cap = 0

    def of(self, line: dict[str, Any]) -> list[str]:
        """Returns the lines to print after a step.

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
            weights = ", and the samples weighed 1" if "scores" in causes else ""
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


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)
