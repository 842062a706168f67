"""Runs the LLM's extra passes: over the meta batch and over the step's own micro-batches."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.core import collectives
from megatron_dwm.core.batches import StepBatches
from megatron_dwm.core.contexts import deterministic
from megatron_dwm.core.trainee import RunShape, Trainee, loss_scale
from megatron_dwm.data.meta_dataset import MetaData
from megatron_dwm.step.loss import SampleLosses, WeightedForwardStep, token_counts


class Passes:
    """Runs the LLM forward, or forward and backward, outside the trainer's own step.

    Args:
        forward_step: the wrapped forward step that `pretrain` was given.
        groups: the LLM's process groups.
        shape: sizes of a step.
        meta_data: the meta set; None without meta steps.
    """

    def __init__(
        self,
        forward_step: WeightedForwardStep,
        groups: Any,
        shape: RunShape,
        meta_data: MetaData | None,
    ) -> None:
        self.forward_step, self.groups = forward_step, groups
        self.shape, self.meta_data = shape, meta_data
        self.sees_losses = groups.pp.rank() == groups.pp.size() - 1

    def run(
        self, trainee: Trainee, batches: StepBatches, num_microbatches: int, forward_only: bool
    ) -> None:
        """Runs the LLM's schedule over micro-batches; the caller chooses how losses count."""
        trainee.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=batches.replay(),
            model=trainee.model,
            num_microbatches=num_microbatches,
            seq_length=self.shape.seq_length,
            micro_batch_size=self.shape.micro_batch_size,
            decoder_seq_length=self.shape.decoder_seq_length,
            forward_only=forward_only,
        )

    def meta_loss_gradient(self, trainee: Trainee) -> float:
        """Leaves the gradient h of the next meta batch's loss in the gradient buffers.

        Returns:
            The meta loss per token on last-stage ranks (0 elsewhere).
        """
        assert self.meta_data is not None
        for chunk in trainee.model:
            chunk.zero_grad_buffer()
        trainee.optimizer.zero_grad()
        batches = StepBatches.like(trainee.data_iterator, self.meta_data.next_batches())
        with deterministic(trainee), self.forward_step.measured() as losses:
            self.run(trainee, batches, self.meta_data.num_microbatches, forward_only=False)
        collectives.count_gradient_reduction(trainee.model)
        scale = loss_scale(trainee)
        if scale != 1.0:
            for chunk in trainee.model:
                chunk.scale_gradients(1.0 / scale)
        return self._mean_loss(losses)

    @torch.no_grad()
    def meta_loss(self, trainee: Trainee, position: int) -> float:
        """Returns the loss of the meta batch at `position`, normalised as in `meta_loss_gradient`.

        This is the trainer's own normalisation: the mean over micro-batches of the loss per token,
        or the loss per token of the whole batch (`--calculate-per-token-loss`).

        Returns:
            The loss on last-stage ranks (0 elsewhere).
        """
        assert self.meta_data is not None
        batches = StepBatches.like(trainee.data_iterator, self.meta_data.batches_at(position))
        with deterministic(trainee), self.forward_step.measured() as losses:
            self.run(trainee, batches, self.meta_data.num_microbatches, forward_only=True)
        if not self.sees_losses:
            return 0.0
        total = self.contributions(losses).double().sum()
        return collectives.sum_over_data_parallel(total, self.groups.dp_cp).item()

    def contributions(self, losses: SampleLosses) -> torch.Tensor:
        """Returns each local sample's share of the loss that the trainer differentiates, `[n]`."""
        parts = losses.contributions(
            self.shape.per_token, self.groups.dp_cp.size(), self.groups.cp.size()
        )
        if not self.shape.per_token:
            return parts
        return parts / self.tokens(losses.num_tokens).clamp(min=1)

    def gradient_scale(self, num_tokens: list[torch.Tensor | None]) -> torch.Tensor | float:
        """Returns the factor from the gradient of the schedule's loss to the trainer's gradient.

        1 / data-parallel size (DDP averages), or with `--calculate-per-token-loss` 1 / tokens of
        the global batch (DDP sums, and `finalize_model_grads` divides once).

        Args:
            num_tokens: token count of each micro-batch, as the loss function returned it.
        """
        if not self.shape.per_token:
            return 1.0 / self.groups.dp_cp.size()
        return 1.0 / self.tokens(num_tokens).clamp(min=1)

    def tokens(self, num_tokens: list[torch.Tensor | None]) -> torch.Tensor:
        """Returns the tokens of the global batch, float64, on last-stage ranks."""
        counts = torch.stack([t.double() for t in token_counts(num_tokens)])
        return collectives.sum_over_data_parallel(counts.sum(), self.groups.dp_cp)

    def local_part(self, values: torch.Tensor) -> torch.Tensor:
        """Returns this data-parallel rank's part `[n]` of a global `[N]`."""
        return values.chunk(self.groups.dp.size())[self.groups.dp.rank()]

    def _mean_loss(self, losses: SampleLosses) -> float:
        """Returns the loss per token over all data-parallel ranks; 0 on ranks without losses."""
        if not self.sees_losses:
            return 0.0
        count = len(losses.sums)
        total = torch.cat(losses.sums).double().sum()
        tokens = torch.tensor(float(count), dtype=torch.float64, device=total.device)
        if losses.num_tokens[0] is not None:
            tokens = torch.stack([t.double() for t in losses.num_tokens if t is not None]).sum()
        sums = collectives.sum_over_data_parallel(torch.stack([total, tokens]), self.groups.dp_cp)
        return (sums[0] / sums[1].clamp(min=1)).item()
