"""Domain weights during training: influence averaged over each domain's samples.

DoReMi (NeurIPS 2023), ADO (ICLR 2025) and R&B (2025) mix domains by their effect on the loss during
training; this policy uses the influence that the head learns from. A domain's score is the mean
usefulness of its samples, with the head's forgetting and shrunk towards 0 if few were seen. All
samples of a domain have the same weight, through the same map and gate as the head's.

    m_d = sum_i z_i / (n_d + P)      z_i: see `learned.Targets`; both sums with forgetting
    s_d = m_d / sqrt(sum_d p_d m_d^2)    p_d: the domain's share of the samples

Shapes: N samples in the global batch, K domains that have been seen.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.config.policy_table import Needs
from megatron_dwm.policies.base import Lesson, PolicyContext, SampleView, StepView
from megatron_dwm.policies.learned import LearnedPolicy
from megatron_dwm.policies.running import StepSums

PRIOR = 16.0  # samples of usefulness 0 that every domain starts with


class Domains(LearnedPolicy):
    """A score for each domain, by the influence of its samples.

    Args:
        context: what it is built from.
    """

    needs = Needs(domains=True, influence=True, map=True)

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context, standard=True)
        # Sum of usefulness and number of samples, by domain; the last entry is for unknown domains.
        self.sums = torch.zeros(1, 2, dtype=torch.float64, device=context.device)
        self._pending = StepSums(context.topology)
        self._domains: dict[int, torch.Tensor] = {}

    def begin(self, step: StepView) -> None:
        """Includes the last step's sums in the map."""
        self._settle()
        self._scores.clear()
        self._domains.clear()
        self.batch = None

    def scores(self) -> torch.Tensor:
        """Returns `[K + 1]` float64 scores of the domains, mean 0 and variance 1 over samples."""
        total, count = self.sums.unbind(1)
        mean = total / (count + PRIOR)
        share = count / count.sum().clamp(min=1)
        mean = mean - (share * mean).sum()
        return mean * (share * mean.square()).sum().clamp(min=1e-12).rsqrt()

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`; a domain that no meta step has seen has score 0."""
        if view.domains is None:
            domains = torch.full((view.losses.size(0),), -1, device=self.sums.device)
        else:
            domains = view.domains
        self._domains[view.index] = domains
        known = domains < len(self.sums) - 1
        scores = torch.where(known, self.scores()[domains.clamp(max=len(self.sums) - 2)], 0.0)
        self.keep_scores(view, scores)
        return self.mapped(scores)

    def learn(self, step: StepView, influence: torch.Tensor, scores: torch.Tensor | None) -> Lesson:
        """Adds the step's usefulness to its domains, on ranks that see losses."""
        if not self.context.sees_losses or scores is None:
            return Lesson(True)
        targets = self.targets(influence)
        local = torch.cat([self._domains[k] for k in sorted(self._domains)])
        domains = self.context.topology.gather_samples(local)
        more = int(domains.max()) + 2 - len(self.sums)
        if more > 0:
            new = self.sums.new_zeros(more, 2)
            self.sums = torch.cat([self.sums[:-1], new, self.sums[-1:]])
        seen = torch.stack([targets, torch.ones_like(targets)], 1).to(self.sums.device)
        place = torch.where(domains < 0, len(self.sums) - 1, domains)
        self.sums = (self.context.config.forgetting * self.sums).index_add_(0, place, seen)
        self.context.topology.make_equal(self.sums)
        return Lesson(True)

    def end(self, step: StepView) -> list[str]:
        """Starts to sum what the map needs from this step."""
        scores = self.local_scores()
        if self.context.sees_losses and scores is not None:
            self._pending.start(self.map.sums(scores))
        return []

    def description(self) -> dict[str, Any]:
        """The policy's name."""
        return {"form": "domains"}

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        self._settle()
        return {**super().state_dict(), "sums": self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        super().load_state_dict(state)
        self.sums = state["sums"].to(self.sums.device)

    def _settle(self) -> None:
        sums = self._pending.take()
        if sums is not None:
            self.map.update(sums)
