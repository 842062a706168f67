"""Models with Transformer Engine's layers, by name: the settings of their `TransformerConfig`."""

from __future__ import annotations

from tests.contract.model_settings import EXPERTS, GPT, LLAMA, SELECTIVE

MLA = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "multi_latent_attention": True,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
    "apply_rope_fusion": False,
}
GROUPED = {**EXPERTS, "moe_grouped_gemm": True}
OFFSET = {"softmax_type": "learnable"}
FUSER = {"use_transformer_engine_op_fuser": True}
CASES = {
    "llama": {**LLAMA, "qk_layernorm": True, "add_qkv_bias": True},
    "gpt": GPT,
    "zero-centred": {**GPT, "layernorm_zero_centered_gamma": True},
    "mla": {**MLA, "qk_layernorm": True},
    "mla-fused-down": {**MLA, "qk_layernorm": True, "mla_down_proj_fusion": True},
    "mla-residual-norm": {**MLA, "fused_residual_rmsnorm": True},
    "grouped": {**LLAMA, **GROUPED},
    "grouped-bias": {
        **GPT,
        **GROUPED,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_token_dispatcher_type": "alltoall",
    },
    "grouped-recomputed": {
        **LLAMA,
        **GROUPED,
        **SELECTIVE,
        "recompute_modules": ["moe_act"],
    },
    "offset": {**LLAMA, **OFFSET},
    "offset-recomputed": {**GPT, **SELECTIVE, **OFFSET},
    "fuser": {**LLAMA, **FUSER},
    "fuser-bias": {**GPT, **FUSER},
    "fuser-recomputed": {**LLAMA, **FUSER, **SELECTIVE, "recompute_modules": ["mlp"]},
}
REFUSED = {
    "offset-dropout": {**LLAMA, **OFFSET, "attention_dropout": 0.1},
    "grouped-jitter": {**LLAMA, **GROUPED, "moe_input_jitter_eps": 0.1},
}
