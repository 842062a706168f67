"""Mixture-of-experts layers, in which tokens leave the order of the samples and return to it.

A router's rows are the tokens in their order; an expert's rows are the tokens that were routed to
it, in their order. The routing map tells which sample a row belongs to; separate hooks read it
while a pass is recorded. The layers themselves are ordinary linear ones.

    router    p = route(x W^T)    <v, g_i> = sum_t <d_t, V x_t>,  d = (dp/dlogits)^T dl/dp
    expert    as any linear layer, row by row; the last bias is added times p

Auxiliary losses are not part of the weighted loss. They are added after the routing, so the
gradient of p does not include them. Gradients further down, where they mix with the loss's through
the hidden states, are free of them only in passes that switch them off (`core.contexts`).

Shapes: s tokens, b samples, t = s b, E experts, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter

from megatron_dwm.meta_gradient.ghost.linear import linear_dot
from megatron_dwm.meta_gradient.ghost.rule import ByRow, Call, Direction, Share

# Balancing that chooses experts by the logits of each token alone.
_BALANCING = {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}
# Settings under which rows or probabilities differ from what is recomputed here.
_OFF = (
    "moe_input_jitter_eps",
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
    "moe_expert_capacity_factor",
    "moe_apply_probs_on_input",
    "moe_enable_routing_replay",
    "moe_latent_size",
    "moe_shared_expert_gate",
    "moe_router_fusion",
    "moe_single_grouped_weight",
    "moe_single_grouped_bias",
    "fp8",
    "fp4",
)

SPREAD_EXPERTS = "its experts are distributed over ranks"
SPREAD_TOKENS = "its tokens are split over tensor-parallel ranks"


def reason_against(layer: torch.nn.Module) -> str | None:
    """Returns why the samples of a mixture-of-experts layer's rows are unknown; None if known."""
    if type(layer) is not MoELayer:
        return f"a {type(layer).__name__}"
    config = layer.config
    if type(layer.router) is not TopKRouter:
        return f"its router is a {type(layer.router).__name__}"
    if type(layer.experts) not in (SequentialMLP, TEGroupedMLP):
        return f"its experts are a {type(layer.experts).__name__}"
    if type(layer.experts) is TEGroupedMLP and config.use_transformer_engine_op_fuser:
        return "--use-transformer-engine-op-fuser"
    for name in ("ep_group", "tp_group"):
        group = getattr(layer.experts, name, None)
        if group is not None and group.size() > 1:
            return SPREAD_EXPERTS
    if layer.tp_group.size() > 1:
        return SPREAD_TOKENS
    return reason_by_settings(config)


def reason_by_settings(config: Any) -> str | None:
    """Returns which setting rules it out; None if none does.

    Args:
        config: the LLM's `TransformerConfig`, or an object with its fields.
    """
    found = config.moe_router_load_balancing_type
    kinds = set(found if isinstance(found, list) else [found])
    if not kinds <= _BALANCING:
        return f"--moe-router-load-balancing-type {' '.join(sorted(kinds))}"
    for name in _OFF:
        if getattr(config, name, None):
            return f"--{name.replace('_', '-')}"
    return None


def router(call: Call, grad: torch.Tensor, v: Direction, share: Share) -> torch.Tensor:
    """The router's weight and bias `[E, h]`, `[E]`, by the gradient of its probabilities `[t, E]`.

    The routing is recomputed, because its function of the logits has a derivative but no module.
    """
    module, config = call.module, call.module.config
    x = call.x.reshape(-1, call.x.size(-1))
    with torch.enable_grad():
        kind = {"fp32": torch.float32, "fp64": torch.float64}.get(config.moe_router_dtype, x.dtype)
        bias = None if module.bias is None else module.bias.detach().to(kind)
        logits = torch.nn.functional.linear(x.to(kind), call.weight.detach().to(kind), bias)
        logits.requires_grad_()
        probabilities, _ = topk_routing_with_score_function(
            logits,
            module.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=module.score_function,
            expert_bias=module.expert_bias,
            fused=False,
        )
        (of_logits,) = torch.autograd.grad(probabilities, logits, grad.to(probabilities.dtype))
    total = call.samples.none(grad)
    direction = v(call.weight)
    if direction is not None and share(call.weight):
        total = linear_dot(x, of_logits.to(x.dtype), direction, call.samples)
    bias_direction = None if module.bias is None else v(module.bias)
    if bias_direction is not None and share(module.bias):
        total = total + call.samples.dot(of_logits, bias_direction.expand_as(of_logits))
    return total


class Rows:
    """Which sample each row of the experts' layers belongs to, by the last forward's routing."""

    def __init__(self) -> None:
        self._of: dict[int, ByRow] = {}

    def hooks(self, model: torch.nn.Module) -> Iterator[Any]:
        """Registers hooks that read the routing of each layer; yields their handles."""
        for layer in model.modules():
            if isinstance(layer, MoELayer) and reason_against(layer) is None:
                yield layer.router.register_forward_pre_hook(self._tokens(), with_kwargs=True)
                yield layer.router.register_forward_hook(
                    self._routed(layer.experts), with_kwargs=True
                )

    def of(self, module: torch.nn.Module) -> ByRow | None:
        """Returns the rows of a layer; None for a layer whose samples are in their order."""
        return self._of.get(id(module))

    def _tokens(self) -> Callable[..., None]:
        def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            samples = torch.arange(x.size(0) * x.size(1), device=x.device) % x.size(1)
            self._of[id(module)] = ByRow(samples, x.size(1))

        return note

    def _routed(self, experts: Any) -> Callable[..., None]:
        def note(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            tokens = self._of[id(module)]
            # Each expert's tokens in their order, expert by expert: [E, t].
            chosen = output[1].bool().t()
            samples = tokens.samples.expand_as(chosen)[chosen]
            scale = output[0].detach().t()[chosen]
            if type(experts) is TEGroupedMLP:
                self._set(experts, ByRow(samples, tokens.count), scale)
                return
            sizes = chosen.sum(1).tolist()
            each = zip(experts.local_experts, samples.split(sizes), scale.split(sizes), strict=True)
            for expert, own, own_scale in each:
                self._set(expert, ByRow(own, tokens.count), own_scale)

        return note

    def _set(self, expert: Any, rows: ByRow, scale: torch.Tensor) -> None:
        """Records the rows of the layers of an expert, or of all experts at once."""
        for layer in expert.modules():
            self._of[id(layer)] = rows
        self._of[id(expert.linear_fc2)] = replace(rows, bias_scale=scale)
