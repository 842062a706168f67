"""Adam and AdamW, including Transformer Engine's precision-aware variant."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.core.optimizers import ParamShard, refuse_precision_aware
from megatron_dwm.meta_gradient.optimizers import derivatives


class AdamRule:
    """An `OptimizerRule`: a diagonal matrix times h."""

    needs_gradient = True

    def refusal(self, leaf: Any) -> str | None:
        """See `OptimizerRule.refusal`."""
        return refuse_precision_aware(leaf)

    def has_stepped(self, shard: ParamShard) -> bool:
        """See `OptimizerRule.has_stepped`: the moments exist."""
        return shard.steps() > 0

    def pull_back(
        self, shard: ParamShard, lr: float, grad: torch.Tensor | None, h: torch.Tensor
    ) -> torch.Tensor:
        """See `OptimizerRule.pull_back`."""
        assert grad is not None
        group, config = shard.group, shard.optimizer.config
        beta1, beta2 = group["betas"]
        constants = (lr, beta1, beta2, group["eps"])
        exp_avg, exp_avg_sq = shard.moments()
        if config.use_precision_aware_optimizer:
            # A value that fp8 stored as 0 was not 0 in the step: it was at least this large.
            exp_avg_sq = torch.maximum(exp_avg_sq, (1.0 - beta2) * grad.square())
        moments = (exp_avg, exp_avg_sq, shard.steps())
        if not config.decoupled_weight_decay and group["weight_decay"]:
            # The decay that entered the moments used the parameter before the step.
            update = derivatives.adam_update(*moments, *constants)
            before = shard.main_param.detach().view(-1).float() - update
            grad = grad + group["weight_decay"] * before
        return derivatives.adam(grad, *moments, *constants).mul_(h)

    def pull_back_ahead(self, shard: ParamShard, lr: float, h: torch.Tensor) -> torch.Tensor:
        """See `OptimizerRule.pull_back_ahead`; uses the current preconditioner.

        If the second moment is in fp8 (`--exp-avg-sq-dtype fp8`), the result is also 0 where it was
        stored as 0.
        """
        group = shard.group
        beta1, beta2 = group["betas"]
        _, exp_avg_sq = shard.moments()
        diagonal = derivatives.adam_expected(
            exp_avg_sq, shard.steps(), lr, beta1, beta2, group["eps"]
        )
        return diagonal.mul_(h)
