"""Reads Megatron's optimizers: which rank updates which slice of which parameter, and with what.

A `ParamShard` pairs a slice of a model parameter (and of its `main_grad`) with the tensor that the
inner optimizer updates and with that tensor's state. It hides the difference between the fp32, the
mixed-precision and the distributed optimizer, and Transformer Engine's precision-aware Adam.

The last one (`--use-precision-aware-optimizer`) keeps the fp32 weights itself, reads the gradient
from `decoupled_grad` and stores the moments in low precision. The code follows its source
(transformer_engine/pytorch/optimizers/fused_adam.py) and Megatron's use of it; it was tested only
with a stand-in, never with Transformer Engine itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared


@dataclass
class ParamShard:
    """The slice of one model parameter that this rank's optimizer updates.

    Attributes:
        model_param: the parameter of the model, any shape.
        start: first element of the slice in the flattened parameter.
        end: one past its last element.
        main_param: what the inner optimizer updates, `end - start` elements: fp32, or the slice of
            the model parameter itself if the inner optimizer keeps the fp32 weights.
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

        It may be a view of `main_grad`, if the optimizer reads its gradient from there.
        """
        name = "decoupled_grad" if _keeps_weights(self.optimizer) else "grad"
        grad = getattr(self.main_param, name, None)
        if grad is None:
            return torch.zeros(self.end - self.start, device=self.main_param.device)
        return grad.detach().view(-1).float()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns Adam's first and second moment after the last step, flat, float32."""
        if self.optimizer.config.use_precision_aware_optimizer:
            # Stored in low precision, with a scale per tensor that the optimizer keeps separately.
            read = self.optimizer.optimizer.get_unscaled_state
            first, second = (read(self.main_param, name) for name in ("exp_avg", "exp_avg_sq"))
        else:
            first, second = self.state["exp_avg"], self.state["exp_avg_sq"]
        return first.view(-1).float(), second.view(-1).float()

    def steps(self) -> int:
        """Returns the number of steps that the moments have seen; 0 before the first."""
        # torch counts per parameter, Transformer Engine and Apex per group.
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
    """Returns the Megatron optimizers inside a (possibly chained) optimizer, without stubs."""
    leaves = all_leaves(optimizer)
    return [leaf for leaf in leaves if not getattr(leaf, "is_stub_optimizer", False)]


def all_leaves(optimizer: Any) -> list[Any]:
    """Returns the Megatron optimizers inside a chained one, including those without parameters.

    For collectives: every rank of an optimizer's group must take part, with or without a shard.
    """
    if hasattr(optimizer, "chained_optimizers"):
        return [leaf for o in optimizer.chained_optimizers for leaf in all_leaves(o)]
    return [optimizer]


def layer_wise_leaves(optimizer: Any) -> list[Any]:
    """Returns the Megatron optimizers in which each data-parallel rank updates whole parameters.

    This is Megatron's layer-wise distributed optimizer (Muon with `--use-distributed-optimizer`),
    which needs whole matrices. Gradients are whole on every rank, or on the one that updates.
    """
    if type(optimizer).__name__ == "LayerWiseDistributedOptimizer":
        return all_leaves(optimizer)
    return [
        leaf for o in getattr(optimizer, "chained_optimizers", ()) for leaf in layer_wise_leaves(o)
    ]


def grad_stats_group(leaf: Any, layer_wise: list[Any]) -> Any:
    """Returns the ranks over which dot products of a leaf's gradients are summed.

    Args:
        leaf: one of `all_leaves`.
        layer_wise: `layer_wise_leaves`; they are distributed over all ranks, like their norm.
    """
    if any(leaf is one for one in layer_wise):
        return torch.distributed.group.WORLD
    return leaf.get_grad_stats_parallel_group()


def is_distributed(leaf: Any) -> bool:
    """Returns whether a Megatron optimizer is the distributed one, which shards over ranks."""
    return hasattr(leaf, "shard_fp32_from_float16_groups")


def _keeps_weights(leaf: Any) -> bool:
    """Returns whether the inner optimizer keeps the fp32 weights and reads `decoupled_grad`."""
    return bool(leaf.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def shards(optimizer: Any) -> Iterator[ParamShard]:
    """Yields every slice that this rank updates.

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
    """Maps the id of each updated tensor to (model parameter, first, end element)."""
    owners: dict[int, tuple[torch.nn.Parameter, int, int]] = {}
    if is_distributed(leaf):
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

    To be read before the step: afterwards the trainer's scheduler sets the next rate.
    """
    return {
        id(group): float(group["lr"])
        for leaf in leaf_optimizers(optimizer)
        for group in leaf.optimizer.param_groups
    }


def refuse_precision_aware(leaf: Any) -> str | None:
    """Returns why a precision-aware optimizer cannot be read; None if it can, or is not one."""
    config = leaf.config
    if not config.use_precision_aware_optimizer:
        return None
    if not (is_distributed(leaf) and hasattr(leaf.optimizer, "get_unscaled_state")):
        return (
            f"--use-precision-aware-optimizer: {type(leaf.optimizer).__name__} does not expose its "
            "moments as Transformer Engine's FusedAdam does"
        )
    if not config.decoupled_weight_decay:
        # The weights, which are then part of the gradient, may be stored there as 16-bit
        # remainders.
        return (
            "--use-precision-aware-optimizer with decoupled_weight_decay=False: the weights that "
            "decay the gradient cannot be read"
        )
    return None
