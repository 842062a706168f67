"""The one table of the step log's metric names in TensorBoard and Weights & Biases."""

from __future__ import annotations

from typing import Any

# Field of the step log -> name under dwm/.
NAMES = {
    "lm_loss": "loss/lm",
    "meta_loss": "loss/meta",
    "entropy": "weights/entropy",
    "effective_sample_size": "weights/effective_sample_size",
    "max_weight": "weights/max",
    "min_weight": "weights/min",
    "guard_temperature": "weights/guard_temperature",
    "guard_capped": "weights/guard_capped",
    "score_correlation": "evidence/score_correlation",
    "score_correlation_mean": "evidence/score_correlation_mean",
    "score_correlation_error": "evidence/score_correlation_error",
    "teacher_correlation_mean": "evidence/teacher_correlation_mean",
    "gate": "evidence/gate",
    "steadiness": "evidence/steadiness",
    "meta_gradient_norm": "evidence/meta_gradient_norm",
    "dwm_grad_norm": "learning/grad_norm",
    "dwm_updated": "learning/updated",
    "meta_seconds": "time/meta_seconds",
    "seconds_meta_gradient": "time/meta_gradient",
    "seconds_inner": "time/inner_step",
    "seconds_influence": "time/influence",
    "seconds_learn": "time/learning",
    "weighting_time_share": "time/weighting_share",
    "dwm_time_share": "time/budget_spent",
    "overhead_budget": "time/budget",
    "meta_put_off": "time/meta_put_off",
}
# Metrics of an estimator or a verification, by the prefix of their names.
_GROUPS = {"fd_": "evidence/", "verify_": "evidence/"}
# Not metrics.
_OTHERS = ("iteration", "stage")
DOMAIN_WEIGHT = "dwm/domain_weight/"
NOTICES = "dwm/notices"
# TensorBoard's tab "Custom Scalars": chart -> its type, and metrics by regular expressions.
LAYOUT = {
    "Data weighting": {
        "loss and meta loss": ["Multiline", ["dwm/loss/lm", "dwm/loss/meta"]],
        "is it right: score against influence, out of sample, and the gate": [
            "Multiline",
            ["dwm/evidence/score_correlation_mean", "dwm/evidence/gate", "dwm/evidence/steadiness"],
        ],
        "mean weight by domain": ["Multiline", [f"{DOMAIN_WEIGHT}.*"]],
        "how unlike the weights are": [
            "Multiline",
            ["dwm/weights/effective_sample_size", "dwm/weights/max", "dwm/weights/min"],
        ],
        "seconds of a meta step, by pass": [
            "Multiline",
            ["dwm/time/meta_gradient", "dwm/time/inner_step", "dwm/time/influence"],
        ],
        "experts: the busiest one's tokens over the mean, by domain": [
            "Multiline",
            ["dwm/expert_imbalance/.*"],
        ],
        "share of the time": ["Multiline", ["dwm/time/weighting_share", "dwm/time/budget_spent"]],
    }
}


def scalars_of(line: dict[str, Any]) -> dict[str, float]:
    """Returns a line's numeric metrics under the names of the table.

    Metrics of a policy that are not in the table go under `dwm/policy/`, counts of bad steps under
    `dwm/bad_steps/CAUSE`, the load of experts under `dwm/expert_imbalance/DOMAIN` and
    `dwm/expert_distance/DOMAIN`. Weights by domain are left to `DomainMeans`.

    Args:
        line: a line of the step log.
    """
    found = {
        f"dwm/{_name(key)}": value
        for key, value in line.items()
        if key not in _OTHERS and isinstance(value, int | float)
    }
    for cause, count in line.get("bad_steps", {}).items():
        found[f"dwm/bad_steps/{cause}"] = count
    for domain, figures in line.get("expert_load", {}).items():
        found |= {f"dwm/expert_{name}/{domain}": value for name, value in figures.items()}
    return found


def _name(key: str) -> str:
    if key in NAMES:
        return NAMES[key]
    group = next((g for start, g in _GROUPS.items() if key.startswith(start)), "policy/")
    return group + key
