"""Mixture-of-experts layers, in which tokens leave the order of the samples and return to it.

A router's rows are the tokens in their order; an expert's rows are the tokens that were routed to
it, in their order. The routing map tells which sample a row belongs to; separate hooks read it
while a pass is recorded. The layers themselves are ordinary linear ones.

Experts may be spread over ranks. An expert's rows then come from several replicas: every rank is
told the routing of all ranks that share the experts, knows by it which rows its experts get, and
the terms of other replicas' samples are handed over when the passes are done.

    router    p = route(x W^T)    <v, g_i> = sum_t <d_t, V x_t>,  d = (dp/dlogits)^T dl/dp
    expert    as any linear layer, row by row; the last bias is added times p

Auxiliary losses are not part of the weighted loss. They are added after the routing, so the
gradient of p does not include them. Gradients further down, where they mix with the loss's through
the hidden states, are free of them only in passes that switch them off (`core.contexts`).

Shapes: s tokens, b samples, t = s b, E experts, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_dwm.core import collectives
from megatron_dwm.meta_gradient.ghost.linear import linear_dot
from megatron_dwm.meta_gradient.ghost.rule import ByRow, Call, Direction, Share

# Balancing that chooses experts by the logits of each token alone.
_BALANCING = {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}
# Of those that move tokens between ranks, the ones whose order of an expert's rows is known.
_DISPATCHERS = {"alltoall", "allgather"}
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

SPREAD_TOKENS = "its tokens are split over tensor-parallel ranks, each of which has all experts"
SPREAD_BIASES = "its experts have biases, and tensor-parallel ranks share an expert"


@dataclass(frozen=True)
class Spread:
    """How an MoE layer is distributed over ranks.

    Attributes:
        tp: tensor parallelism of the layers around it.
        etp: that of an expert.
        ep: expert parallelism.
        sequence_parallel: whether tensor-parallel ranks have different tokens.
    """

    tp: int
    etp: int
    ep: int
    sequence_parallel: bool


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
    dispatcher = layer.token_dispatcher
    spread = Spread(
        layer.tp_group.size(), dispatcher.tp_size, dispatcher.ep_size, config.sequence_parallel
    )
    return reason_by_settings(config, spread)


def reason_by_settings(config: Any, spread: Spread) -> str | None:
    """Returns which setting rules it out; None if none does.

    Args:
        config: the LLM's `TransformerConfig`, or an object with its fields.
        spread: how the layer is distributed over ranks.
    """
    if spread.tp > 1 and (not spread.sequence_parallel or spread.etp == spread.ep == 1):
        return SPREAD_TOKENS
    if spread.etp > 1 and config.add_bias_linear:
        return SPREAD_BIASES
    kind = config.moe_token_dispatcher_type
    if spread.etp * spread.ep > 1 and kind not in _DISPATCHERS:
        return f"--moe-token-dispatcher-type {kind}"
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
                yield layer.router.register_forward_hook(self._routed(layer), with_kwargs=True)

    def of(self, module: torch.nn.Module) -> ByRow | None:
        """Returns the rows of a layer; None for a layer whose samples are in their order."""
        return self._of.get(id(module))

    def _tokens(self) -> Callable[..., None]:
        def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            samples = torch.arange(x.size(0) * x.size(1), device=x.device) % x.size(1)
            self._of[id(module)] = ByRow(samples, x.size(1))

        return note

    def _routed(self, layer: MoELayer) -> Callable[..., None]:
        experts, dispatcher = layer.experts, layer.token_dispatcher
        ours = slice(dispatcher.local_expert_indices[0], dispatcher.local_expert_indices[-1] + 1)

        def note(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            tokens = self._of[id(module)]
            probabilities, routing = output[0].detach(), output[1].bool()
            rows = replace(tokens, count=tokens.count * dispatcher.ep_size)
            if dispatcher.tp_size * dispatcher.ep_size > 1:
                routing, probabilities = _of_all_ranks(dispatcher, routing, probabilities)
                rows = replace(rows, samples=_samples_of_all(dispatcher, tokens))
            if dispatcher.ep_size > 1:
                rows = replace(rows, replicas=dispatcher.ep_group)
            # Each expert's tokens in their order, expert by expert: [E, t].
            chosen = routing[:, ours].t()
            samples = rows.samples.expand_as(chosen)[chosen]
            scale = probabilities[:, ours].t()[chosen]
            if type(experts) is TEGroupedMLP:
                self._set(experts, replace(rows, samples=samples), scale)
                return
            sizes = chosen.sum(1).tolist()
            each = zip(experts.local_experts, samples.split(sizes), scale.split(sizes), strict=True)
            for expert, own, own_scale in each:
                self._set(expert, replace(rows, samples=own), own_scale)

        return note

    def _set(self, expert: Any, rows: ByRow, scale: torch.Tensor) -> None:
        """Records the rows of the layers of an expert, or of all experts at once."""
        for layer in expert.modules():
            self._of[id(layer)] = rows
        self._of[id(expert.linear_fc2)] = replace(rows, bias_scale=scale)


def _of_all_ranks(
    dispatcher: Any, routing: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `[ranks t, E]` of all ranks that share the experts, in the order of their tokens."""
    found = collectives.gather_routing(
        torch.stack([routing.to(probabilities.dtype), probabilities]), dispatcher.tp_ep_group
    )
    # [ranks, 2, t, E] -> [2, ranks t, E]
    routing, probabilities = _in_order(dispatcher, found).transpose(0, 1).flatten(1, 2)
    return routing.bool(), probabilities


def _samples_of_all(dispatcher: Any, tokens: ByRow) -> torch.Tensor:
    """Returns `[ranks t]`, the sample of each token: replica by replica, `ep b` in all."""
    replicas = torch.arange(dispatcher.ep_size, device=tokens.samples.device)
    of_replica = tokens.samples + tokens.count * replicas.view(-1, 1, 1)
    # [ep, tp, t], as the ranks of the group are numbered.
    of_rank = of_replica.expand(-1, dispatcher.tp_size, -1)
    return _in_order(dispatcher, of_rank.flatten(0, 1)).flatten()


def _in_order(dispatcher: Any, by_rank: torch.Tensor) -> torch.Tensor:
    """Returns `[ranks, ...]` in the order in which an expert gets the ranks' tokens.

    All-gather: as the ranks are numbered, tensor-parallel ones next to each other. All-to-all
    fetches the tokens over the replicas first, and then over tensor-parallel ranks.
    """
    if not isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
        return by_rank
    return (
        by_rank.unflatten(0, (dispatcher.ep_size, dispatcher.tp_size)).transpose(0, 1).flatten(0, 1)
    )
