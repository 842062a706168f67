"""`OptimizerRule`: how an optimizer's step is pulled back, and which optimizers have a rule.

A rule turns the gradient h of the meta loss in the parameters into `(dU/dG)^T h`, where U is the
step as a function of the gradient G. It takes and returns whole slices: the Jacobian need not be
diagonal. Clipping by the global norm is not part of a rule: see `pull_back`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megatron_dwm.core.optimizers import (
    ParamShard,
    is_distributed,
    layer_wise_leaves,
    leaf_optimizers,
    shards,
)
from megatron_dwm.errors import DWMError
from megatron_dwm.meta_gradient.optimizers.adam import AdamRule
from megatron_dwm.meta_gradient.optimizers.muon import MuonRule
from megatron_dwm.meta_gradient.optimizers.sgd import SGDRule


class OptimizerRule(Protocol):
    """What the meta-gradient has to know about an optimizer.

    Attributes:
        needs_gradient: whether the Jacobian depends on the gradient of the step.
    """

    needs_gradient: bool

    def refusal(self, leaf: Any) -> str | None:
        """Returns why a Megatron optimizer of this kind cannot be read; None if it can."""
        ...

    def has_stepped(self, shard: ParamShard) -> bool:
        """Returns whether the state that `pull_back_ahead` needs exists."""
        ...

    def pull_back(
        self, shard: ParamShard, lr: float, grad: torch.Tensor | None, h: torch.Tensor
    ) -> torch.Tensor:
        """Returns `(dU/dG')^T h` of a slice, after the step and before the next one.

        Args:
            shard: the slice.
            lr: the learning rate that the step used.
            grad: `[k]` float32, the (clipped) gradient G' of the step; None if the rule does not
                need it.
            h: `[k]`, not modified.
        """
        ...

    def pull_back_ahead(self, shard: ParamShard, lr: float, h: torch.Tensor) -> torch.Tensor:
        """Returns what `pull_back` is expected to give for the coming step.

        Args:
            shard: the slice, after at least one step.
            lr: the learning rate of the coming step.
            h: `[k]`, not modified.
        """
        ...


_RULES: dict[str, OptimizerRule] = {"adam": AdamRule(), "sgd": SGDRule(), "muon": MuonRule()}


def register(name: str, rule: OptimizerRule) -> None:
    """Adds the rule of an optimizer; replaces an existing rule.

    To be called before training starts, for example in the module with your own policy.

    Args:
        name: name of the optimizer in `--optimizer`.
        rule: how its step is pulled back.
    """
    _RULES[name] = rule


def rule_of(shard: ParamShard) -> OptimizerRule:
    """Returns the rule of the optimizer that updates a slice."""
    return _RULES[_name(shard.optimizer, shard.group)]


def _name(leaf: Any, group: dict[str, Any]) -> str:
    """Returns the optimizer of a parameter group, by its name in `--optimizer`.

    With Muon, parameters that are not matrices have another optimizer: their group says so, while
    the settings are those of the whole.
    """
    return str(group.get("optimizer", leaf.config.optimizer))


def has_stepped(optimizer: Any) -> bool:
    """Returns whether the optimizer has the state of an earlier step on this rank."""

    def stepped(shard: ParamShard) -> bool:
        rule = _RULES.get(_name(shard.optimizer, shard.group))
        return shard.steps() > 0 if rule is None else rule.has_stepped(shard)

    return all(map(stepped, shards(optimizer)))


def check_supported(optimizer: Any, kind: str) -> None:
    """Refuses optimizers whose Jacobian is not known.

    Args:
        optimizer: the Megatron optimizer that the trainer built.
        kind: `--dwm-jacobian`; `identity` needs nothing from the optimizer.

    Raises:
        DWMError: names the optimizer or the flag, and what to do.
    """
    for leaf in layer_wise_leaves(optimizer):
        if not hasattr(leaf, "config"):
            raise DWMError(
                "--optimizer muon with whole parameters distributed over ranks is supported in "
                "bf16 only; use --bf16, or leave out --use-distributed-optimizer"
            )
    for leaf in leaf_optimizers(optimizer):
        if leaf.config.fp16:
            raise DWMError("--fp16 is not supported with a learned --dwm-policy; use --bf16")
        problem = None if kind == "identity" else _why_unknown(leaf)
        if problem:
            raise DWMError(f"{problem}; {_WAY_OUT}")


_WAY_OUT = "use --dwm-jacobian identity (treats it as plain SGD) or --dwm-policy uniform"


def refused_settings(settings: Any, kind: str) -> str | None:
    """Returns the error of `check_supported` that depends on settings alone, or None.

    Args:
        settings: object with `optimizer` and `optimizer_cpu_offload`, like Megatron's arguments.
        kind: `--dwm-jacobian`.
    """
    problem = None if kind == "identity" else _why_settings([settings.optimizer], settings)
    return None if problem is None else f"{problem}; {_WAY_OUT}"


def needs_gradient(name: str) -> bool:
    """Returns whether the Jacobian of `--optimizer name` needs the step's gradient."""
    return name not in _RULES or _RULES[name].needs_gradient


def _why_settings(names: list[str], config: Any) -> str | None:
    for name in names:
        if name not in _RULES:
            *some, last = sorted(_RULES)
            return (
                f"--optimizer {name}: its Jacobian is not known to the meta-gradient, only those "
                f"of {', '.join(some)} and {last} are"
            )
    if config.optimizer_cpu_offload:
        return (
            "--optimizer-cpu-offload keeps gradients and states where the meta-gradient cannot "
            "read them"
        )
    return None


def _why_unknown(leaf: Any) -> str | None:
    """Returns why the Jacobian of a Megatron optimizer is not known; None if it is."""
    config = leaf.config
    groups = getattr(leaf.optimizer, "param_groups", ())
    names = sorted({_name(leaf, group) for group in groups} or {config.optimizer})
    problem = _why_settings(names, config)
    if problem is not None:
        return problem
    for name in names:
        problem = _RULES[name].refusal(leaf)
        if problem is not None:
            return problem
    if config.use_precision_aware_optimizer:
        return None
    if hasattr(leaf, "fp32_from_float16_groups") or is_distributed(leaf):
        return None
    if type(leaf).__name__ != "FP32Optimizer":
        return f"Megatron optimizer {type(leaf).__name__}: its states are not known"
    return None
