"""Which estimator of the per-sample meta-gradient a run uses, and why."""

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
        llm_config: its `TransformerConfig`; None: nothing in it stands against the hooks.

    Returns:
        `ghost` or `finite_difference`, and the reason in words.

    Raises:
        DWMError: `ghost` was asked for, by name or through the lookahead, and a parameter on some
            rank is not covered; the parameter is named.
    """
    found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    if config.estimator != "finite_difference":
        # Pipeline stages hold different layers, and all must use one estimator.
        torch.distributed.all_gather_object(found, uncovered_parameters(model))
    return decide(config, [name for part in found for name in part], llm_config)


def decide(config: DWMConfig, uncovered: list[str], llm_config: Any = None) -> tuple[str, str]:
    """As `choose_estimator`, once it is known what the ghost estimator does not cover.

    Args:
        config: settings.
        uncovered: parameters of any rank, each with the reason.
        llm_config: what has the flags that stand against the hooks.
    """
    if config.estimator == "finite_difference":
        return "finite_difference", "asked for by --dwm-estimator"
    against = [f"{flag} ({why})" for flag, why in _unusable(llm_config, config.lookahead)]
    uncovered = [*uncovered, *against]
    if not uncovered:
        why = "asked for by --dwm-estimator" if config.estimator == "ghost" else "auto"
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
    """Refuses a policy that wants influence ahead of the step, where hooks cannot find it.

    Args:
        config: settings.
        estimator: what `choose_estimator` returned.
        reason: as well.

    Raises:
        DWMError: it names the policy.
    """
    if config.needs.influence_ahead and estimator != "ghost":
        raise DWMError(f"--dwm-policy {config.policy} needs the ghost estimator ({reason})")


def choose_lookahead(config: DWMConfig, estimator: str, llm_config: Any = None) -> str:
    """Resolves `--dwm-lookahead auto`: in passing where hooks can, else after the LLM's step.

    Args:
        config: settings.
        estimator: what `choose_estimator` returned.
        llm_config: the LLM's `TransformerConfig`; None: nothing in it stands against the hooks.

    Raises:
        DWMError: what is asked for would count losses in that are to be left out.
    """
    # In the training pass they are backpropagated with the rest.
    mixed = config.mtp == "plain" and has_further_losses(llm_config)
    if config.lookahead == "current" and mixed:
        raise DWMError(
            "--dwm-lookahead current reads the influence off the training pass, which --dwm-mtp "
            "plain wants without the losses of multi-token prediction; use --dwm-lookahead next, "
            "or --dwm-mtp weighted"
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
