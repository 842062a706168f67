"""The samples' own influence decides at every step: no model, no memory, and a price.

As in GREATS (NeurIPS 2024) and OPUS (ICML 2026), but with weights instead of a selection: before
the trainer's own step the influence of each of its samples on a meta batch is found, with the
optimizer's preconditioner as it stands. That is a meta pass and a forward and backward pass more
in every step.
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
        """As `WeightPolicy.foresee`."""
        self._weights = self._scores = None
        if influence is None or not self.context.sees_losses:
            return
        self._scores = self.targets(influence)
        mapped = self.map.weights(self._scores).weights
        self._weights = self.context.topology.own_samples(mapped)

    def weights(self, view: SampleView) -> torch.Tensor:
        """As `WeightPolicy.weights`; 1 as long as there is nothing to look ahead from."""
        b = self.context.micro_batch_size
        if self._weights is None:
            return torch.ones(b, device=self.context.device)
        return self._weights[view.index * b : (view.index + 1) * b]

    def end(self, step: StepView) -> list[str]:
        """Takes the step's scores into the map."""
        if self._scores is not None and not self.map.whole_batch:
            topology = self.context.topology
            local = topology.own_samples(self._scores)
            self.map.update(topology.sum_over_samples(self.map.sums(local)))
        return []

    def description(self) -> dict[str, Any]:
        """Its name."""
        return {"form": "influence"}

    def state_dict(self) -> dict[str, Any]:
        """As `WeightPolicy.state_dict`."""
        return {"map": self.map.state_dict(), "targets": self.targets.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `WeightPolicy.load_state_dict`."""
        self.map.load_state_dict(state["map"])
        self.targets.load_state_dict(state["targets"])
