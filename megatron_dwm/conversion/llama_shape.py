"""The numbers that define a dense Llama, read from Megatron's arguments or from config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_dwm.conversion.errors import ConversionError

# The factor that Megatron's own model builders train with, whatever --rope-scaling-factor says:
# they take the flag and do not hand it to the model (seen in 0.19.2).
BUILT_IN_ROPE_FACTOR = 8.0

# Megatron's `--use-rope-scaling` fixes these three (RotaryEmbedding._apply_scaling).
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# What dense Llama requires of Megatron's arguments: (argument, flag, values that fit).
_REQUIRED = (
    ("normalization", "--normalization", ("RMSNorm",)),
    ("position_embedding_type", "--position-embedding-type", ("rope",)),
    ("swiglu", "--swiglu", (True,)),
    ("add_bias_linear", "--add-bias-linear (see --disable-bias-linear)", (False,)),
)
# What it must not use; an argument that an older checkpoint lacks counts as unused.
_UNUSED = (
    ("add_qkv_bias", "--add-qkv-bias", (False,)),
    ("num_experts", "--num-experts", (None, 0)),
    ("qk_layernorm", "--qk-layernorm", (False,)),
    ("qk_l2_norm", "--qk-l2-norm", (False,)),
    ("multi_latent_attention", "--multi-latent-attention", (False,)),
    ("rotary_percent", "--rotary-percent", (1.0,)),
    ("rotary_interleaved", "--rotary-interleaved", (False,)),
    ("no_rope_freq", "--no-rope-freq", (None,)),
    (
        "apply_residual_connection_post_layernorm",
        "--apply-residual-connection-post-layernorm",
        (False,),
    ),
    ("attention_output_gate", "--attention-output-gate", (False,)),
    ("softmax_type", "--softmax-type", ("vanilla",)),
    ("window_size", "--window-size", (None,)),
    ("experimental_attention_variant", "--experimental-attention-variant", (None,)),
    ("linear_attention_freq", "--linear-attention-freq", (None,)),
    ("glu_linear_offset", "--glu-linear-offset", (0.0,)),
    ("activation_func_clamp_value", "--activation-func-clamp-value", (None,)),
    ("squared_relu", "--squared-relu", (False,)),
    ("quick_geglu", "--quick-geglu", (False,)),
    ("use_mup", "--use-mup", (False,)),
    ("mtp_num_layers", "--mtp-num-layers", (None, 0)),
    ("is_hybrid_model", "--is-hybrid-model", (False,)),
    ("heterogeneous_layers_config_path", "--heterogeneous-layers-config-path", (None,)),
    (
        "heterogeneous_layers_config_encoded_json",
        "--heterogeneous-layers-config-encoded-json",
        (None, ""),
    ),
    ("spec", "--spec", (None,)),
)


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """The numbers that define a dense Llama, under Megatron's names.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: h.
        ffn_hidden_size: f, the width of gate and up each.
        num_attention_heads: n.
        num_query_groups: g, equal to n without grouped-query attention.
        kv_channels: d, the head dimension.
        vocab_size: V, without padding once it is known.
        max_position_embeddings: Longest sequence that the model declares.
        layernorm_epsilon: RMSNorm epsilon.
        rotary_base: RoPE base (theta).
        rope_scaling: None, or Hugging Face's description of it (`rope_type`, `factor`, ...).
        tied: Whether the output layer is the embedding.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ConversionError(
                f"num_attention_heads is {self.num_attention_heads} and num_query_groups is "
                f"{self.num_query_groups}: the heads do not divide into the groups."
            )

    @classmethod
    def from_megatron_args(cls, args: Any, rope_scaling_factor: float | None = None) -> LlamaShape:
        """Reads the shape from the arguments that a Megatron checkpoint carries.

        Args:
            args: The checkpoint's `argparse.Namespace`.
            rope_scaling_factor: The factor that a model with `--use-rope-scaling` was built with;
                needed where the checkpoint's differs from `BUILT_IN_ROPE_FACTOR`.

        Returns:
            The shape, with `vocab_size` still padded.

        Raises:
            ConversionError: The model is no dense Llama; names every argument that says so.
        """
        reasons = [
            f"{flag} is {getattr(args, name, None)!r}, needs {fits[0]!r}"
            for name, flag, fits in _REQUIRED
            if getattr(args, name, None) not in fits
        ]
        reasons += [
            f"{flag} is {getattr(args, name)!r}, needs {fits[0]!r}"
            for name, flag, fits in _UNUSED
            if getattr(args, name, fits[0]) not in fits
        ]
        if args.hidden_size % args.num_attention_heads:
            reasons.append(
                f"--hidden-size {args.hidden_size} is no multiple of --num-attention-heads "
                f"{args.num_attention_heads}"
            )
        interpolation = getattr(args, "rotary_seq_len_interpolation_factor", None)
        llama3 = getattr(args, "use_rope_scaling", False)
        if interpolation and llama3:
            reasons.append(
                "--rotary-seq-len-interpolation-factor and --use-rope-scaling are both set"
            )
        factor = float(getattr(args, "rope_scaling_factor", BUILT_IN_ROPE_FACTOR))
        if rope_scaling_factor is not None and not llama3:
            reasons.append("a RoPE scaling factor is given, and --use-rope-scaling was off")
        elif llama3 and rope_scaling_factor is None and factor != BUILT_IN_ROPE_FACTOR:
            reasons.append(
                f"--rope-scaling-factor is {factor:g}, and Megatron's own builders ignore it and "
                f"use {BUILT_IN_ROPE_FACTOR:g}; give --rope-scaling-factor with the factor that "
                f"the model was built with ({BUILT_IN_ROPE_FACTOR:g} with the stock trainer)"
            )
        if reasons:
            raise ConversionError(
                "The checkpoint cannot be written as a dense Llama: " + "; ".join(reasons) + "."
            )
        scaling: dict[str, Any] | None = None
        if llama3:
            scaling = {
                "rope_type": "llama3",
                "factor": rope_scaling_factor or factor,
                **LLAMA3_ROPE,
            }
        elif interpolation:
            scaling = {"rope_type": "linear", "factor": float(interpolation)}
        heads = args.num_attention_heads
        gqa = getattr(args, "group_query_attention", False)
        return cls(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=args.num_query_groups if gqa else heads,
            kv_channels=args.kv_channels or args.hidden_size // heads,
            vocab_size=args.padded_vocab_size,
            max_position_embeddings=args.max_position_embeddings,
            layernorm_epsilon=getattr(args, "layernorm_epsilon", 1e-5),
            rotary_base=float(args.rotary_base),
            rope_scaling=scaling,
            tied=not args.untie_embeddings_and_output_weights,
        )

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> LlamaShape:
        """Reads the shape from a Hugging Face `config.json`, old and new spelling of RoPE.

        Args:
            config: The parsed `config.json`.

        Raises:
            ConversionError: The model is no dense Llama, or a number is missing.
        """
        reasons = [
            f"{name} is {config.get(name, fits)!r}, needs {fits!r}"
            for name, fits in (
                ("model_type", "llama"),
                ("hidden_act", "silu"),
                ("attention_bias", False),
                ("mlp_bias", False),
            )
            if config.get(name, None if name == "model_type" else fits) != fits
        ]
        names = "num_hidden_layers hidden_size intermediate_size num_attention_heads vocab_size"
        reasons += [f"{name} is missing" for name in names.split() if name not in config]
        if reasons:
            raise ConversionError(f"config.json is no dense Llama: {'; '.join(reasons)}.")
        rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        base = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
            rotary_base=float(base),
            rope_scaling=None if kind == "default" else {"rope_type": kind, **rope},
            tied=config.get("tie_word_embeddings", False),
        )

    def to_hf_config(self, dtype: str) -> dict[str, Any]:
        """Returns the contents of `config.json` without the tokenizer's ids.

        RoPE is written in both spellings: `rope_parameters` (transformers 5) and
        `rope_theta` with `rope_scaling` (transformers 4 and most inference servers).

        Args:
            dtype: Name of the weights' dtype, such as `bfloat16`.
        """
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": self.rotary_base}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.layernorm_epsilon,
            "rope_theta": self.rotary_base,
            "rope_scaling": scaling,
            "rope_parameters": parameters,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "torch_dtype": dtype,
        }

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of a layer, by Megatron's local name."""
        h, f, d = self.hidden_size, self.ffn_hidden_size, self.kv_channels
        heads, groups = self.num_attention_heads, self.num_query_groups
        return {
            "input_layernorm.weight": (h,),
            "self_attention.linear_qkv.weight": ((heads + 2 * groups) * d, h),
            "self_attention.linear_proj.weight": (h, heads * d),
            "pre_mlp_layernorm.weight": (h,),
            "mlp.linear_fc1.weight": (2 * f, h),
            "mlp.linear_fc2.weight": (h, f),
        }
