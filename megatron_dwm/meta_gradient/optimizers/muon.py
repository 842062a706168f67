"""Muon: the momentum of a weight matrix, orthogonalised by a few Newton-Schulz iterations.

    M' = m M + (1 - m) G;   u = M', with Nesterov (1 - m) G + m M';   U(G) = -lr O(u)

O is the optimizer's own function (`orthogonalize`): the iteration, its coefficients and scale, and
the split of a fused query-key-value matrix. It does not act element by element, so its Jacobian is
applied by differentiating O at u: `v = -lr (du/dG) J_O(u)^T h`. This is exact for the iteration as
implemented, not for the polar factor that it approximates. Rounding is left out: the iteration may
run in bf16 (`--muon-fp32-matmul-prec medium`), but its derivative is taken in float32.

Source: `OrthogonalizedOptimizer.step` of emerging-optimizers and `TensorParallelMuon` of
Megatron-Core, differentiated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_dwm.core.optimizers import ParamShard


class MuonRule:
    """An `OptimizerRule` for whole matrices."""

    needs_gradient = True

    def refusal(self, leaf: Any) -> str | None:
        """See `OptimizerRule.refusal`."""
        inner = leaf.optimizer
        if not hasattr(inner, "orthogonalize"):
            return f"--optimizer muon: {type(inner).__name__} has no method orthogonalize"
        if not hasattr(inner, "nesterov") and any(
            "nesterov" not in group for group in inner.param_groups
        ):
            return f"--optimizer muon: {type(inner).__name__} does not say whether it is Nesterov's"
        groups = getattr(inner, "pg_collection", None)
        split = groups is not None and max(groups.tp.size(), groups.expt_tp.size()) > 1
        if split and inner.tp_mode != "blockwise":
            return (
                f"--muon-tp-mode {inner.tp_mode} orthogonalises over tensor-parallel ranks, which "
                "the derivative does not follow; use blockwise"
            )
        if getattr(inner, "weight_decay_method", "decoupled") == "l2":
            return "--optimizer muon with weight decay in the gradient (l2)"
        return None

    def has_stepped(self, shard: ParamShard) -> bool:
        """See `OptimizerRule.has_stepped`: the momentum exists.

        A momentum of 0, as of an expert that no token has reached, has no direction, see
        `_through`.
        """
        return shard.state.get("momentum_buffer") is not None

    def pull_back(
        self, shard: ParamShard, lr: float, grad: torch.Tensor | None, h: torch.Tensor
    ) -> torch.Tensor:
        """See `OptimizerRule.pull_back`."""
        assert grad is not None
        u, m = shard.state["momentum_buffer"].float(), shard.group["momentum"]
        if _nesterov(shard):
            u = grad.view_as(u).lerp(u, m)
        return self._through(shard, u, h).mul_(-lr * _slope(shard))

    def pull_back_ahead(self, shard: ParamShard, lr: float, h: torch.Tensor) -> torch.Tensor:
        """See `OptimizerRule.pull_back_ahead`; uses the current momentum."""
        u = shard.state["momentum_buffer"].float()
        return self._through(shard, u, h).mul_(-lr * _slope(shard))

    def _through(self, shard: ParamShard, u: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Returns `J_O(u)^T h`, flat; 0 if u is 0, as there is no direction yet."""
        if not u.any():
            return torch.zeros_like(h, dtype=torch.float32)
        inner = shard.optimizer.optimizer
        rest = {name: value for name, value in shard.group.items() if name != "params"}
        with torch.enable_grad(), _in_float32():
            point = u.detach().requires_grad_()
            out = inner.orthogonalize(shard.main_param, point, **rest)
            (found,) = torch.autograd.grad(out, point, h.detach().float().view_as(out))
        return found.reshape(-1)


def _nesterov(shard: ParamShard) -> bool:
    inner = shard.optimizer.optimizer
    return bool(getattr(inner, "nesterov", shard.group.get("nesterov", False)))


def _slope(shard: ParamShard) -> float:
    """Returns `du/dG`."""
    m = float(shard.group["momentum"])
    return (1.0 - m) * (1.0 + m) if _nesterov(shard) else 1.0 - m


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    """A context with the setting under which the iteration does not run in bf16."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)
