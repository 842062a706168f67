"""Per-sample weights enter through the loss: a wrapper around the trainer's forward step.

Megatron's `forward_step(data_iterator, model)` returns the per-token losses `[b, s]` and a
`loss_func`. The wrapped step hands `loss_func` the losses times the samples' weights, and takes
the report from a second call on the unweighted, detached losses. `loss_mask` is not touched, so
every token count stays as it is, and with w = 1 the training is bit-identical to stock. Any
`loss_func` that is linear in the per-token losses works.

Shapes: b samples in a micro-batch, m micro-batches in a step, s tokens in a sample.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dwm.errors import DWMError


class SampleLosses:
    """Per-sample losses of one pass over the step's micro-batches, last pipeline stage only.

    Attributes:
        sums: for each micro-batch `[b]` float64, the sum over tokens of the masked losses.
        num_tokens: for each micro-batch the token count, or None when `loss_func` averages
            by itself (the two-value form).
    """

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []
        self.num_tokens: list[torch.Tensor | None] = []

    def contributions(
        self, per_token: bool, data_parallel_size: int, context_parallel_size: int = 1
    ) -> torch.Tensor:
        """Returns what each sample adds to the loss that the trainer differentiates.

        The trainer's chain: micro-batch sum / its tokens (`loss_func` with three values) /
        micro-batches / data-parallel size (averaged by DDP); with `--calculate-per-token-loss`
        the sums are divided once by the tokens of the global batch, which the caller does.

        Args:
            per_token: `--calculate-per-token-loss`.
            data_parallel_size: ranks over which DDP averages.
            context_parallel_size: factor of the two-value form.

        Returns:
            `[m * b]` in the order of the micro-batches.
        """
        count = len(self.sums)
        parts = []
        for sums, tokens in zip(self.sums, self.num_tokens, strict=True):
            if tokens is None:
                if per_token:
                    raise _no_token_count()
                parts.append(sums * (context_parallel_size / (count * data_parallel_size)))
            elif per_token:
                parts.append(sums)
            else:
                parts.append(sums / tokens.clamp(min=1) / (count * data_parallel_size))
        return torch.cat(parts)


def token_counts(num_tokens: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Returns the token count of each micro-batch.

    Raises:
        DWMError: the loss function gives none.
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


class WeightedForwardStep:
    """Wraps the `forward_step` that is handed to `pretrain`; inert unless a mode is entered."""

    def __init__(self, forward_step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward_step)
        self.forward_step = forward_step
        self._weights: torch.Tensor | None = None
        self._losses: SampleLosses | None = None
        self._num_tokens: list[torch.Tensor | None] | None = None
        self._calls = 0

    @contextlib.contextmanager
    def weighted(self, weights: torch.Tensor | None) -> Iterator[list[torch.Tensor | None]]:
        """Within it, the k-th loss of the step is weighted by `weights[k % m]`.

        Modulo, because Megatron's rerun state machine may run a step's passes again.

        Args:
            weights: `[m, b]` on ranks that see losses; None elsewhere.

        Yields:
            A list that fills with the token count of each micro-batch (None where `loss_func`
            averages by itself).
        """
        self._weights, self._calls, self._num_tokens = weights, 0, []
        try:
            yield self._num_tokens
        finally:
            self._weights, self._num_tokens = None, None

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[torch.Tensor | None]]:
        """Within it, losses are the script's own, and token counts are collected as above."""
        self._num_tokens = []
        try:
            yield self._num_tokens
        finally:
            self._num_tokens = None

    @contextlib.contextmanager
    def measured(self) -> Iterator[SampleLosses]:
        """Within it, per-sample losses are collected and nothing is weighted."""
        self._losses = SampleLosses()
        try:
            yield self._losses
        finally:
            self._losses = None

    def __call__(self, data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the trainer's forward step; the loss function is wrapped within a mode."""
        output, loss_func = self.forward_step(data_iterator, model, *args, **kwargs)
        if self._losses is not None:
            return output, functools.partial(self._measure, loss_func, self._losses)
        if self._weights is not None:
            return output, functools.partial(self._weigh, loss_func)
        if self._num_tokens is not None:
            return output, functools.partial(self._count, loss_func)
        return output, loss_func

    def _weigh(self, loss_func: Callable[..., Any], output: torch.Tensor, **kwargs: Any) -> Any:
        assert self._weights is not None
        weights = self._weights[self._calls % self._weights.size(0)]
        if self._calls % self._weights.size(0) == 0 and self._num_tokens is not None:
            self._num_tokens.clear()
        self._calls += 1
        weighted = loss_func(_scale(output, weights), **kwargs)
        reported = loss_func(output.detach(), **kwargs)
        self._note_tokens(weighted)
        return (*weighted[:-1], reported[-1])

    def _count(self, loss_func: Callable[..., Any], output: torch.Tensor, **kwargs: Any) -> Any:
        result = loss_func(output, **kwargs)
        self._note_tokens(result)
        return result

    def _note_tokens(self, result: tuple) -> None:
        if self._num_tokens is not None:
            self._num_tokens.append(result[1].detach().clone() if len(result) == 3 else None)

    @staticmethod
    def _measure(
        loss_func: Callable[..., Any], losses: SampleLosses, output: torch.Tensor, **kwargs: Any
    ) -> Any:
        # loss_func is linear in the losses, so its derivative by a factor per sample, taken at
        # 1, is that sample's share; it needs no knowledge of the mask inside loss_func. The
        # derivative is summed in float64: a finite difference is of sums that are nearly alike,
        # and a sum of hundreds in float32 has steps as large as what it looks for.
        with torch.enable_grad():
            factors = torch.ones(
                output.size(0), dtype=torch.float64, device=output.device, requires_grad=True
            )
            scaled = _scale(output.detach().double(), factors).to(output.dtype)
            probe = loss_func(scaled, **kwargs)
            (sums,) = torch.autograd.grad(probe[0], factors)
        losses.sums.append(sums.detach())
        losses.num_tokens.append(probe[1].detach() if len(probe) == 3 else None)
        return loss_func(output, **kwargs)


def _scale(output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if output.dim() != 2 or output.size(0) != weights.numel():
        raise DWMError(
            f"the model's output has shape {list(output.shape)}, but per-sample weights need "
            f"per-token losses [micro_batch_size, seq_length] with {weights.numel()} samples; "
            "packed (thd) sequences and other losses are not supported",
            this_rank_only=True,
        )
    return output * weights.to(output.dtype).unsqueeze(1)
