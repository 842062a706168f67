"""Weights from what is known about a sample's documents before training.

A weight file beside the data set (`megatron-dwm weights make`) has a number for each document: a
quality score, a perplexity, the importance for a target (DSIR), the loss of a reference model. A
sample's number is the mean, over its tokens, of their documents' numbers.

    static      w = number / running mean
    curriculum  w = 1 / c for the easiest share c of the samples, else 0 (where the share ends,
                samples with equal numbers all count in part); c grows from `--dwm-curriculum-start`
                to 1 over `--dwm-curriculum-share` of the training, by the pacing functions of
                Bengio et al. (ICML 2009) and Platanios et al. (NAACL 2019):
                    linear  c = c0 + (1 - c0) t      t from 0 to 1
                    root    c = sqrt(c0^2 + (1 - c0^2) t)
                    step    like linear, in five steps
    rho         the map of the loss relative to that of a reference model: what is learnable but not
                yet learned counts most. As in RHO-LOSS (ICML 2022, arXiv 2206.07137), but with
                weights instead of a selection

A curriculum of weights also reads samples that do not count yet; drawing by weight files that
change from stage to stage (`--dwm-sampling weights`) reads none in vain.

Shapes: b samples in a micro-batch, n on this rank.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch

from megatron_dwm.config.policy_table import Needs
from megatron_dwm.policies.base import PolicyContext, SampleView, StepView, WeightPolicy
from megatron_dwm.policies.features import mean_losses
from megatron_dwm.policies.maps import DECAY, build_map, newest
from megatron_dwm.policies.running import StepSums, share_of_new

_BINS = 256
_STEPS = 5  # number of steps of the pacing `step`


class _Running(WeightPolicy):
    """A policy with running statistics of past steps, the same on every data-parallel rank.

    Args:
        context: what it is built from.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._sums = StepSums(context.topology)
        self._numbers: dict[int, torch.Tensor] = {}

    def begin(self, step: StepView) -> None:
        """Includes the last step's statistics."""
        self._settle()
        self._numbers.clear()

    def end(self, step: StepView) -> list[str]:
        """Starts to collect the step's statistics over data-parallel ranks."""
        if self.context.sees_losses and self._numbers:
            numbers = torch.cat([self._numbers[k] for k in sorted(self._numbers)])
            self._sums.start(self.sums(numbers))
        return []

    @abc.abstractmethod
    def sums(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns this rank's part of the sums over the numbers `[n]` float64."""

    @abc.abstractmethod
    def update(self, sums: torch.Tensor) -> None:
        """Includes the sums over all samples."""

    def description(self) -> dict[str, Any]:
        """The policy's name: one policy cannot load another's state."""
        return {"form": type(self).__name__.lower()}

    def _settle(self) -> None:
        sums = self._sums.take()
        if sums is not None:
            self.update(sums)


class Static(_Running):
    """The sample's number divided by the running mean of the numbers."""

    needs = Needs(documents=("static_weights",))

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        # mean, age
        self.running = torch.tensor([1.0, 0.0], dtype=torch.float64, device=context.device)

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`; 1 in the first step, when the mean is not known."""
        numbers = self._numbers[view.index] = view.documents["static_weights"].double()
        mean, age = self.running
        return torch.where(age > 0, numbers / mean.clamp(min=1e-30), 1.0).float()

    def sums(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `_Running.sums`: count and sum."""
        return torch.stack([torch.ones_like(numbers).sum(), numbers.sum()])

    def update(self, sums: torch.Tensor) -> None:
        """See `_Running.update`; if all samples have the number 0, the mean is unchanged."""
        mean, age = self.running[0], self.running[1] + 1
        seen = mean + share_of_new(age, DECAY) * (sums[1] / sums[0] - mean)
        self.running = torch.stack([torch.where(seen > 0, seen, mean), age])

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        self._settle()
        return {"running": self.running.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        self.running = state["running"].to(self.running.device)


class Curriculum(_Running):
    """The easiest share of the samples, which grows with the training.

    A sample's number is in [0, 1]: the mean rank of its documents among all of the training data. A
    running histogram of the samples' numbers tells which of them are in the lowest share.
    """

    needs = Needs(documents=("curriculum_by",))

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        # The histogram, with its age as the last entry.
        self.running = torch.zeros(_BINS + 1, dtype=torch.float64, device=context.device)
        self._share = 1.0
        # The bin in which the share ends, and how much samples in it count.
        self._edge = torch.zeros((), dtype=torch.int64, device=context.device)
        self._part = torch.ones((), dtype=torch.float64, device=context.device)

    def begin(self, step: StepView) -> None:
        """Finds the bin up to which samples count."""
        super().begin(step)
        self._share = self.share(step.iteration)
        histogram = self.running[:-1]
        below = torch.cumsum(histogram, 0) - histogram
        self._edge = (below < self._share).sum().clamp(min=1) - 1
        # Without an index, which would wait for the device.
        at = self._edge.view(1)
        inside = (self._share - below.gather(0, at)) / histogram.gather(0, at).clamp(min=1e-12)
        self._part = inside.clamp(max=1).squeeze(0)

    def share(self, iteration: int) -> float:
        """Returns the share c of samples that count in a step."""
        config = self.context.config
        start, whole = config.curriculum_start, config.curriculum_share * self.context.steps
        t = min(1.0, iteration / max(1.0, whole))
        if config.curriculum_pacing == "root":
            return math.sqrt(start**2 + (1 - start**2) * t)
        if config.curriculum_pacing == "step":
            t = min(1.0, math.floor(t * _STEPS) / (_STEPS - 1))
        return start + (1 - start) * t

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`; 1 in the first step, before the numbers are known."""
        numbers = view.documents["curriculum_by"].double().clamp(0, 1)
        if self.context.config.curriculum_order == "descending":
            numbers = 1 - numbers
        self._numbers[view.index] = numbers
        bins = _bins(numbers)
        counts = torch.where(bins == self._edge, self._part, (bins < self._edge).double())
        known = (self.running[-1] > 0) & (self._share < 1)
        return torch.where(known, counts / self._share, 1.0).float()

    def sums(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `_Running.sums`: the number of samples in each bin."""
        ones = torch.ones_like(numbers)
        return torch.zeros_like(self.running[:-1]).index_add_(0, _bins(numbers), ones)

    def update(self, sums: torch.Tensor) -> None:
        """See `_Running.update`."""
        histogram, age = self.running[:-1], self.running[-1] + 1
        # A quantile of few samples is noisy: it averages over more steps than a mean.
        new = share_of_new(age, 1 - (1 - DECAY) / 5)
        histogram = histogram + new * (sums / sums.sum().clamp(min=1) - histogram)
        self.running = torch.cat([histogram, age.view(1)])

    def figures(self) -> dict[str, Any]:
        """The share of samples that count."""
        return {"curriculum": self._share}

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        self._settle()
        return {"running": self.running.cpu(), "share": self._share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        self.running, self._share = state["running"].to(self.running.device), state["share"]


def _bins(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers * _BINS).long().clamp(max=_BINS - 1)


class ExcessLoss(_Running):
    """The map of a sample's mean token loss relative to that of a reference model.

    Weights are 1 for two steps: the first shows the range of excess losses, the second the mean of
    the weights that they give. Weights return to 1 while all losses fall faster than the running
    range can follow.
    """

    needs = Needs(losses=True, map=True, documents=("reference_losses",))

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.map = build_map(context.config, True, context.device, drifts=True)
        # Mean and variance of the excess losses of the last samples, see `maps.RECENT`.
        self.running = torch.tensor([0.0, 1.0], dtype=torch.float64, device=context.device)
        self._steps = 0
        self._bad: torch.Tensor | bool = False

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`."""
        losses = mean_losses(view.losses, view.mask, self.context.topology)
        excess = self._numbers[view.index] = losses - view.documents["reference_losses"].double()
        found = self.map.weights(excess)
        self._bad = found.bad | self._bad
        return found.weights if self._steps > 1 else torch.ones_like(found.weights)

    def sums(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `_Running.sums`: count, sum and sum of squares, and what the map needs."""
        finite = torch.isfinite(numbers)
        kept = torch.where(finite, numbers, 0.0)
        own = torch.stack([finite.double().sum(), kept.sum(), kept.square().sum()])
        return torch.cat([own, self.map.sums(numbers)])

    def update(self, sums: torch.Tensor) -> None:
        """See `_Running.update`."""
        count, total, squares = sums[:3]
        mean = total / count.clamp(min=1)
        step = torch.stack([mean, squares / count.clamp(min=1) - mean.square()])
        self._steps += 1
        new = newest(count.clamp(min=1)).clamp(min=1 / self._steps)
        self.running = self.running + new * (step - self.running)
        if self._steps > 1:  # the first step only places the map
            self.map.update(sums[3:])
        self.map.place(*self.running)

    def bad_scores(self) -> torch.Tensor | bool:
        """See `WeightPolicy.bad_scores`."""
        found, self._bad = self._bad, False
        return found

    def local_scores(self) -> torch.Tensor | None:
        """See `WeightPolicy.local_scores`: the excess losses."""
        if not self._numbers:
            return None
        return torch.cat([self._numbers[k] for k in sorted(self._numbers)])

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        self._settle()
        return {"map": self.map.state_dict(), "running": self.running.cpu(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        self._steps = state.get("steps", 0)  # older states start from 0
        self.map.load_state_dict(state["map"])
        self.running = state["running"].to(self.running.device)
