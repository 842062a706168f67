"""Weights by the samples' own influence at every step: no model and no memory, but costly.

As in GREATS (NeurIPS 2024) and OPUS (ICML 2026), but with weights instead of a selection: before
the trainer's own step the influence of each of its samples on a meta batch is computed, with the
optimizer's current preconditioner. This adds a meta pass and a forward and backward pass to every
step.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.config.policy_table import Needs
from megatron_dwm.policies.base import PolicyContext, SampleView, StepView, WeightPolicy
from megatron_dwm.policies.learned import Targets
from megatron_dwm.policies.maps import build_map


class Influence(WeightPolicy):
    """Weights by the map of the standardised influence.

    Args:
        context: what it is built from.
    """

    needs = Needs(influence_ahead=True, map=True, whole_batch=True)

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.map = build_map(context.config, True, context.device)
        self.targets = Targets()
        self._weights: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None

    def foresee(self, step: StepView, influence: torch.Tensor | None) -> None:
        """See `WeightPolicy.foresee`."""
        self._weights = self._scores = None
        if influence is None or not self.context.sees_losses:
            return
        self._scores = self.targets(influence)
        mapped = self.map.weights(self._scores).weights
        self._weights = self.context.topology.own_samples(mapped)

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`; 1 until the optimizer has a state to look ahead from."""
        b = self.context.micro_batch_size
        if self._weights is None:
            return torch.ones(b, device=self.context.device)
        return self._weights[view.index * b : (view.index + 1) * b]

    def end(self, step: StepView) -> list[str]:
        """Includes the step's scores in the map."""
        if self._scores is not None and not self.map.whole_batch:
            topology = self.context.topology
            local = topology.own_samples(self._scores)
            self.map.update(topology.sum_over_samples(self.map.sums(local)))
        return []

    def description(self) -> dict[str, Any]:
        """The policy's name."""
        return {"form": "influence"}

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        return {"map": self.map.state_dict(), "targets": self.targets.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        self.map.load_state_dict(state["map"])
        self.targets.load_state_dict(state["targets"])
