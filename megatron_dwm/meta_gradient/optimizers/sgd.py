"""SGD, with or without momentum."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.core.optimizers import ParamShard, refuse_precision_aware
from megatron_dwm.meta_gradient.optimizers import derivatives


class SGDRule:
    """An `OptimizerRule`: a number times h."""

    needs_gradient = False

    def refusal(self, leaf: Any) -> str | None:
        """See `OptimizerRule.refusal`."""
        return refuse_precision_aware(leaf)

    def has_stepped(self, shard: ParamShard) -> bool:
        """See `OptimizerRule.has_stepped`: it needs no state."""
        return True

    def pull_back(
        self, shard: ParamShard, lr: float, grad: torch.Tensor | None, h: torch.Tensor
    ) -> torch.Tensor:
        """See `OptimizerRule.pull_back`."""
        group = shard.group
        momentum, dampening = group.get("momentum", 0.0), group.get("dampening", 0.0)
        # In float32 at least, because gradients may be kept in bf16.
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        return h * derivatives.sgd(lr, momentum, dampening, group.get("nesterov", False))

    def pull_back_ahead(self, shard: ParamShard, lr: float, h: torch.Tensor) -> torch.Tensor:
        """See `OptimizerRule.pull_back_ahead`; exact."""
        return self.pull_back(shard, lr, None, h)
