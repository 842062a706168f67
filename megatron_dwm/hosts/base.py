"""The interface between a trainer and the weighting: what a trainer provides.

A host says what it trains, and builds what depends on its own settings; `assemble` makes the
modified step from this. From then on the host passes every step to `DWMTrainStep`, with a function
that takes its own step, and saves the step's state with its checkpoints (`checkpoint.state`).

There are three hosts: Megatron-LM's trainer (`megatron_lm`), whose functions are rebound; a user's
own loop over Megatron-Core (`own_loop`), which calls the weighting itself; and Megatron-Bridge's
trainer (`megatron_bridge`), which calls it back, and is rebound for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from megatron_dwm.config import DWMConfig
from megatron_dwm.core.agreement import on_each_rank
from megatron_dwm.core.expert_load import ExpertLoad
from megatron_dwm.core.random_states import seeded
from megatron_dwm.core.state_tap import StateTap
from megatron_dwm.core.topology import Megatron
from megatron_dwm.core.trainee import RunShape
from megatron_dwm.data.meta_dataset import MetaData
from megatron_dwm.meta_gradient.estimators import (
    check_ahead,
    choose_estimator,
    choose_lookahead,
)
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import check_supported
from megatron_dwm.policies.base import PolicyContext
from megatron_dwm.policies.combined import build_policy
from megatron_dwm.step.loss import WeightedForwardStep
from megatron_dwm.step.passes import Passes
from megatron_dwm.step.plan import Schedule
from megatron_dwm.step.train_step import DWMTrainStep
from megatron_dwm.weighting_model.scorer import Scorer


class TrainerHost(Protocol):
    """A trainer whose steps are weighted.

    Attributes:
        model: the language model's DDP-wrapped chunks on this rank.
        optimizer: its Megatron-Core optimizer.
        transformer_config: its `TransformerConfig`.
        groups: its `ProcessGroupCollection`.
        shape: sizes of a step.
        steps: number of steps of the whole run, which the schedule divides into stages.
    """

    model: list[Any]
    optimizer: Any
    transformer_config: Any
    groups: Any
    shape: RunShape
    steps: int

    def meta_data(self, config: DWMConfig) -> MetaData:
        """Returns the meta set; called on every rank, if a policy uses one."""
        ...

    def scorer(self, config: DWMConfig) -> tuple[Scorer, dict[str, Any]]:
        """Returns a separate weighting model, and what must agree with that of a checkpoint.

        Called if the policy has one (`--dwm-form model`), with all random states seeded.

        Raises:
            DWMError: this host has none.
        """
        ...

    def warm_start(self, scorer: Scorer, config: DWMConfig) -> Callable[[], None] | None:
        """Returns a function that copies LLM layers into the separate model, or None."""
        ...

    def check(self, config: DWMConfig) -> None:
        """Refuses settings that this host does not support.

        Raises:
            DWMError: names the setting and what to do.
        """
        ...

    def say(self, text: str) -> None:
        """Prints a line once for all ranks."""
        ...


def assemble(config: DWMConfig, host: TrainerHost) -> DWMTrainStep:
    """Builds everything that the modified step needs, leaving all random states as they were.

    Args:
        config: resolved settings.
        host: the trainer.

    Raises:
        DWMError: settings, model or optimizer that cannot be weighted.
    """
    meta_data = None
    host.check(config)
    if config.uses_meta_set:
        check_supported(host.optimizer, config.jacobian)
        estimator, reason = choose_estimator(config, host.model, host.transformer_config)
        host.say(f"DWM: estimator {estimator}: {reason}")
        lookahead = choose_lookahead(config, estimator, host.transformer_config)
        config = dataclasses.replace(config, estimator=estimator, lookahead=lookahead)
        check_ahead(config, estimator, reason)
        with seeded(config.seed):
            meta_data = host.meta_data(config)
    context = PolicyContext(
        config=config,
        topology=Megatron(host.groups),
        device=host.shape.device,
        micro_batch_size=host.shape.micro_batch_size,
        hidden_size=host.transformer_config.hidden_size,
        sequence_parallel=host.transformer_config.sequence_parallel,
        scorer=partial(_scorer, host, config),
        steps=host.steps,
    )
    with seeded(config.seed):
        policy = build_policy(config.policies, context)
    taps = policy.needs.states and context.sees_losses
    # Only the last pipeline stage should have an output layer, so only it can find one missing.
    tap = on_each_rank(lambda: StateTap(host.model[-1]) if taps else None)
    wanted = config.log_expert_load if context.sees_losses else 0
    load = on_each_rank(lambda: ExpertLoad(host.model[-1], wanted) if wanted else None)
    warm_start = None if policy.scorer is None else host.warm_start(policy.scorer, config)
    forward_step = WeightedForwardStep(_not_set)
    forward_step.weighs_further = config.mtp == "weighted"
    return DWMTrainStep(
        config=config,
        schedule=Schedule(config, host.steps),
        passes=Passes(forward_step, host.groups, host.shape, meta_data),
        policy=policy,
        tap=tap,
        warm_start=warm_start,
        expert_load=load,
    )


def _scorer(host: TrainerHost, config: DWMConfig) -> tuple[Scorer, dict[str, Any]]:
    with seeded(config.seed + 100 * host.groups.pp.rank()):
        return host.scorer(config)


def _not_set(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the trainer's forward step is set before the first step")
