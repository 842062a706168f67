"""Pulls the meta loss's gradient h back through the optimizer's step: `v = (dU/dG)^T h`.

`theta+ = theta + U(clip(sum_i w_i g_i))`, so `dL_meta/dw_i = <h, dU/dG g_i> = <v, g_i>` with
h taken at theta+. v is kept in the model's gradient buffers (`main_grad`), complete on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_dwm.core import collectives
from megatron_dwm.core.optimizers import (
    ParamShard,
    all_leaves,
    grad_stats_group,
    layer_wise_leaves,
    shards,
)
from megatron_dwm.meta_gradient.optimizers import derivatives
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import rule_of


@dataclass
class InnerStep:
    """What has to be kept from an optimizer step to differentiate it.

    Only the gradient is kept, 4 bytes per element that this rank updates: the moments stay with the
    optimizer until its next step, and the Jacobian is computed from both once h is known.

    Attributes:
        entries: for each slice that this rank updates: the slice and the (clipped) gradient of its
            step, `[k]` float32, None if the Jacobian does not need it.
        lrs: the step's learning rates, by the id of the group.
        clip: `(a, b)` of `derivatives.clip_projection`.
        optimizers: the Megatron optimizers, including those without a shard on this rank.
        layer_wise: those in which each rank updates some parameters whole.
    """

    entries: list[tuple[ParamShard, torch.Tensor | None]]
    lrs: dict[int, float]
    clip: tuple[float, float]
    optimizers: list[Any]
    layer_wise: list[Any] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def capture(cls, optimizer: Any, lrs: dict[int, float], grad_norm: float | None) -> InnerStep:
        """Reads the optimizer right after its step, before its gradients are overwritten.

        Args:
            optimizer: Megatron's optimizer.
            lrs: `learning_rates(optimizer)` from before the step.
            grad_norm: global norm before clipping, as the trainer reports it.
        """
        leaves = all_leaves(optimizer)
        clip = derivatives.clip_projection(float(grad_norm or 0.0), leaves[0].config.clip_grad)
        entries = [
            (s, s.stepped_grad().clone() if clip[1] or rule_of(s).needs_gradient else None)
            for s in shards(optimizer)
        ]
        return cls(entries, lrs, clip, leaves, layer_wise_leaves(optimizer))

    @torch.no_grad()
    def pull_back(self, model: list[Any], device: torch.device) -> None:
        """Replaces h in the gradient buffers with v, completes v on every rank, and drops the step.

        Args:
            model: the DDP-wrapped chunks whose `main_grad` hold h, reduced over data parallelism
                (with the distributed optimizer: this rank's shard of it).
            device: the parameters' device; a rank without parameters takes part in the sums.
        """
        a, b = self.clip
        dot = self._dot_with_clipped_gradient(device) if b else 0.0
        by_parameter: dict[int, list[tuple[ParamShard, torch.Tensor | None]]] = {}
        for entry in self.entries:
            by_parameter.setdefault(id(entry[0].model_param), []).append(entry)
        self.entries = []

        def apply(parameter: torch.nn.Parameter) -> None:
            mine = by_parameter.pop(id(parameter), ())
            if not mine and self.layer_wise:
                parameter.main_grad.zero_()
            for shard, clipped in mine:
                h, rule = shard.grad_slice(), rule_of(shard)
                h.copy_(rule.pull_back(shard, self.lrs[id(shard.group)], clipped, h))
                if clipped is not None and rule.needs_gradient:
                    # The batch has no gradient there (a token that it does not contain), so none of
                    # its samples with a weight above 0 has one: <v, g_i> is the same. Adam's dU/dG
                    # can be lr / eps there, which would leave a finite difference along v nothing
                    # for all other parameters.
                    h.masked_fill_(clipped == 0, 0.0)
                if a != 1.0:
                    h.mul_(a)
                if b and clipped is not None:
                    h.add_(clipped.to(h.dtype), alpha=-b * dot)

        _transform(model, apply, bool(self.layer_wise))

    def _dot_with_clipped_gradient(self, device: torch.device) -> float:
        """Returns `<G', D h>` over the whole model, each parameter once."""
        terms: dict[int, list[torch.Tensor]] = {id(o): [] for o in self.optimizers}
        for shard, clipped in self.entries:
            if shard.counts_in_norm() and clipped is not None:
                lr, h = self.lrs[id(shard.group)], shard.grad_slice()
                pulled = rule_of(shard).pull_back(shard, lr, clipped, h)
                term = (pulled * clipped).sum().double()
                terms[id(shard.optimizer)].append(term)
        total = 0.0
        for optimizer in self.optimizers:
            mine = terms[id(optimizer)]
            local = torch.stack(mine).sum() if mine else torch.zeros((), dtype=torch.float64)
            group = grad_stats_group(optimizer, self.layer_wise)
            total += collectives.sum_of_shards(local.to(device), group).item()
        return total


@torch.no_grad()
def pull_back_before_step(optimizer: Any, lrs: dict[int, float], model: list[Any]) -> None:
    """Replaces h, taken before the step, with v, using the Jacobian expected for the step.

    The gradient of the coming step is not known yet. Adam's Jacobian uses the current second moment
    (a frozen preconditioner, as in OPUS, ICML 2026); SGD's does not depend on the gradient and is
    exact. Clipping is left to the caller, which knows its factor after the step; its projection is
    not applied.

    Args:
        optimizer: Megatron's optimizer, which must have taken a step before.
        lrs: the coming step's learning rates.
        model: as for `InnerStep.pull_back`.
    """
    by_parameter: dict[int, list[ParamShard]] = {}
    for shard in shards(optimizer):
        by_parameter.setdefault(id(shard.model_param), []).append(shard)
    layer_wise = bool(layer_wise_leaves(optimizer))

    def apply(parameter: torch.nn.Parameter) -> None:
        mine = by_parameter.pop(id(parameter), ())
        if not mine and layer_wise:
            parameter.main_grad.zero_()
        for shard in mine:
            h = shard.grad_slice()
            h.copy_(rule_of(shard).pull_back_ahead(shard, lrs[id(shard.group)], h))

    _transform(model, apply, layer_wise)


@torch.no_grad()
def pull_back_identity(lr: float, model: list[Any]) -> None:
    """Replaces h with `v = -lr h` (`--dwm-jacobian identity`): treats any optimizer as plain SGD.

    It uses one learning rate for all parameters, because an unknown optimizer need not tell which
    group a parameter is in.
    """

    def apply(parameter: torch.nn.Parameter) -> None:
        parameter.main_grad.mul_(-lr)

    _transform(model, apply)


def _transform(model: list[Any], apply: Any, by_owners: bool = False) -> None:
    """Applies a function to each parameter's `main_grad` and completes it on every rank.

    With the distributed optimizer each rank transforms its own shards, which are gathered bucket by
    bucket while the next bucket is processed; at most two buckets' own shards are held for this.

    Args:
        model: DDP-wrapped chunks.
        apply: what to do with a parameter.
        by_owners: whether only one rank holds each parameter's result, and the others hold 0.
    """
    handle = None
    for chunk in model:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets:
                for parameter in bucket.params_list:
                    apply(parameter)
                if handle is not None:
                    handle.wait()
                    handle = None
                if buffer.ddp_config.use_distributed_optimizer:
                    group = buffer.data_parallel_group
                    handle = collectives.gather_shards(bucket.grad_data, group)
                elif by_owners:
                    collectives.sum_of_owners(bucket.grad_data, buffer.data_parallel_group)
    if handle is not None:
        handle.wait()


def trainable_parameters(model: list[Any]) -> list[torch.nn.Parameter]:
    """Returns the parameters of the DDP-wrapped chunks that have a gradient buffer."""
    return [p for chunk in model for p in chunk.parameters() if hasattr(p, "main_grad")]
