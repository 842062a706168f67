"""Settings of tiny models, of their `TransformerConfig`, that several contract tests build on."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "num_query_groups": 2,
    "add_bias_linear": False,
}
GPT = {"normalization": "LayerNorm"}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 20,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_token_dispatcher_type": "allgather",
}
SELECTIVE = {"recompute_granularity": "selective"}
