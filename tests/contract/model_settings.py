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
SELECTIVE = {"recompute_granularity": "selective"}
