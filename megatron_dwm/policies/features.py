"""The head's features of a sample, from the language model's own forward pass.

    mean and variance over positions of the final hidden states (after the final norm)   [b, 2 h]
    mean and standard deviation of the per-token losses                                  [b, 2]

Positions count as they count in the loss; masked ones do not count. Under sequence parallelism each
tensor-parallel rank has a part of the positions, and under context parallelism each rank of that
group (also of the losses): the moments of the parts are merged, so the features are those of the
whole sample.

Shapes: b samples, s positions on this rank, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_dwm.core.topology import Topology

# Elements of a float32 copy that are made at a time.
_BLOCK = 1 << 22


@dataclass
class Moments:
    """Weighted moments over positions, float32.

    Attributes:
        count: `[b, 1]` sum of the positions' weights.
        mean: `[b, f]`.
        deviations: `[b, f]`, sum of squared deviations from the mean.
    """

    count: torch.Tensor
    mean: torch.Tensor
    deviations: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        """Variance `[b, f]`; 0 where no position counts."""
        return self.deviations / self.count.clamp(min=1e-20)


def moments_over_positions(x: torch.Tensor, mask: torch.Tensor) -> Moments:
    """Returns the moments of `[s, b, f]` over s, in float32, block by block.

    The deviations are summed around the mean, in a second pass: sums of squares would lose the
    variance of a feature whose mean is large.

    Args:
        x: values in any precision.
        mask: `[s, b]` float32 weights of the positions.
    """
    step = max(1, _BLOCK // max(1, x.size(1) * x.size(2)))
    weights = mask.unsqueeze(-1)
    parts = list(zip(x.split(step), weights.split(step), strict=True))
    if len(parts) == 1:
        parts = [(x.float(), weights)]  # small enough to keep for both passes
    count = weights.sum(0)
    mean = _added([(part.float() * m).sum(0) for part, m in parts]) / count.clamp(min=1e-20)
    squares = [((part.float() - mean).square() * m).sum(0) for part, m in parts]
    return Moments(count, mean, _added(squares))


def _added(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def merged(parts: Moments, gather: Callable[[torch.Tensor], torch.Tensor]) -> Moments:
    """Merges the moments of ranks that each have other positions of the samples.

    Args:
        parts: this rank's moments.
        gather: a method of `Topology` that returns `[ranks, ...]`.
    """
    packed = torch.cat([parts.count, parts.mean, parts.deviations], dim=1)
    found = gather(packed)
    if len(found) == 1:
        return parts
    width = parts.mean.size(1)
    counts, means, deviations = found.split([1, width, width], dim=2)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1e-20)
    return Moments(count, mean, (deviations + counts * (means - mean).square()).sum(0))


def sample_features(
    states: torch.Tensor, losses: torch.Tensor, mask: torch.Tensor, topology: Topology
) -> torch.Tensor:
    """Returns the features of a micro-batch, `[b, 2 h + 2]` float32, equal on all its ranks.

    Args:
        states: `[s, b, h]` final hidden states; `[s / tp, b, h]` under sequence parallelism.
        losses: `[b, s]` per-token losses.
        mask: `[b, s]` how much each position counts.
        topology: which ranks have which positions.
    """
    over_losses = moments_over_positions(losses.t().unsqueeze(-1), mask.t())
    positions = mask.t()
    if states.size(0) != positions.size(0):
        positions = topology.own_positions(positions)
        parts = moments_over_positions(states, positions)
        over_states = merged(parts, topology.gather_parts_of_states)
    else:
        over_states = moments_over_positions(states, positions)
    over_states = merged(over_states, topology.gather_parts_of_context)
    over_losses = merged(over_losses, topology.gather_parts_of_context)
    return torch.cat(
        [over_states.mean, over_states.variance, over_losses.mean, over_losses.variance.sqrt()],
        dim=1,
    )


def mean_losses(
    losses: torch.Tensor, mask: torch.Tensor | None, topology: Topology
) -> torch.Tensor:
    """Returns the mean token loss of each sample, `[b]` float64, equal on all its ranks.

    Args:
        losses: `[b, s]` per-token losses.
        mask: `[b, s]` how much each position counts.
        topology: which ranks have which positions.
    """
    assert mask is not None  # requested by `Needs.losses`
    parts = moments_over_positions(losses.t().unsqueeze(-1), mask.t())
    return merged(parts, topology.gather_parts_of_context).mean.squeeze(1).double()


class Projection:
    """A fixed random projection of many standardised features to few.

    Each feature gets a random sign and is added to one of the outputs, all of which get equally
    many: a count sketch (Charikar et al., 2002; Weinberger et al., 2009) with balanced buckets.
    Inner products are preserved in expectation. It needs one vector of signs and one of positions,
    and takes the same sums in the same order on every rank.

    The last `kept` features pass through unchanged.

    Args:
        width: number of features.
        limit: number of outputs, if there are more features than that.
        kept: number of features at the end that pass through unchanged.
        seed: seed of signs and positions.
        device: where features live.
    """

    def __init__(self, width: int, limit: int, kept: int, seed: int, device: torch.device) -> None:
        self.inputs, self.kept = width - kept, kept
        self.active = width > limit
        self.width = min(width, limit)
        if not self.active:
            return
        outputs = limit - kept
        generator = torch.Generator().manual_seed(seed)
        per_output = -(-self.inputs // outputs)
        padded = per_output * outputs
        order = torch.randperm(padded, generator=generator)
        signs = torch.randint(2, (padded,), generator=generator).double() * 2 - 1
        # Positions beyond the last feature read the first one with sign 0.
        signs[order >= self.inputs] = 0.0
        self.order = order.clamp(max=self.inputs - 1).masked_fill(order >= self.inputs, 0)
        self.order = self.order.to(device)
        self.signs, self.per_output = signs.to(device), per_output

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Projects `[n, inputs + kept]` to `[n, width]`, in the same precision."""
        if not self.active:
            return features
        many, kept = features.split([self.inputs, self.kept], dim=1)
        signed = many[:, self.order] * self.signs.to(many.dtype)
        few = signed.view(len(features), self.per_output, -1).sum(1)
        return torch.cat([few, kept], dim=1)
