"""GPT-2: learned positions, LayerNorm, biases everywhere, GELU, weights stored as [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, override

from megatron_dwm.conversion.families.base import Family
from megatron_dwm.conversion.layouts import TRANSPOSED, side_by_side_qkv_transform
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.tensor_rules import Rule
from megatron_dwm.errors import ConversionError

# Megatron computes GELU's tanh approximation when it is fused with the bias (the default), and the
# exact GELU otherwise.
_ACTIVATIONS = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}


class GPT2(Family):
    """GPT-2, whose head dimension is h / n."""

    name = "gpt2"
    label = "GPT-2"
    base_prefix = "transformer."
    required: Mapping[str, tuple[Any, ...]] = {
        "normalization": ("LayerNorm",),
        "position_embedding_type": ("learned_absolute",),
        "swiglu": (False,),
        "add_bias_linear": (True,),
    }
    unused: Mapping[str, tuple[Any, ...]] = {
        "qk_layernorm": (False,),
        "group_query_attention": (False,),
        "num_experts": (None, 0),
        "use_te_activation_func": (False,),
    }
    config_fits: Mapping[str, tuple[Any, ...]] = {
        "activation_function": ("gelu_new", *_ACTIVATIONS),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    config_needs = ("n_layer", "n_embd", "n_head", "vocab_size")
    # The causal mask, which old checkpoints contain.
    ignored = (".attn.bias", ".attn.masked_bias")

    @override
    def own_values_from_args(
        self, args: Any, rope_scaling_factor: float | None
    ) -> tuple[dict[str, Any], list[str]]:
        issues = []
        if rope_scaling_factor is not None:
            issues.append("a RoPE scaling factor is given, and the positions are learned")
        heads = args.num_attention_heads
        if args.kv_channels and args.kv_channels * heads != args.hidden_size:
            issues.append(
                f"--kv-channels is {args.kv_channels}, needs --hidden-size / "
                f"--num-attention-heads, which is {args.hidden_size // heads}"
            )
        values = {
            "rotary_base": 10000.0,
            "activation": "gelu_new" if getattr(args, "bias_gelu_fusion", True) else "gelu",
            "attention_dropout": float(getattr(args, "attention_dropout", 0.1)),
            "hidden_dropout": float(getattr(args, "hidden_dropout", 0.1)),
        }
        return values, issues

    @override
    def own_args(self, shape: ModelShape) -> tuple[dict[str, Any], list[str]]:
        return {"bias_gelu_fusion": _ACTIVATIONS[shape.activation]}, []

    @override
    def own_values_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        hidden, heads = config["n_embd"], config["n_head"]
        embedding, residual = config.get("embd_pdrop", 0.1), config.get("resid_pdrop", 0.1)
        if embedding != residual:
            raise ConversionError(
                f"config.json: embd_pdrop is {embedding} and resid_pdrop is {residual}, and "
                "Megatron has one --hidden-dropout for both; make them equal."
            )
        fused = _ACTIVATIONS[config.get("activation_function", "gelu_new")]
        return {
            "num_layers": config["n_layer"],
            "hidden_size": hidden,
            "ffn_hidden_size": config.get("n_inner") or 4 * hidden,
            "num_attention_heads": heads,
            "num_query_groups": heads,
            "kv_channels": hidden // heads,
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config.get("n_positions", 1024),
            "layernorm_epsilon": config.get("layer_norm_epsilon", 1e-5),
            "rotary_base": 10000.0,
            "tied": config.get("tie_word_embeddings", True),
            "activation": "gelu_new" if fused else "gelu",
            "attention_dropout": float(config.get("attn_pdrop", 0.1)),
            "hidden_dropout": float(residual),
        }

    @override
    def to_config(self, shape: ModelShape) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": self.name,
            "vocab_size": shape.vocab_size,
            "n_embd": shape.hidden_size,
            "n_inner": shape.ffn_hidden_size,
            "n_layer": shape.num_layers,
            "n_head": shape.num_attention_heads,
            "n_positions": shape.max_position_embeddings,
            "n_ctx": shape.max_position_embeddings,
            "layer_norm_epsilon": shape.layernorm_epsilon,
            "activation_function": shape.activation,
            "attn_pdrop": shape.attention_dropout,
            "embd_pdrop": shape.hidden_dropout,
            "resid_pdrop": shape.hidden_dropout,
            "tie_word_embeddings": shape.tied,
            "use_cache": True,
        }

    # ------------------------------------------------------------- tensors

    @override
    def layer_prefix(self, number: int) -> str:
        return f"transformer.h.{number}."

    @override
    def first_rules(self, shape: ModelShape) -> list[Rule]:
        h = shape.hidden_size
        words = "embedding.word_embeddings.weight", ("transformer.wte.weight",)
        places = "embedding.position_embeddings.weight", ("transformer.wpe.weight",)
        return [
            Rule(*words, (shape.vocab_size, h), kind="vocab"),
            Rule(*places, (shape.max_position_embeddings, h)),
        ]

    @override
    def last_rules(self, shape: ModelShape) -> list[Rule]:
        h = shape.hidden_size
        rules = _norm("decoder.final_layernorm", "transformer.ln_f", h)
        if not shape.tied:
            names = "output_layer.weight", ("lm_head.weight",)
            rules.append(Rule(*names, (shape.vocab_size, h), kind="vocab"))
        return rules

    @override
    def layer_rules(self, shape: ModelShape) -> list[Rule]:
        h, f, heads = shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads
        qkv = side_by_side_qkv_transform(heads, shape.kv_channels)

        def linear(megatron: str, hf: str, rows: int, columns: int) -> list[Rule]:
            transform = qkv if megatron.endswith("linear_qkv") else None
            weight = Rule(
                f"{megatron}.weight",
                (f"{hf}.weight",),
                (rows, columns),
                transform or TRANSPOSED,
            )
            bias = Rule(f"{megatron}.bias", (f"{hf}.bias",), (rows,))
            if transform is not None:
                bias = Rule(bias.megatron, bias.hf, bias.shape, transform)
            return [weight, bias]

        return [
            *_norm("input_layernorm", "ln_1", h),
            *linear("self_attention.linear_qkv", "attn.c_attn", 3 * h, h),
            *linear("self_attention.linear_proj", "attn.c_proj", h, h),
            *_norm("pre_mlp_layernorm", "ln_2", h),
            *linear("mlp.linear_fc1", "mlp.c_fc", f, h),
            *linear("mlp.linear_fc2", "mlp.c_proj", h, f),
        ]


def _norm(megatron: str, hf: str, width: int) -> list[Rule]:
    return [
        Rule(f"{megatron}.weight", (f"{hf}.weight",), (width,), kind="norm"),
        Rule(f"{megatron}.bias", (f"{hf}.bias",), (width,)),
    ]
