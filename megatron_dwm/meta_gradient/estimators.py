"""Chooses a run's estimator of the per-sample meta-gradient, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_dwm.config import DWMConfig
from megatron_dwm.core.further_losses import has_further_losses
from megatron_dwm.errors import DWMError
from megatron_dwm.meta_gradient.ghost.recording import refusal, uncovered_parameters


def choose_estimator(
    config: DWMConfig, model: list[Any], llm_config: Any = None
) -> tuple[str, str]:
    """Resolves `--dwm-estimator`; every rank of the run must call it.

    Args:
        config: settings.
        model: the LLM's DDP-wrapped chunks.
        llm_config: its `TransformerConfig`; None: nothing in it rules out the hooks.

    Returns:
        `ghost` or `finite_difference`, and the reason in words.

    Raises:
        DWMError: `ghost` was requested, by name or through the lookahead, but a parameter on some
            rank is not covered; the parameter is named.
    """
    found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    if config.estimator != "finite_difference":
        # Pipeline stages hold different layers, and all must use one estimator.
        torch.distributed.all_gather_object(found, uncovered_parameters(model))
    return decide(config, [name for part in found for name in part], llm_config)


def decide(config: DWMConfig, uncovered: list[str], llm_config: Any = None) -> tuple[str, str]:
    """Like `choose_estimator`, given what the ghost estimator does not cover.

    Args:
        config: settings.
        uncovered: uncovered parameters of all ranks, each with the reason.
        llm_config: object with the flags that rule out the hooks.
    """
    if config.estimator == "finite_difference":
        return "finite_difference", "requested by --dwm-estimator"
    against = [f"{flag} ({why})" for flag, why in _unusable(llm_config, config.lookahead)]
    uncovered = [*uncovered, *against]
    if not uncovered:
        why = "requested by --dwm-estimator" if config.estimator == "ghost" else "auto"
        return "ghost", f"{why}; it covers every trained parameter"
    if config.estimator == "ghost":
        raise DWMError(refusal(uncovered))
    if config.lookahead == "current":
        raise DWMError(
            f"--dwm-lookahead current needs the ghost estimator, but {uncovered[0]} is "
            "not covered by it; use --dwm-lookahead next"
        )
    return "finite_difference", f"auto; ghost does not cover {uncovered[0]}"


def check_ahead(config: DWMConfig, estimator: str, reason: str) -> None:
    """Refuses a policy that needs influence ahead of the step, if hooks cannot provide it.

    Args:
        config: settings.
        estimator: what `choose_estimator` returned.
        reason: its reason.

    Raises:
        DWMError: names the policy.
    """
    if config.needs.influence_ahead and estimator != "ghost":
        raise DWMError(f"--dwm-policy {config.policy} needs the ghost estimator ({reason})")


def choose_lookahead(config: DWMConfig, estimator: str, llm_config: Any = None) -> str:
    """Resolves `--dwm-lookahead auto`: `current` if hooks cover the model, else `next`.

    Args:
        config: settings.
        estimator: what `choose_estimator` returned.
        llm_config: the LLM's `TransformerConfig`; None: nothing in it rules out the hooks.

    Raises:
        DWMError: the requested lookahead would include losses that should be left out.
    """
    # In the training pass they are backpropagated with the rest.
    mixed = config.mtp == "plain" and has_further_losses(llm_config)
    if config.lookahead == "current" and mixed:
        raise DWMError(
            "--dwm-lookahead current gets the influence from the training pass, which includes the "
            "losses of multi-token prediction that --dwm-mtp plain leaves out; use --dwm-lookahead "
            "next, or --dwm-mtp weighted"
        )
    if config.lookahead != "auto":
        return str(config.lookahead)
    return "current" if estimator == "ghost" and not mixed else "next"


def _unusable(config: Any, lookahead: str | None) -> Iterator[tuple[str, str]]:
    """Yields flags of the run under which the hooks would not work, and why."""
    if getattr(config, "fine_grained_activation_offloading", False):
        yield "--fine-grained-activation-offloading", "the layers' inputs are freed under the hooks"
    if getattr(config, "defer_embedding_wgrad_compute", False) and lookahead == "next":
        yield "--defer-embedding-wgrad-compute", "the output layer needs its weight gradient"
    if has_further_losses(config) and getattr(config, "mtp_use_repeated_layer", False):
        yield "--mtp-use-repeated-layer", "one layer runs several times in a pass"
