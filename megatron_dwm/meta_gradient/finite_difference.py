"""Per-sample influence by a central difference along v: two forward-only passes.

`c_i = <v, g_i> = (l_i(theta + eps v) - l_i(theta - eps v)) / (2 eps) + O(eps^2)`, with `l_i` the
sample's share of the trainer's loss. It needs only the model's loss, so it works with every kernel.
Source: the finite-difference hypergradient of SAMA (NeurIPS 2023), here with one difference for all
samples at once.

Its error has two parts that pull eps in opposite directions: curvature, which grows with eps^2, and
the rounding of weights and losses, which grows with 1 / eps. So eps is the smallest step that the
weights' own precision resolves (`choose_step`), and the remaining error is measured:

    fd_signal_to_noise   |2 eps v| / |actual move of the parameters - 2 eps v|
    fd_linearity_error   |c(2 eps) - c(eps)| / |c(eps)|, at some meta steps

With curvature alone the second would be three times the error of c(eps), with rounding alone about
equal to it: it overestimates the error in both cases, while a comparison with eps / 2 would
underestimate it for curvature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_dwm.core import collectives

# |eps v| / |theta|, from which one is chosen. The smallest is near the best in float32; the large
# ones are for a v that is concentrated on few elements, so that the others get little.
RELATIVE_STEPS = tuple(3e-4 * 2.0 ** (k / 2) for k in range(13))
# Resolution that a step must have, see `choose_step`, by the precision of the parameters. bf16:
# over ten tiny runs the mean error against per-sample gradients was 13, 10 and 10 % with 7, 8 and
# 10. fp32: below 1 % in five runs, in one of which a step of 3e-4 was off by 4 %. fp16 was not
# measured: the value is in between, as the best eps grows with the cube root of the rounding unit.
RESOLUTION = {torch.bfloat16: 8.0, torch.float16: 32.0, torch.float32: 3e4}
# Number of elements of each parameter on which a step is tried.
SAMPLED_ELEMENTS = 2**12
# Meta steps from one check of linearity to the next; a check costs two more forward passes.
LINEARITY_INTERVAL = 100
# Above this limit, the log shows a warning.
LINEARITY_LIMIT = 0.25


@dataclass
class Difference:
    """The result of the passes.

    Attributes:
        values: `[n]` float32, this rank's `c_i`; None on ranks that see no losses.
        quality: the same on every rank, for the log: `fd_relative_step`, `fd_signal_to_noise` and,
            if it was checked, `fd_linearity_error`; empty if v is 0 or not finite.
    """

    values: torch.Tensor | None
    quality: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def estimate(
    parameters: list[torch.nn.Parameter],
    theta: list[torch.Tensor],
    measure: Callable[[], torch.Tensor | None],
    group: dist.ProcessGroup,
    device: torch.device,
    dtype: torch.dtype,
    relative_step: float | None = None,
    check_linearity: bool = False,
) -> Difference:
    """Returns this rank's `c_i`, and how reliable they are.

    Args:
        parameters: the model's trainable parameters; `main_grad` holds v on entry. They are left
            near theta: the caller restores them.
        theta: the parameters before the step, in the same order.
        measure: runs the model forward over the step's micro-batches and returns each
            sample's share of the loss, `[n]`, on ranks that see losses and None elsewhere.
        group: all ranks, over which eps must agree: with expert parallelism, data-parallel ranks
            hold different parameters too.
        device: the parameters' device; a rank without parameters takes part in the sums.
        dtype: dtype of the run's parameters, the same on every rank.
        relative_step: `|eps v| / |theta|`; None: chosen by `choose_step`.
        check_linearity: also take the difference over twice the step. The values stay those of
            the single step, so a run does not depend on which of its steps are checked.
    """
    theta_norm, v_norm = norms(parameters, theta, group, device)
    if v_norm == 0.0 or not math.isfinite(v_norm + theta_norm):
        # No direction: influence 0. A direction that is not finite: influence not finite.
        losses = measure()
        value = 0.0 if v_norm == 0.0 and math.isfinite(theta_norm) else math.nan
        return Difference(None if losses is None else torch.full_like(losses, value))
    scale = theta_norm / v_norm
    if relative_step is None:
        relative_step = choose_step(parameters, theta, scale, group, device, dtype)
    eps = relative_step * scale
    values, noise = _difference(parameters, theta, measure, eps, group, device)
    quality = {
        "fd_relative_step": relative_step,
        "fd_signal_to_noise": 2.0 * eps * v_norm / noise if noise > 0.0 else math.inf,
    }
    if check_linearity:
        doubled, _ = _difference(parameters, theta, measure, 2.0 * eps, group, device)
        quality["fd_linearity_error"] = _relative_change(values, doubled, group, device)
    return Difference(None if values is None else values.float(), quality)


def warning(quality: dict[str, float]) -> str | None:
    """Returns a line for the console if a check of linearity failed.

    Args:
        quality: quality of an estimate, of this or another estimator.
    """
    error = quality.get("fd_linearity_error", 0.0)
    if error <= LINEARITY_LIMIT:
        return None
    return (
        f"WARNING: DWM: meta-gradients by finite difference change by {error:.0%} when the step "
        f"doubles (limit {LINEARITY_LIMIT:.0%}); |eps v| / |theta| is "
        f"{quality['fd_relative_step']:.2E}, signal to noise {quality['fd_signal_to_noise']:.1f}. "
        "Set --dwm-fd-relative-step (larger where the signal to noise is low, otherwise smaller), "
        "or use --dwm-estimator ghost"
    )


def norms(
    parameters: list[torch.nn.Parameter],
    theta: list[torch.Tensor],
    group: dist.ProcessGroup,
    device: torch.device,
) -> tuple[float, float]:
    """Returns `|theta|` and `|v|` over the whole model, the same on every rank.

    Replicated parameters count on every rank, in both norms: eps and the signal-to-noise ratio are
    ratios of such norms, and need only be the same everywhere.
    """
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for parameter, value in zip(parameters, theta, strict=True):
        squares[0] += value.float().square().sum()
        squares[1] += parameter.main_grad.float().square().sum()
    theta_norm, v_norm = collectives.sum_of_shards(squares, group).sqrt().tolist()
    return theta_norm, v_norm


@torch.no_grad()
def choose_step(
    parameters: list[torch.nn.Parameter],
    theta: list[torch.Tensor],
    scale: float,
    group: dist.ProcessGroup,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Returns the smallest of `RELATIVE_STEPS` that the parameters' precision resolves.

    That is, the smallest with `sum |2 eps v| / sum |actual move of the parameters - 2 eps v|` of at
    least `RESOLUTION`; the largest if none has it. It uses absolute values, not squares as in
    `fd_signal_to_noise`: Adam divides v by the size of the gradient, so elements that contribute
    equally to `<v, g_i>` differ by orders of magnitude in v, and squares would see only the
    largest.

    Steps are tried at every meta step on evenly spaced elements of each parameter, which costs next
    to nothing compared with a forward pass. So the choice is a function of theta and v alone, and a
    resumed run chooses the same as an uninterrupted one.

    Args:
        parameters: `main_grad` holds v; only that and the precision are read.
        theta: the parameters before the step.
        scale: `|theta| / |v|` over the whole model.
        group: all ranks.
        device: of the parameters.
        dtype: dtype of the run's parameters.
    """
    eps = torch.tensor(RELATIVE_STEPS, device=device).unsqueeze(1) * scale  # [k, 1]
    noise = torch.zeros(len(RELATIVE_STEPS), dtype=torch.float64, device=device)
    length = torch.zeros(1, dtype=torch.float64, device=device)
    for parameter, value in zip(parameters, theta, strict=True):
        # Odd, so that the elements come from all columns of a matrix.
        stride = value.numel() // SAMPLED_ELEMENTS | 1
        start = value.reshape(-1)[::stride]
        v = parameter.main_grad.reshape(-1)[::stride].float()  # [m]
        if v.numel() == 0:
            continue
        # As in `_difference`: forth, and back from where that ended.
        above = (start.float() + eps * v).to(value.dtype).float()  # [k, m]
        below = (above - 2.0 * eps * v).to(value.dtype).float()
        share = value.numel() / v.numel()
        noise += (above - below - 2.0 * eps * v).abs().sum(dim=1).double() * share
        length += v.abs().sum().double() * share
    # Summed over all ranks, replicated parameters on each: all take the same step.
    sums = collectives.sum_of_shards(torch.cat([noise, length]), group).tolist()
    wanted = RESOLUTION.get(dtype, RESOLUTION[torch.bfloat16])
    for k, step in enumerate(RELATIVE_STEPS):
        if 2.0 * step * scale * sums[-1] >= wanted * sums[k]:
            return step
    return RELATIVE_STEPS[-1]


def _difference(
    parameters: list[torch.nn.Parameter],
    theta: list[torch.Tensor],
    measure: Callable[[], torch.Tensor | None],
    eps: float,
    group: dist.ProcessGroup,
    device: torch.device,
) -> tuple[torch.Tensor | None, float]:
    """Returns `c_i` `[n]`, float64, at this eps, and the norm of its rounding error."""
    for parameter, value in zip(parameters, theta, strict=True):
        if value.dtype == parameter.main_grad.dtype:
            torch.add(value, parameter.main_grad.view_as(value), alpha=eps, out=parameter.data)
        else:
            parameter.data.copy_(value.float().add_(_direction(parameter), alpha=eps))
    above = measure()
    noise = _move_back(parameters, 2.0 * eps, group, device)
    below = measure()
    if above is None or below is None:
        return None, noise
    return (above.double() - below.double()) / (2.0 * eps), noise


def _move_back(
    parameters: list[torch.nn.Parameter],
    distance: float,
    group: dist.ProcessGroup,
    device: torch.device,
) -> float:
    """Moves the parameters by `-distance v` from where rounding left them.

    The target is not theta - eps v: this way the first move's rounding error is not part of the
    difference, which halves the noise. (It shifts the centre of the difference by less than half an
    ulp of theta.)

    Returns:
        The norm of this move's rounding error, over the whole model.
    """
    noise = torch.zeros(1, dtype=torch.float64, device=device)
    for parameter in parameters:
        v = _direction(parameter)
        # Kept: one parameter in float32: first its old value, then the error of its move.
        before = parameter.detach().to(torch.float32, copy=True)
        parameter.data.copy_(torch.add(before, v, alpha=-distance))
        error = before.sub_(parameter.detach()).sub_(v, alpha=distance)
        noise += torch.linalg.vector_norm(error).double().square()
    # Summed over all ranks, replicated parameters on each, as in |v|.
    return math.sqrt(collectives.sum_of_shards(noise, group).item())


def _relative_change(
    values: torch.Tensor | None,
    doubled: torch.Tensor | None,
    group: dist.ProcessGroup,
    device: torch.device,
) -> float:
    """Returns `|doubled - values| / |values|` over the global batch, the same on every rank.

    Not finite if all values are 0: v is not 0, so the step must have been lost in the rounding.
    """
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    if values is not None and doubled is not None:
        squares = torch.stack([(doubled - values).square().sum(), values.square().sum()])
    # Summed over all ranks: earlier stages add 0, tensor-parallel peers add the same to both.
    change, size = collectives.sum_of_shards(squares, group).sqrt().tolist()
    return change / size if size > 0.0 else math.inf


def _direction(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.main_grad.view_as(parameter).float()
