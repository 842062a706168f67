"""Weights from a sample's own loss: no learning, no meta set, next to no cost.

Each is a function of the mean token loss and of its running statistics over past steps (fixed at
the start of a step), so that nothing has to wait for the whole batch:

    linupper    exp(min(u + 1, 1) / r): easy samples count less, all hard ones count the same
    quadratic   exp((1 - u^2) / r): samples of medium loss count most
    extremes    exp(|u| / r): the easiest and the hardest count most
    truncation  exp(-max(z, 0)), z the standardised loss: samples with a loss above the mean count
                less, a soft form of loss truncation (Kang and Hashimoto, ACL 2020)

The first three are the strategies of "Dynamic Loss-Based Sample Reweighting for Improved Large
Language Model Pretraining" (ICLR 2025, arXiv 2502.06733) with its burn-in, in which losses do not
yet tell samples apart. There u is the loss scaled to [-1, 1] between the batch's smallest and
largest, here between the running means of these; r is `--dwm-loss-temperature`.

Shapes: b samples in a micro-batch, n on this rank.
"""

from __future__ import annotations

import abc
from typing import Any

import torch

from megatron_dwm.config.policy_table import Needs
from megatron_dwm.policies.base import PolicyContext, SampleView, StepView, WeightPolicy
from megatron_dwm.policies.features import mean_losses
from megatron_dwm.policies.maps import DECAY
from megatron_dwm.policies.running import share_of_new


class LossPolicy(WeightPolicy):
    """A function of the sample's loss, divided by a running normaliser.

    Args:
        context: what it is built from.
    """

    needs = Needs(losses=True)

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        # mean, mean of squares, smallest, largest, normaliser, age
        self.running = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        self.running = self.running.to(context.device)
        self._losses: dict[int, torch.Tensor] = {}
        self._pending: list[tuple[torch.Tensor, Any]] = []
        self._bad: torch.Tensor | bool = False

    @abc.abstractmethod
    def raw(self, losses: torch.Tensor) -> torch.Tensor:
        """Returns weights before normalisation, `[b]`, of mean token losses `[b]` float64."""

    def begin(self, step: StepView) -> None:
        """Includes the last step's statistics."""
        self._settle()
        self._losses.clear()

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`; 1 until two steps have been seen."""
        losses = mean_losses(view.losses, view.mask, self.context.topology)
        self._losses[view.index] = losses
        weights = self.raw(losses) / self.running[4]
        # The first step finds the range of the losses, the second the mean of the resulting
        # weights.
        usable = torch.isfinite(weights) & (self.running[5] > 1)
        self._bad = ~torch.isfinite(losses).all() | self._bad
        return torch.where(usable, weights, 1.0).float()

    def end(self, step: StepView) -> list[str]:
        """Starts to collect the step's statistics over data-parallel ranks."""
        if not self.context.sees_losses or not self._losses:
            return []
        losses = torch.cat([self._losses[k] for k in sorted(self._losses)])
        finite = torch.isfinite(losses)
        kept = torch.where(finite, losses, 0.0)
        raw = torch.where(finite, self.raw(losses), 0.0)
        sums = torch.stack([finite.double().sum(), kept.sum(), kept.square().sum(), raw.sum()])
        infinite = torch.full_like(losses, -torch.inf)
        either = torch.where(finite, torch.stack([-losses, losses]), infinite)
        extremes = either.amax(1)
        topology = self.context.topology
        self._pending = [
            (sums, topology.start_sum_over_samples(sums)),
            (extremes, topology.start_largest_over_samples(extremes)),
        ]
        return []

    def bad_scores(self) -> torch.Tensor | bool:
        """See `WeightPolicy.bad_scores`."""
        found, self._bad = self._bad, False
        return found

    def description(self) -> dict[str, Any]:
        """The policy's name: one policy cannot load another's state."""
        return {"form": type(self).__name__.lower()}

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        self._settle()
        return {"running": self.running.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        self.running = state["running"].to(self.running.device)

    def _settle(self) -> None:
        if not self._pending:
            return
        for _, handle in self._pending:
            if handle is not None:
                handle.wait()
        (count, first, second, raw), (smallest, largest) = (found for found, _ in self._pending)
        self._pending = []
        seen = torch.stack([first, second, -smallest * count, largest * count, raw]) / count
        mean, age = self.running[:5], self.running[5] + 1
        new = share_of_new(age, DECAY)
        # The normaliser has seen one step less: the first step had no range yet.
        of_raw = share_of_new((age - 1).clamp(min=1), DECAY)
        news = torch.cat([new.expand(4), torch.where(age > 1, of_raw, 0.0).view(1)])
        updated = torch.cat([mean + news * (seen - mean), age.view(1)])
        self.running = torch.where(torch.isfinite(updated).all(), updated, self.running)


class LossShape(LossPolicy):
    """The exponential of a shape function of the scaled loss."""

    needs = Needs(losses=True, loss_shape=True)

    @abc.abstractmethod
    def shape(self, u: torch.Tensor) -> torch.Tensor:
        """Returns `[b]` in [0, 1] for losses `[b]` scaled to [-1, 1]."""

    def raw(self, losses: torch.Tensor) -> torch.Tensor:
        """See `LossPolicy.raw`."""
        smallest, largest = self.running[2], self.running[3]
        u = 2 * (losses - smallest) / (largest - smallest).clamp(min=1e-12) - 1
        # At most 1, whatever the temperature: the normaliser removes the factor.
        return torch.exp((self.shape(u.clamp(-1, 1)) - 1) / self.context.config.loss_temperature)


class LinUpper(LossShape):
    """Rises linearly up to the middle of the loss range."""

    def shape(self, u: torch.Tensor) -> torch.Tensor:
        """See `LossShape.shape`."""
        return (u + 1).clamp(max=1)


class Quadratic(LossShape):
    """Highest in the middle of the loss range."""

    def shape(self, u: torch.Tensor) -> torch.Tensor:
        """See `LossShape.shape`."""
        return 1 - u.square()


class Extremes(LossShape):
    """Highest at the smallest and the largest losses."""

    def shape(self, u: torch.Tensor) -> torch.Tensor:
        """See `LossShape.shape`."""
        return u.abs()


class Truncation(LossPolicy):
    """Weights that fall off for losses above the mean."""

    def raw(self, losses: torch.Tensor) -> torch.Tensor:
        """See `LossPolicy.raw`."""
        mean, square = self.running[0], self.running[1]
        z = (losses - mean) / (square - mean.square()).clamp(min=1e-12).sqrt()
        return torch.exp(-z.clamp(min=0))
