"""Applies per-sample weights to the loss, with a wrapper around the trainer's forward step.

Megatron's `forward_step(data_iterator, model)` returns the per-token losses `[b, s]` and a
`loss_func`. The wrapped step passes to `loss_func` the losses times the samples' weights, and takes
the report from a second call on the unweighted, detached losses. `loss_mask` is not touched, so
every token count stays as it is, and with w = 1 training is bit-identical to stock. Any `loss_func`
that is linear in the per-token losses works. The losses of multi-token prediction do not pass
through a loss function; they are weighted in the backward pass (`core.further_losses`), or left
unweighted (`--dwm-mtp plain`).

Shapes: b samples in a micro-batch, m micro-batches in a step, s tokens in a sample.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_dwm.core.further_losses import SumLater, WeightLater, listening
from megatron_dwm.core.state_tap import StateTap
from megatron_dwm.errors import DWMError
from megatron_dwm.policies.base import SampleView, WeightPolicy

# Tolerance of `loss_func(2 x)` against `2 loss_func(x)`: far above rounding, even in bf16.
_LINEAR = 1e-2


class SampleLosses:
    """Per-sample losses of one pass over the step's micro-batches, last pipeline stage only.

    Attributes:
        sums: for each micro-batch `[b]` float64, the sum over tokens of the masked losses.
        num_tokens: for each micro-batch the token count, or None when `loss_func` averages
            by itself (the two-value form).
        further: for each micro-batch `[b]` float64, the sum of the losses of multi-token
            prediction, which Megatron itself has divided by tokens; None if there are none.
    """

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []
        self.num_tokens: list[torch.Tensor | None] = []
        self.further: list[torch.Tensor | None] = []

    def contributions(
        self, per_token: bool, data_parallel_size: int, context_parallel_size: int = 1
    ) -> torch.Tensor:
        """Returns what each sample adds to the loss that the trainer differentiates.

        The trainer's chain: micro-batch sum / its tokens (`loss_func` with three values) /
        micro-batches / data-parallel size (averaged by DDP); with `--calculate-per-token-loss`
        the sums are divided once by the tokens of the global batch, which the caller does. The
        losses of multi-token prediction are already divided by tokens; with that flag they are
        multiplied by the micro-batch's token count again.

        Args:
            per_token: `--calculate-per-token-loss`.
            data_parallel_size: ranks over which DDP averages.
            context_parallel_size: factor of the two-value form.

        Returns:
            `[m * b]` in the order of the micro-batches.
        """
        count = len(self.sums)
        parts = []
        found = zip(self.sums, self.num_tokens, self.further, strict=True)
        for sums, tokens, further in found:
            if tokens is None:
                if per_token:
                    raise _no_token_count()
                part = sums * (context_parallel_size / (count * data_parallel_size))
            elif per_token:
                part = sums
            else:
                part = sums / tokens.clamp(min=1) / (count * data_parallel_size)
            if further is not None:
                part = part + further / (1 if per_token else count * data_parallel_size)
            parts.append(part)
        return torch.cat(parts)


def token_counts(num_tokens: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Returns the token count of each micro-batch.

    Raises:
        DWMError: the loss function returns none.
    """
    counts = [t for t in num_tokens if t is not None]
    if len(counts) < len(num_tokens):
        raise _no_token_count()
    return counts


def _no_token_count() -> DWMError:
    return DWMError(
        "--calculate-per-token-loss needs a loss_func that returns (loss sum, "
        "num_tokens, report), but this script's returns two values",
        this_rank_only=True,
    )


@dataclass
class PolicyWeights:
    """Weights that are computed inside the forward step, instead of given ones.

    Attributes:
        policy: computes them.
        tap: reads the hidden states, if the policy needs them.
        domains: `[n]` data set of each local sample, if the policy needs it.
        documents: by setting, the `[n]` numbers of the local samples' documents.
    """

    policy: WeightPolicy
    tap: StateTap | None = None
    domains: torch.Tensor | None = None
    documents: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Applied:
    """The results of a weighted pass over the step's micro-batches, on ranks that see losses.

    Attributes:
        num_tokens: token count of each micro-batch (None if `loss_func` averages by itself).
        by_micro_batch: `[b]` weights of each micro-batch.
        losses: `[b]` mean token loss of each micro-batch's samples, if they are kept.
    """

    num_tokens: list[torch.Tensor | None] = field(default_factory=list)
    by_micro_batch: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

    @property
    def weights(self) -> torch.Tensor | None:
        """`[n]` weights of the local samples; None if none were used."""
        return torch.cat(self.by_micro_batch) if self.by_micro_batch else None


class WeightedForwardStep:
    """Wraps the `forward_step` that is passed to `pretrain`; inert unless a mode is entered."""

    def __init__(self, forward_step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward_step)
        self.forward_step = forward_step
        self._weights: torch.Tensor | PolicyWeights | None = None
        self._applied = Applied()
        self._losses: SampleLosses | None = None
        self._num_tokens: list[torch.Tensor | None] | None = None
        self._num_microbatches = 1
        self._calls = 0
        self._known_linear = False
        # Whether the samples' losses are kept, if a policy asks for losses at all.
        self.keeps_losses = False
        # Whether a sample's weight also applies to its losses of multi-token prediction.
        self.weighs_further = True
        # A context for the work that weighting adds to a micro-batch's forward step.
        self.stopwatch: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    @contextlib.contextmanager
    def weighted(
        self, weights: torch.Tensor | PolicyWeights | None, num_microbatches: int | None = None
    ) -> Iterator[Applied]:
        """A context in which the k-th loss of the step is weighted by `weights[k % m]` or a policy.

        The modulo is there because Megatron's rerun state machine may repeat a step's passes.

        Args:
            weights: `[m, b]`, or what computes them, on ranks that see losses; None elsewhere.
            num_microbatches: m; needed for a policy.

        Yields:
            The `Applied` to which each micro-batch adds its token count and weights.
        """
        self._weights, self._calls, self._applied = weights, 0, Applied()
        if isinstance(weights, torch.Tensor):
            num_microbatches = weights.size(0)
        self._num_microbatches = num_microbatches or 1
        tap = weights.tap if isinstance(weights, PolicyWeights) else None
        self._num_tokens = self._applied.num_tokens
        try:
            with contextlib.nullcontext() if tap is None else tap.listening():
                yield self._applied
        finally:
            self._weights, self._num_tokens = None, None

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[torch.Tensor | None]]:
        """A context in which losses are the script's own, and token counts are collected."""
        self._num_tokens = []
        try:
            yield self._num_tokens
        finally:
            self._num_tokens = None

    @contextlib.contextmanager
    def measured(self) -> Iterator[SampleLosses]:
        """A context in which per-sample losses are collected and nothing is weighted."""
        self._losses = SampleLosses()
        try:
            yield self._losses
        finally:
            self._losses = None

    def __call__(self, data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the trainer's forward step; inside a mode the loss function is wrapped."""
        step = functools.partial(self.forward_step, data_iterator, model, *args, **kwargs)
        if self._losses is not None:
            summed = SumLater()
            with listening(summed) if self.weighs_further else contextlib.nullcontext():
                output, loss_func = step()
            return output, functools.partial(self._measure, loss_func, self._losses, summed)
        if self._weights is not None:
            later = WeightLater()
            with listening(later) if self.weighs_further else contextlib.nullcontext():
                output, loss_func = step()
            return output, functools.partial(self._weigh, loss_func, later)
        output, loss_func = step()
        if self._num_tokens is not None:
            return output, functools.partial(self._count, loss_func)
        return output, loss_func

    def _weigh(
        self,
        loss_func: Callable[..., Any],
        later: WeightLater,
        output: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        assert self._weights is not None
        k = self._calls % self._num_microbatches
        if k == 0:
            self._applied.num_tokens.clear()
            self._applied.by_micro_batch.clear()
            self._applied.losses.clear()
        self._calls += 1
        with self.stopwatch():
            if isinstance(self._weights, PolicyWeights):
                weights, reported = self._by_policy(self._weights, k, loss_func, output, kwargs)
            else:
                weights, reported = self._weights[k], loss_func(output.detach(), **kwargs)
        weighted = loss_func(_scale(output, weights), **kwargs)
        later.weights = weights
        self._applied.by_micro_batch.append(weights)
        self._note_tokens(weighted)
        return (*weighted[:-1], reported[-1])

    def _by_policy(
        self,
        source: PolicyWeights,
        k: int,
        loss_func: Callable[..., Any],
        output: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Any]:
        """Returns a micro-batch's weights, given by a policy, and the loss function's report."""
        needs, losses = source.policy.needs, output.detach()
        _check_shape(output, output.size(0))
        view = SampleView(k, losses)
        mine = slice(k * output.size(0), (k + 1) * output.size(0))
        if source.domains is not None:
            view.domains = source.domains[mine]
        view.documents = {name: numbers[mine] for name, numbers in source.documents.items()}
        if not (needs.losses or needs.states):
            return source.policy.weights(view), loss_func(losses, **kwargs)
        # The loss is linear in the per-token losses: its derivative is how much each position
        # counts.
        with torch.enable_grad():
            leaf = losses.clone().requires_grad_()
            reported = loss_func(leaf, **kwargs)
            (view.mask,) = torch.autograd.grad(reported[0], leaf)
        view.mask = view.mask.float()
        if self.keeps_losses:
            tokens = view.mask.sum(1).clamp(min=1e-20)
            self._applied.losses.append((losses.float() * view.mask).sum(1) / tokens)
        if not self._known_linear:
            _check_linear(loss_func, losses, reported[0].detach(), kwargs)
            self._known_linear = True
        if needs.states:
            assert source.tap is not None
            view.states = source.tap.take()
        with torch.no_grad():
            weights = source.policy.weights(view)
        return weights, (*reported[:-1], _detached(reported[-1]))

    def _count(self, loss_func: Callable[..., Any], output: torch.Tensor, **kwargs: Any) -> Any:
        result = loss_func(output, **kwargs)
        self._note_tokens(result)
        return result

    def _note_tokens(self, result: tuple) -> None:
        if self._num_tokens is not None:
            self._num_tokens.append(result[1].detach().clone() if len(result) == 3 else None)

    @staticmethod
    def _measure(
        loss_func: Callable[..., Any],
        losses: SampleLosses,
        summed: SumLater,
        output: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        # loss_func is linear in the losses, so its derivative with respect to a factor per sample,
        # taken at 1, is that sample's share; this needs no knowledge of the mask inside loss_func.
        # The derivative is summed in float64: a finite difference subtracts sums that are nearly
        # equal, and the float32 spacing of a sum in the hundreds is as large as the difference.
        with torch.enable_grad():
            factors = torch.ones(
                output.size(0), dtype=torch.float64, device=output.device, requires_grad=True
            )
            scaled = _scale(output.detach().double(), factors).to(output.dtype)
            probe = loss_func(scaled, **kwargs)
            (sums,) = torch.autograd.grad(probe[0], factors)
        losses.sums.append(sums.detach())
        losses.further.append(summed.sums)
        losses.num_tokens.append(probe[1].detach() if len(probe) == 3 else None)
        return loss_func(output, **kwargs)


def _scale(output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    _check_shape(output, weights.numel())
    return output * weights.to(output.dtype).unsqueeze(1)


def _check_shape(output: torch.Tensor, samples: int) -> None:
    if output.dim() != 2 or output.size(0) != samples:
        raise DWMError(
            f"the model's output has shape {list(output.shape)}, but per-sample weights need "
            f"per-token losses [micro_batch_size, seq_length] with {samples} samples; "
            "packed (thd) sequences and other losses are not supported",
            this_rank_only=True,
        )


def _detached(report: Any) -> Any:
    """Returns the loss function's report without the autograd graph."""
    if not isinstance(report, dict):
        return report
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in report.items()}


def _check_linear(
    loss_func: Callable[..., Any], losses: torch.Tensor, once: torch.Tensor, kwargs: dict[str, Any]
) -> None:
    """Refuses a loss function under which a weight would not scale its sample's loss.

    Args:
        loss_func: the script's loss function.
        losses: `[b, s]` per-token losses.
        once: what it returned for them.
        kwargs: keyword arguments of its call.
    """
    with torch.no_grad():
        twice = loss_func(2 * losses, **kwargs)[0]
    a, b = twice.float().sum().item(), 2 * once.float().sum().item()
    # Losses that are not finite cannot be judged here; the trainer's own checks report them.
    if abs(a - b) > _LINEAR * abs(b):
        raise DWMError(
            "this script's loss_func is not linear in the per-token losses: for losses twice as "
            f"large it returns {a:.6g}, not {b:.6g}, so a weight would not scale its sample's "
            "loss; move clipping and the like before the losses, or use --dwm-policy uniform",
            this_rank_only=True,
        )
