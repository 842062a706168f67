"""The values that a step passes to the log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_dwm.policies.maps import Mapped
from megatron_dwm.step.budget import Overhead
from megatron_dwm.step.plan import StepPlan


@dataclass
class MetaResult:
    """The results of a meta step.

    Attributes:
        loss: the meta loss per token.
        influence: `[N]`, in units of the LLM's learning rate.
        grad_norm: gradient norm of a weighting model that learns by gradient, before clipping; else
            NaN.
        updated: whether the policy learned from it.
        seconds: time of the step beyond scoring: passes B to E.
        seconds_by_pass: the same by pass, see `InfluencePasses.step`; `learn` is E.
        quality: the estimator's own quality measures.
    """

    loss: float
    influence: torch.Tensor
    grad_norm: float
    updated: bool
    seconds: float
    quality: dict[str, float] = field(default_factory=dict)
    seconds_by_pass: dict[str, float] = field(default_factory=dict)


@dataclass
class StepRecord:
    """The values that a step passes to the log. Tensors are read only when the log is written.

    Attributes:
        iteration: 1-based, as the trainer prints it.
        plan: what the step did.
        weights: `[N]` on last-stage ranks, None on ranks that see no losses.
        domains: `[N]` data set of the blend of each sample, on last-stage ranks; -1 unknown.
        meta: the meta step's results, if one was taken.
        lm_loss: what the trainer reports.
        overhead: the DWM's share of the time, if it has a budget.
        batch: what the guards of the weights did, on last-stage ranks, if samples were scored.
        causes: what was NaN or infinite, see `bad_steps`; the same on every rank.
        bad_steps: the run's bad steps by cause, including this one.
        figures: the policy's own values for the step.
        notices: lines for the user.
        scores: `[N]` scores behind the weights, if samples are logged and there are any.
        losses: `[N]` mean token losses, if samples are logged and the policy asks for losses.
        expert_load: `[L, K, E]` tokens by MoE layer, domain and expert, see `ExpertLoad`.
        time_share: estimate of the weighting's share of the time, at meta steps, see `TimeShare`.
    """

    iteration: int
    plan: StepPlan
    weights: torch.Tensor | None
    domains: torch.Tensor | None
    meta: MetaResult | None
    lm_loss: float | torch.Tensor | None
    overhead: Overhead | None = None
    batch: Mapped | None = None
    causes: list[str] = field(default_factory=list)
    bad_steps: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    time_share: float | None = None
    scores: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None
