"""Per-sample influence by a central difference along v: two forward-only passes.

`c_i = <v, g_i> = (l_i(theta + eps v) - l_i(theta - eps v)) / (2 eps) + O(eps^2)`, with `l_i` the
sample's share of the trainer's loss. It needs nothing from the model but its loss, so it works
with every kernel. Source: the finite-difference hypergradient of SAMA (NeurIPS 2023), here with
one difference for all samples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_dwm.meta import collectives


@torch.no_grad()
def estimate(
    parameters: list[torch.nn.Parameter],
    theta: list[torch.Tensor],
    measure: Callable[[], torch.Tensor | None],
    relative_step: float,
    group: dist.ProcessGroup,
) -> torch.Tensor | None:
    """Returns this rank's `c_i`.

    Args:
        parameters: the model's trainable parameters; `main_grad` holds v on entry, and the
            parameters are left at `theta - eps v`: the caller restores them.
        theta: the parameters before the step, in the same order.
        measure: runs the model forward over the step's micro-batches and returns each
            sample's share of the loss, `[n]`, on ranks that see losses and None elsewhere.
        relative_step: `|eps v| / |theta|`.
        group: all ranks, over which eps must agree: with expert parallelism, data-parallel ranks
            hold different parameters too.

    Returns:
        `[n]` float32 on ranks that see losses, None elsewhere.
    """
    eps = step_size(parameters, theta, relative_step, group)
    if eps == 0.0 or not math.isfinite(eps):
        # No direction: influence 0. A direction that is not finite: influence not finite.
        losses = measure()
        return None if losses is None else torch.full_like(losses, eps)
    _move(parameters, theta, eps)
    above = measure()
    _move(parameters, theta, -eps)
    below = measure()
    if above is None or below is None:
        return None
    return ((above.double() - below.double()) / (2.0 * eps)).float()


def step_size(
    parameters: list[torch.nn.Parameter],
    theta: list[torch.Tensor],
    relative_step: float,
    group: dist.ProcessGroup,
) -> float:
    """Returns eps with `|eps v| = relative_step |theta|` over the whole model.

    0 when v is 0, NaN when v or theta is not finite.
    """
    device = theta[0].device if theta else torch.device("cpu")
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for parameter, value in zip(parameters, theta, strict=True):
        squares[0] += value.float().square().sum()
        squares[1] += parameter.main_grad.float().square().sum()
    # Replicated parameters count on every rank, in both sums: eps need only be the same
    # everywhere, not exact.
    squares = collectives.sum_of_shards(squares, group)
    theta_norm, v_norm = squares.sqrt().tolist()
    if not (math.isfinite(v_norm) and math.isfinite(theta_norm)):
        return math.nan
    return relative_step * theta_norm / v_norm if v_norm > 0.0 else 0.0


def _move(parameters: list[torch.nn.Parameter], theta: list[torch.Tensor], eps: float) -> None:
    """Sets the parameters to `theta + eps v`, rounded once to their own precision."""
    for parameter, value in zip(parameters, theta, strict=True):
        if value.dtype == parameter.main_grad.dtype:
            torch.add(value, parameter.main_grad.view_as(value), alpha=eps, out=parameter.data)
        else:
            moved = value.float().add_(parameter.main_grad.view_as(value).float(), alpha=eps)
            parameter.data.copy_(moved)
