"""Llama and the families that add to it: Qwen2 (biases), Qwen3 (head norms), Mixtral (experts)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, override

from megatron_dwm.conversion.families import rope
from megatron_dwm.conversion.families.base import Family
from megatron_dwm.conversion.layouts import GATE_UP, qkv_transform
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.tensor_rules import Rule

_NO_EXPERTS = {"num_experts": (None, 0)}
# Values with different defaults by family must be in config.json.
_NO_DEFAULTS = ("num_key_value_heads", "max_position_embeddings")


class Llama(Family):
    """Dense Llama: RMSNorm, RoPE, SwiGLU, no biases, grouped-query attention."""

    name = "llama"
    label = "dense Llama"
    architecture = "LlamaForCausalLM"
    base_prefix = "model."
    required: Mapping[str, tuple[Any, ...]] = {
        "normalization": ("RMSNorm",),
        "position_embedding_type": ("rope",),
        "swiglu": (True,),
        "add_bias_linear": (False,),
    }
    unused: Mapping[str, tuple[Any, ...]] = {
        "add_qkv_bias": (False,),
        "qk_layernorm": (False,),
        "rotary_percent": (1.0,),
        **_NO_EXPERTS,
    }
    config_fits: Mapping[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0, None),
    }
    config_needs: tuple[str, ...] = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
    )
    ignored = ("rotary_emb.inv_freq",)
    default_theta = 10000.0
    default_epsilon = 1e-6
    # Whether transformers' configuration of the family has layer types.
    knows_layer_types = False
    # Keys of config.json that only this family has.
    own_config: Mapping[str, Any] = {"attention_bias": False, "mlp_bias": False}

    @override
    def own_values_from_args(
        self, args: Any, rope_scaling_factor: float | None
    ) -> tuple[dict[str, Any], list[str]]:
        scaling, issues = rope.scaling_from_args(args, rope_scaling_factor)
        base = float(getattr(args, "rotary_base", self.default_theta))
        dropout = float(getattr(args, "attention_dropout", 0.0))
        values = {"rotary_base": base, "rope_scaling": scaling, "attention_dropout": dropout}
        return values, issues

    @override
    def own_args(self, shape: ModelShape) -> tuple[dict[str, Any], list[str]]:
        return rope.args_of(shape.rotary_base, shape.rope_scaling)

    @override
    def own_config_issues(self, config: Mapping[str, Any]) -> list[str]:
        given = {"rope_theta": self.default_theta, **config}
        issues = rope.config_issues(given, self.knows_layer_types)
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        if not config.get("head_dim") and hidden % heads:
            issues.append(f"hidden_size {hidden} is not a multiple of the {heads} heads")
        groups = config.get("num_key_value_heads") or heads
        if heads % groups:
            issues.append(f"the {heads} heads do not divide into the groups, of which are {groups}")
        return issues

    @override
    def own_values_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        base, scaling = rope.from_config({"rope_theta": self.default_theta, **config})
        heads = config["num_attention_heads"]
        return {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "ffn_hidden_size": config["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": config.get("num_key_value_heads") or heads,
            "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "layernorm_epsilon": config.get("rms_norm_eps", self.default_epsilon),
            "rotary_base": base,
            "rope_scaling": scaling,
            "tied": config.get("tie_word_embeddings", False),
            "attention_dropout": float(config.get("attention_dropout") or 0.0),
        }

    @override
    def to_config(self, shape: ModelShape) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.ffn_hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_query_groups,
            "head_dim": shape.kv_channels,
            "hidden_act": "silu",
            "max_position_embeddings": shape.max_position_embeddings,
            "rms_norm_eps": shape.layernorm_epsilon,
            **rope.to_config(shape.rotary_base, shape.rope_scaling),
            **self.own_config,
            "attention_dropout": shape.attention_dropout,
            "tie_word_embeddings": shape.tied,
            "use_cache": True,
        }

    # ------------------------------------------------------------- tensors

    @override
    def layer_prefix(self, number: int) -> str:
        return f"model.layers.{number}."

    @override
    def first_rules(self, shape: ModelShape) -> list[Rule]:
        vocabulary = (shape.vocab_size, shape.hidden_size)
        names = "embedding.word_embeddings.weight", ("model.embed_tokens.weight",)
        return [Rule(*names, vocabulary, kind="vocab")]

    @override
    def last_rules(self, shape: ModelShape) -> list[Rule]:
        vocabulary = (shape.vocab_size, shape.hidden_size)
        norm = "decoder.final_layernorm.weight", ("model.norm.weight",)
        rules = [Rule(*norm, (shape.hidden_size,), kind="norm")]
        if not shape.tied:
            names = "output_layer.weight", ("lm_head.weight",)
            rules.append(Rule(*names, vocabulary, kind="vocab"))
        return rules

    @override
    def layer_rules(self, shape: ModelShape) -> list[Rule]:
        return [*self.attention_rules(shape), *self.mlp_rules(shape)]

    def attention_rules(self, shape: ModelShape) -> list[Rule]:
        """Returns the norm before the attention and the attention."""
        h, d = shape.hidden_size, shape.kv_channels
        heads, groups = shape.num_attention_heads, shape.num_query_groups
        parts = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
        return [
            Rule("input_layernorm.weight", ("input_layernorm.weight",), (h,), kind="norm"),
            Rule(
                "self_attention.linear_qkv.weight",
                parts,
                ((heads + 2 * groups) * d, h),
                qkv_transform(heads, groups, d),
            ),
            Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), (h, heads * d)),
        ]

    def mlp_rules(self, shape: ModelShape) -> list[Rule]:
        """Returns the norm before the MLP and the MLP."""
        h, f = shape.hidden_size, shape.ffn_hidden_size
        norm = "pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)
        gate_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
        return [
            Rule(*norm, (h,), kind="norm"),
            Rule("mlp.linear_fc1.weight", gate_up, (2 * f, h), GATE_UP),
            Rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), (h, f)),
        ]


class Qwen2(Llama):
    """Llama with biases on query, key and value."""

    name = "qwen2"
    label = "dense Qwen2"
    architecture = "Qwen2ForCausalLM"
    knows_layer_types = True
    required = {**Llama.required, "add_qkv_bias": (True,)}
    unused = {"qk_layernorm": (False,), "rotary_percent": (1.0,), **_NO_EXPERTS}
    config_fits = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (1.0, None),
    }
    config_needs = (*Llama.config_needs, *_NO_DEFAULTS)
    own_config = {"use_sliding_window": False}

    @override
    def attention_rules(self, shape: ModelShape) -> list[Rule]:
        d, heads, groups = shape.kv_channels, shape.num_attention_heads, shape.num_query_groups
        bias = Rule(
            "self_attention.linear_qkv.bias",
            tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
            ((heads + 2 * groups) * d,),
            qkv_transform(heads, groups, d),
        )
        return [*super().attention_rules(shape), bias]


class Qwen3(Llama):
    """Llama with a norm on every query and key head."""

    name = "qwen3"
    label = "dense Qwen3"
    architecture = "Qwen3ForCausalLM"
    knows_layer_types = True
    required = {**Llama.required, "qk_layernorm": (True,)}
    unused = {"add_qkv_bias": (False,), "rotary_percent": (1.0,), **_NO_EXPERTS}
    config_fits = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (1.0, None),
    }
    config_needs = (*Llama.config_needs, *_NO_DEFAULTS, "head_dim")
    own_config = {"attention_bias": False, "use_sliding_window": False}

    @override
    def attention_rules(self, shape: ModelShape) -> list[Rule]:
        norms = [
            Rule(
                f"self_attention.{part}_layernorm.weight",
                (f"self_attn.{part}_norm.weight",),
                (shape.kv_channels,),
                kind="norm",
            )
            for part in "qk"
        ]
        return [*super().attention_rules(shape), *norms]


class Mixtral(Llama):
    """Llama whose MLPs are SwiGLU experts behind a router.

    Mixtral's router takes the softmax over the chosen experts' logits, as Megatron does without
    `--moe-router-pre-softmax`.
    """

    name = "mixtral"
    label = "Mixtral"
    architecture = "MixtralForCausalLM"
    own_numbers = ("num_experts", "moe_router_topk")
    unused = {
        "add_qkv_bias": (False,),
        "qk_layernorm": (False,),
        "rotary_percent": (1.0,),
        "moe_layer_freq": (1,),
        "moe_router_pre_softmax": (False,),
        "moe_router_score_function": ("softmax",),
        "moe_router_enable_expert_bias": (False,),
        "moe_router_topk_scaling_factor": (None, 1.0),
        "moe_router_num_groups": (None,),
        "moe_shared_expert_intermediate_size": (None, 0),
        "moe_apply_probs_on_input": (False,),
        "moe_latent_size": (None, 0),
    }
    config_fits = {
        "hidden_act": ("silu",),
        "sliding_window": (None,),
        "partial_rotary_factor": (1.0, None),
    }
    config_needs = (
        *Llama.config_needs,
        *_NO_DEFAULTS,
        "num_local_experts",
        "num_experts_per_tok",
    )
    default_theta = 1000000.0
    default_epsilon = 1e-5
    own_config: Mapping[str, Any] = {"sliding_window": None, "output_router_logits": False}

    @override
    def own_values_from_args(
        self, args: Any, rope_scaling_factor: float | None
    ) -> tuple[dict[str, Any], list[str]]:
        values, issues = super().own_values_from_args(args, rope_scaling_factor)
        width = getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size
        loss = getattr(args, "moe_aux_loss_coeff", 0.0)
        kind = getattr(args, "moe_router_load_balancing_type", "aux_loss")
        experts = {
            "ffn_hidden_size": width,
            "num_experts": args.num_experts,
            "router_topk": args.moe_router_topk,
            "router_aux_loss": loss if kind == "aux_loss" and isinstance(loss, float) else 0.0,
        }
        return {**values, **experts}, issues

    @override
    def own_args(self, shape: ModelShape) -> tuple[dict[str, Any], list[str]]:
        values, issues = super().own_args(shape)
        experts = {
            "num_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.ffn_hidden_size,
            "moe_router_topk": shape.router_topk,
            "moe_router_load_balancing_type": "aux_loss" if shape.router_aux_loss else "none",
            "moe_aux_loss_coeff": shape.router_aux_loss,
        }
        return {**values, **experts}, issues

    @override
    def own_values_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super().own_values_from_config(config),
            "num_experts": config["num_local_experts"],
            "router_topk": config["num_experts_per_tok"],
            "router_aux_loss": float(config.get("router_aux_loss_coef", 0.001)),
        }

    @override
    def to_config(self, shape: ModelShape) -> dict[str, Any]:
        return {
            **super().to_config(shape),
            "num_local_experts": shape.num_experts,
            "num_experts_per_tok": shape.router_topk,
            "router_aux_loss_coef": shape.router_aux_loss,
        }

    @override
    def mlp_rules(self, shape: ModelShape) -> list[Rule]:
        h, f = shape.hidden_size, shape.ffn_hidden_size
        norm, *_ = super().mlp_rules(shape)
        gate = ("block_sparse_moe.gate.weight",)
        rules = [norm, Rule("mlp.router.weight", gate, (shape.num_experts, h))]
        for expert in range(shape.num_experts):
            ours = f"mlp.experts.experts.{expert}."
            theirs = f"block_sparse_moe.experts.{expert}."
            gate_up = (f"{theirs}w1.weight", f"{theirs}w3.weight")
            rules.append(Rule(f"{ours}linear_fc1.weight", gate_up, (2 * f, h), GATE_UP))
            rules.append(Rule(f"{ours}linear_fc2.weight", (f"{theirs}w2.weight",), (h, f)))
        return rules
