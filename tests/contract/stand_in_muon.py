"""A stand-in for the parts of emerging-optimizers that Megatron's Muon is built on, in plain torch.

With it in place Megatron's own `TensorParallelMuon` is built: its split of fused queries, keys and
values, its scale, its momentum. What is stood in for follows the package's documentation: an
exponential moving average of the gradient, Nesterov's step ahead, and five steps of a quintic
Newton-Schulz iteration on the normalised matrix.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import emerging_optimizers

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class OrthogonalizedOptimizer(torch.optim.Optimizer):
    """Momentum, orthogonalised: `w <- (1 - lr wd) w - lr O(u)`."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        *,
        nesterov: bool,
        weight_decay: float,
        weight_decay_method: str,
        fp32_matmul_prec: str,
        scaled_orthogonalize_fn: Any,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.nesterov, self.weight_decay_method = nesterov, weight_decay_method
        self.fp32_matmul_prec = fp32_matmul_prec
        self.scaled_orthogonalize_fn = scaled_orthogonalize_fn

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for p in group["params"]:
            if (p.grad is not None or not skip_non_grad_params) and not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self._init_group(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - group["momentum"])
                u = p.grad.lerp(average, group["momentum"]) if self.nesterov else average
                rest = {k: v for k, v in group.items() if k != "params"}
                p.add_(self.orthogonalize(p, u, **rest), alpha=-group["lr"])


def newton_schulz_tp(
    x: torch.Tensor,
    steps: int,
    coefficient_type: str,
    tp_group: Any,
    partition_dim: int | None = None,
    tp_mode: str = "duplicated",
) -> torch.Tensor:
    """`X <- a X + b (X X^T) X + c (X X^T)^2 X`, from `x / |x|`, on the shorter side."""
    assert partition_dim is None
    wide = x.size(0) <= x.size(1)
    y = x if wide else x.mT
    y = torch.nn.functional.normalize(y, dim=(0, 1), eps=1e-15)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y if wide else y.mT


def get_muon_scale_factor(size_out: int, size_in: int, mode: str = "spectral") -> float:
    assert mode == "spectral"
    return max(size_out, size_in) ** 0.5


def _package() -> dict[str, types.ModuleType]:
    contents: dict[str, dict[str, Any]] = {
        "": {},
        ".registry": {"get_optimizer_name_list": list, "get_optimizer_cls": None},
        ".orthogonalized_optimizers": {
            "AdaptiveMuon": object,
            "OrthogonalizedOptimizer": OrthogonalizedOptimizer,
            "get_muon_scale_factor": get_muon_scale_factor,
        },
        ".orthogonalized_optimizers.muon_utils": {
            "NSCoeffT": Literal["quintic"],
            "newton_schulz_tp": newton_schulz_tp,
        },
        ".scalar_optimizers": {"Lion": None},
        ".soap": {"SOAP": None},
    }
    modules = {}
    for name, names in contents.items():
        module = types.ModuleType(f"emerging_optimizers{name}")
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(names)
        modules[module.__name__] = module
    modules["emerging_optimizers"].registry = modules["emerging_optimizers.registry"]  # type: ignore[attr-defined]
    return modules


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within it, `get_megatron_optimizer` builds Muon."""
    name = "megatron.core.optimizer.emerging_optimizers_with_stand_in"
    spec = importlib.util.spec_from_file_location(name, emerging_optimizers.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    given = _package()
    sys.modules.update(given)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in given:
            del sys.modules[name]
    assert module.HAVE_EMERGING_OPTIMIZERS
    changes = {
        "HAVE_EMERGING_OPTIMIZERS": True,
        "_EMERGING_OPTIMIZERS": module._EMERGING_OPTIMIZERS,
        "_create_emerging_optimizer": module._create_emerging_optimizer,
    }
    kept = {name: getattr(megatron_optimizer, name) for name in changes}
    for name, value in changes.items():
        setattr(megatron_optimizer, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(megatron_optimizer, name, value)
