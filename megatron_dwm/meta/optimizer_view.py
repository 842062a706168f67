"""Reads Megatron's optimizers: which rank steps which slice of which parameter, and with what.

A `ParamShard` pairs a slice of a model parameter (and of its `main_grad`) with the tensor that
the inner optimizer steps and with that tensor's state. It hides the difference between the fp32,
the mixed-precision and the distributed optimizer, and Transformer Engine's precision-aware Adam.

The last one (`--use-precision-aware-optimizer`) keeps the fp32 weights itself, reads the gradient
from `decoupled_grad` and stores the moments in few bits. What is read of it follows its source
(transformer_engine/pytorch/optimizers/fused_adam.py) and Megatron's use of it; it was tested with
a stand-in only and was never run with Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_dwm.errors import DWMError
from megatron_dwm.meta import jacobian


@dataclass
class ParamShard:
    """The slice of one model parameter that this rank's optimizer steps.

    Attributes:
        model_param: the parameter of the model, any shape.
        start: first element of the slice in the flattened parameter.
        end: one past its last element.
        main_param: what the inner optimizer steps, `end - start` elements: fp32, or the slice of
            the model parameter itself where the inner optimizer keeps the fp32 weights.
        group: the inner optimizer's parameter group.
        state: the inner optimizer's state of `main_param`.
        optimizer: the Megatron optimizer that it belongs to.
    """

    model_param: torch.nn.Parameter
    start: int
    end: int
    main_param: torch.Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    optimizer: Any

    def grad_slice(self) -> torch.Tensor:
        """Returns the flat view of this slice in the model parameter's `main_grad`."""
        return self.model_param.main_grad.view(-1)[self.start : self.end]

    def stepped_grad(self) -> torch.Tensor:
        """Returns the flat (clipped, unscaled) gradient of the last optimizer step, float32.

        It may be a view: of `main_grad` where the optimizer reads its gradient from there.
        """
        name = "decoupled_grad" if _keeps_weights(self.optimizer) else "grad"
        grad = getattr(self.main_param, name, None)
        if grad is None:
            return torch.zeros(self.end - self.start, device=self.main_param.device)
        return grad.detach().view(-1).float()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns Adam's first and second moment after the last step, flat, float32."""
        if self.optimizer.config.use_precision_aware_optimizer:
            # Stored in few bits, with a scale for each tensor that the optimizer keeps apart.
            read = self.optimizer.optimizer.get_unscaled_state
            first, second = (read(self.main_param, name) for name in ("exp_avg", "exp_avg_sq"))
        else:
            first, second = self.state["exp_avg"], self.state["exp_avg_sq"]
        return first.view(-1).float(), second.view(-1).float()

    def steps(self) -> int:
        """Returns how many steps the moments are of, 0 before the first."""
        # torch counts with each parameter, Transformer Engine and Apex with the group.
        return int(self.state["step"] if "step" in self.state else self.group.get("step", 0))

    def counts_in_norm(self) -> bool:
        """Returns whether this slice counts in global dot products on this rank.

        False for tied copies and for tensor-parallel replicas on all ranks but the first, by
        Megatron's own rules for the gradient norm.
        """
        # Experts may have a tensor-parallel group of their own.
        return param_is_not_shared(self.main_param) and param_is_not_tensor_parallel_duplicate(
            self.main_param,
            tp_group=getattr(self.optimizer, "tp_group", None),
            expert_tp_group=getattr(self.optimizer, "expert_tp_group", None),
        )


def leaf_optimizers(optimizer: Any) -> list[Any]:
    """Returns the Megatron optimizers inside a (possibly chained) optimizer, stubs left out."""
    leaves = all_leaves(optimizer)
    return [leaf for leaf in leaves if not getattr(leaf, "is_stub_optimizer", False)]


def all_leaves(optimizer: Any) -> list[Any]:
    """Returns the Megatron optimizers inside a chained one, those without parameters too.

    For collectives: every rank of an optimizer's group must take part, with or without a share.
    """
    if hasattr(optimizer, "chained_optimizers"):
        return [leaf for o in optimizer.chained_optimizers for leaf in all_leaves(o)]
    return [optimizer]


def check_supported(optimizer: Any, kind: str) -> None:
    """Refuses optimizers whose Jacobian is not known.

    Args:
        optimizer: the Megatron optimizer that the trainer built.
        kind: `--dwm-jacobian`; `identity` needs nothing of the optimizer.

    Raises:
        DWMError: names the optimizer or the flag, and the way out.
    """
    for leaf in leaf_optimizers(optimizer):
        if leaf.config.fp16:
            raise DWMError("--fp16 is not supported with a learned --dwm-policy; use --bf16")
        problem = None if kind == "identity" else _why_unknown(leaf)
        if problem:
            raise DWMError(
                f"{problem}; use --dwm-jacobian identity (the optimizer taken for plain SGD) or "
                "--dwm-policy uniform"
            )


def _why_unknown(leaf: Any) -> str | None:
    """Returns why the Jacobian of a Megatron optimizer is not known, None where it is."""
    config = leaf.config
    if config.optimizer not in ("adam", "sgd"):
        return (
            f"--optimizer {config.optimizer}: its Jacobian is not known to the meta-gradient, only "
            "those of adam and sgd are"
        )
    if config.optimizer_cpu_offload:
        return (
            "--optimizer-cpu-offload keeps gradients and states where the meta-gradient cannot "
            "read them"
        )
    if config.use_precision_aware_optimizer:
        return _why_not_readable(leaf)
    known = hasattr(leaf, "fp32_from_float16_groups") or _is_distributed(leaf)
    if not known and type(leaf).__name__ != "FP32Optimizer":
        return f"Megatron optimizer {type(leaf).__name__}: its states are not known"
    return None


def _why_not_readable(leaf: Any) -> str | None:
    """Returns why a precision-aware optimizer is not supported, None where it is."""
    config = leaf.config
    if not (_is_distributed(leaf) and hasattr(leaf.optimizer, "get_unscaled_state")):
        return (
            f"--use-precision-aware-optimizer: {type(leaf.optimizer).__name__} does not hand out "
            "its moments as Transformer Engine's FusedAdam does"
        )
    if not config.decoupled_weight_decay:
        # The weights, which then are part of the gradient, may lie there in 16-bit remainders.
        return (
            "--use-precision-aware-optimizer with decoupled_weight_decay=False: the weights that "
            "decay the gradient cannot be read"
        )
    return None


def _is_distributed(leaf: Any) -> bool:
    return hasattr(leaf, "shard_fp32_from_float16_groups")


def _keeps_weights(leaf: Any) -> bool:
    """Returns whether the inner optimizer keeps the fp32 weights and reads `decoupled_grad`."""
    return bool(leaf.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def shards(optimizer: Any) -> Iterator[ParamShard]:
    """Yields every slice that this rank steps.

    Args:
        optimizer: the Megatron optimizer that the trainer built.
    """
    for leaf in leaf_optimizers(optimizer):
        owners = _owners(leaf)
        inner = leaf.optimizer
        for group in inner.param_groups:
            for main_param in group["params"]:
                model_param, start, end = owners[id(main_param)]
                yield ParamShard(
                    model_param, start, end, main_param, group, inner.state[main_param], leaf
                )


def _owners(leaf: Any) -> dict[int, tuple[torch.nn.Parameter, int, int]]:
    """Maps the id of each stepped tensor to (model parameter, first, end element)."""
    owners: dict[int, tuple[torch.nn.Parameter, int, int]] = {}
    if _is_distributed(leaf):
        main_float16 = (
            leaf.shard_float16_groups
            if _keeps_weights(leaf)
            else leaf.shard_fp32_from_float16_groups
        )
        for model_groups, main_groups in (
            (leaf.model_float16_groups, main_float16),
            (leaf.model_fp32_groups, leaf.shard_fp32_groups),
        ):
            for models, mains in zip(model_groups, main_groups, strict=True):
                for model_param, main in zip(models, mains, strict=True):
                    span = leaf._get_model_param_range_map(model_param)["param"]
                    owners[id(main)] = (model_param, span.start, span.end)
        return owners
    if hasattr(leaf, "fp32_from_float16_groups"):
        for models, mains in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True):
            for model_param, main in zip(models, mains, strict=True):
                owners[id(main)] = (model_param, 0, model_param.numel())
        for models in leaf.fp32_from_fp32_groups:
            for model_param in models:
                owners[id(model_param)] = (model_param, 0, model_param.numel())
        return owners
    for group in leaf.optimizer.param_groups:
        for param in group["params"]:
            owners[id(param)] = (param, 0, param.numel())
    return owners


def learning_rates(optimizer: Any) -> dict[int, float]:
    """Returns the learning rate of each parameter group, by the id of the group.

    To be read before the step: the trainer's scheduler moves on to the next rate after it.
    """
    return {
        id(group): float(group["lr"])
        for leaf in leaf_optimizers(optimizer)
        for group in leaf.optimizer.param_groups
    }


def needs_gradient(shard: ParamShard) -> bool:
    """Returns whether the Jacobian of this slice's update depends on the gradient."""
    return bool(shard.optimizer.config.optimizer == "adam")


def update_jacobian(
    shard: ParamShard, lr: float, grad: torch.Tensor | None
) -> torch.Tensor | float:
    """Returns the diagonal `dU/dG'` of a slice, after the step and before the next one.

    Args:
        shard: the slice.
        lr: the learning rate that the step used.
        grad: `[end - start]`, the (clipped) gradient that it was stepped with; unused for SGD.

    Returns:
        `[end - start]` float32 for Adam, a number for SGD.
    """
    group = shard.group
    if shard.optimizer.config.optimizer == "sgd":
        return _sgd_jacobian(group, lr)
    assert grad is not None
    beta1, beta2 = group["betas"]
    constants = (lr, beta1, beta2, group["eps"])
    config = shard.optimizer.config
    exp_avg, exp_avg_sq = shard.moments()
    if config.use_precision_aware_optimizer:
        # What fp8 stored as 0 was not 0 in the step: it used at least this much.
        exp_avg_sq = torch.maximum(exp_avg_sq, (1.0 - beta2) * grad.square())
    moments = (exp_avg, exp_avg_sq, shard.steps())
    if not config.decoupled_weight_decay and group["weight_decay"]:
        # The decay that entered the moments was that of the parameter before the step.
        update = jacobian.adam_update(*moments, *constants)
        before = shard.main_param.detach().view(-1).float() - update
        grad = grad + group["weight_decay"] * before
    return jacobian.adam(grad, *moments, *constants)


def expected_jacobian(shard: ParamShard, lr: float) -> torch.Tensor | float:
    """Returns the diagonal that the coming step is expected to have (`jacobian.adam_expected`).

    With the second moment in fp8 (`--exp-avg-sq-dtype fp8`) also 0 where it was stored as 0.

    Args:
        shard: the slice, after at least one step.
        lr: the learning rate of the coming step.
    """
    group = shard.group
    if shard.optimizer.config.optimizer == "sgd":
        return _sgd_jacobian(group, lr)
    beta1, beta2 = group["betas"]
    _, exp_avg_sq = shard.moments()
    return jacobian.adam_expected(exp_avg_sq, shard.steps(), lr, beta1, beta2, group["eps"])


def _sgd_jacobian(group: dict[str, Any], lr: float) -> float:
    momentum, dampening = group.get("momentum", 0.0), group.get("dampening", 0.0)
    return jacobian.sgd(lr, momentum, dampening, group.get("nesterov", False))


def has_stepped(optimizer: Any) -> bool:
    """Returns whether the optimizer has the moments of an earlier step on this rank."""
    return all(
        shard.optimizer.config.optimizer == "sgd" or shard.steps() > 0
        for shard in shards(optimizer)
    )
