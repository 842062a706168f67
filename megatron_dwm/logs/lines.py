"""Turns a training step into a line of the step log."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from megatron_dwm.core.expert_load import load_by_domain
from megatron_dwm.logs.log_file import PASS_SECONDS
from megatron_dwm.meta_gradient import finite_difference
from megatron_dwm.policies.softmax import weight_statistics

if TYPE_CHECKING:
    from megatron_dwm.step.record import StepRecord


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
        **_place(record),
        "lm_loss": None if record.lm_loss is None else _finite(float(record.lm_loss)),
        **{name: _finite(round(value, 6)) for name, value in weight_statistics(weights).items()},
        **_by_domain(weights, record.domains, domains),
    }
    if record.meta is not None:
        line.update(
            meta_loss=_finite(record.meta.loss),
            meta_gradient_norm=_finite(torch.linalg.vector_norm(record.meta.influence).item()),
            dwm_grad_norm=_finite(record.meta.grad_norm),
            dwm_updated=int(record.meta.updated),
            meta_seconds=round(record.meta.seconds, 4),
        )
        by_pass = record.meta.seconds_by_pass
        line.update({PASS_SECONDS[name]: round(s, 4) for name, s in by_pass.items()})
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
    if record.expert_load is not None:
        line["expert_load"] = load_by_domain(record.expert_load, domains)
    if record.time_share is not None:
        line["weighting_time_share"] = round(record.time_share, 6)
    notices = _notices(record)
    if notices:
        line["notices"] = notices
    if samples:
        line["weights"] = [_finite(round(w, 6)) for w in weights.tolist()]
        if record.scores is not None:
            line["scores"] = [_finite(score) for score in record.scores.tolist()]
        if record.losses is not None:
            line["losses"] = [_finite(loss) for loss in record.losses.tolist()]
        if record.domains is not None:
            line["domains"] = record.domains.tolist()
        if record.meta is not None:
            line["influence"] = [_finite(c) for c in record.meta.influence.tolist()]
    return line


def _place(record: StepRecord) -> dict[str, Any]:
    """Returns where the step was in the schedule; the stage only if there are stages."""
    stage = {"stage": record.plan.stage + 1} if record.plan.staged else {}
    return {**stage, "window": record.plan.window}


def _by_domain(
    weights: torch.Tensor, ids: torch.Tensor | None, names: list[str]
) -> dict[str, dict[str, Any]]:
    """Returns mean weight and number of samples of each domain that occurs in the step.

    Args:
        weights: `[N]`.
        ids: `[N]` domain of each sample, -1 unknown.
        names: names of the domains.
    """
    if ids is None:
        return {"domain_weight": {}, "domain_samples": {}}
    ids = ids.cpu()
    if len(names) == 1 and bool((ids < 0).all()):
        ids = torch.zeros_like(ids)  # a single data set is not numbered by the loader
    known = ids >= 0
    found, place = torch.unique(ids[known], return_inverse=True)
    counts = torch.bincount(place, minlength=found.numel())
    sums = torch.zeros(found.numel(), dtype=torch.float64)
    means = sums.index_add_(0, place, weights[known].double()) / counts
    keys = [names[i] if i < len(names) else str(i) for i in found.tolist()]
    values = [_finite(mean) for mean in means.round(decimals=6).tolist()]
    return {
        "domain_weight": dict(zip(keys, values, strict=True)),
        "domain_samples": dict(zip(keys, counts.tolist(), strict=True)),
    }


def _notices(record: StepRecord) -> list[str]:
    """Returns messages for the user about the step."""
    warning = finite_difference.warning(record.meta.quality) if record.meta else None
    budget = record.overhead.notice if record.overhead is not None else None
    return [text for text in (warning, *record.notices, budget) if text is not None]


def _guards(record: StepRecord) -> dict[str, Any]:
    """Returns what the guards of the weights did, if they acted."""
    batch, found = record.batch, {}
    if batch is None or "scores" in record.causes:
        return {}
    if batch.raised is not None and math.isfinite(batch.raised.item()):
        found["guard_temperature"] = batch.raised.item()
    if batch.capped is not None and batch.capped.item():
        found["guard_capped"] = int(batch.capped.item())
    return found


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
