"""From the meta loss's gradient h to `v = (dU/dG)^T h`: how the meta loss sees the gradient G.

`theta+ = theta + U(clip(sum_i w_i g_i))`, so `dL_meta/dw_i = <h, dU/dG g_i> = <v, g_i>` with
h taken at theta+. v lives in the model's gradient buffers (`main_grad`), full on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.meta import collectives, jacobian
from megatron_dwm.meta.optimizer_view import ParamShard, all_leaves, shards, update_jacobian


@dataclass
class InnerStep:
    """What has to be kept of an optimizer step to differentiate it.

    Attributes:
        entries: for each slice that this rank steps: the slice, the diagonal `dU/dG'` (`[k]`
            float32 or a number) and, when clipping was active, the clipped gradient `[k]`.
        clip: `(a, b)` of `jacobian.clip_projection`.
        optimizers: the Megatron optimizers, those without a share on this rank too.
    """

    entries: list[tuple[ParamShard, torch.Tensor | float, torch.Tensor | None]]
    clip: tuple[float, float]
    optimizers: list[Any]

    @classmethod
    @torch.no_grad()
    def capture(cls, optimizer: Any, lrs: dict[int, float], grad_norm: float | None) -> InnerStep:
        """Reads the optimizer right after its step, before its gradients are overwritten.

        Args:
            optimizer: Megatron's optimizer.
            lrs: `learning_rates(optimizer)` from before the step.
            grad_norm: global norm before clipping, as the trainer reports it.
        """
        parts = list(shards(optimizer))
        leaves = all_leaves(optimizer)
        max_norm = leaves[0].config.clip_grad
        clip = jacobian.clip_projection(float(grad_norm or 0.0), max_norm)
        entries = []
        for shard in parts:
            diagonal = update_jacobian(shard, lrs[id(shard.group)])
            clipped = shard.stepped_grad().clone() if clip[1] else None
            entries.append((shard, diagonal, clipped))
        return cls(entries, clip, leaves)

    @torch.no_grad()
    def pull_back(self, model: list[Any]) -> None:
        """Replaces h in the gradient buffers by v, and completes v on every rank.

        Args:
            model: the DDP-wrapped chunks whose `main_grad` hold h, reduced over data parallelism
                (with the distributed optimizer: this rank's shard of it).
        """
        a, b = self.clip
        dot = 0.0
        if b:
            dot = self._dot_with_clipped_gradient(next(model[0].parameters()).device)
        for shard, diagonal, clipped in self.entries:
            h = shard.grad_slice()
            h.mul_(diagonal)
            if a != 1.0:
                h.mul_(a)
            if clipped is not None:
                h.add_(clipped.to(h.dtype), alpha=-b * dot)
        for chunk in model:
            for buffer in _buffers(chunk):
                if buffer.ddp_config.use_distributed_optimizer:
                    for bucket in buffer.buckets:
                        collectives.gather_shards(bucket.grad_data, buffer.data_parallel_group)

    def _dot_with_clipped_gradient(self, device: torch.device) -> float:
        """Returns `<G', D h>` over the whole model, each parameter once."""
        terms: dict[int, list[torch.Tensor]] = {id(o): [] for o in self.optimizers}
        for shard, diagonal, clipped in self.entries:
            if shard.counts_in_norm() and clipped is not None:
                term = ((shard.grad_slice().float() * diagonal) * clipped).sum().double()
                terms[id(shard.optimizer)].append(term)
        total = 0.0
        for optimizer in self.optimizers:
            mine = terms[id(optimizer)]
            local = torch.stack(mine).sum() if mine else torch.zeros((), dtype=torch.float64)
            group = optimizer.get_grad_stats_parallel_group()
            total += collectives.sum_of_shards(local.to(device), group).item()
        return total


def _buffers(chunk: Any) -> Iterator[Any]:
    yield from chunk.buffers
    yield from chunk.expert_parallel_buffers


def trainable_parameters(model: list[Any]) -> list[torch.nn.Parameter]:
    """Returns the parameters of the DDP-wrapped chunks that have a gradient buffer."""
    return [p for chunk in model for p in chunk.parameters() if hasattr(p, "main_grad")]
