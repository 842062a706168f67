"""The flags with which the stock trainer builds a model, from a family's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The file in which an import keeps the flags that it printed, one per line, quoted for a shell.
FLAGS_FILE = "trainer_flags.txt"

# Argument -> flag that is given if the argument is true.
_WHEN_TRUE = {
    "group_query_attention": "--group-query-attention",
    "swiglu": "--swiglu",
    "add_qkv_bias": "--add-qkv-bias",
    "qk_layernorm": "--qk-layernorm",
    "use_rope_scaling": "--use-rope-scaling",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
}
# Argument -> flag that is given if the argument is false.
_WHEN_FALSE = {
    "add_bias_linear": "--disable-bias-linear",
    "bias_gelu_fusion": "--no-bias-gelu-fusion",
}
# Argument -> flag that takes its value; arguments that are None are left out.
_VALUES = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "kv_channels": "--kv-channels",
    "max_position_embeddings": "--max-position-embeddings",
    "normalization": "--normalization",
    "layernorm_epsilon": "--norm-epsilon",
    "position_embedding_type": "--position-embedding-type",
    "rotary_base": "--rotary-base",
    "rotary_seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor",
    "rope_scaling_factor": "--rope-scaling-factor",
    "attention_dropout": "--attention-dropout",
    "hidden_dropout": "--hidden-dropout",
    "num_experts": "--num-experts",
    "moe_ffn_hidden_size": "--moe-ffn-hidden-size",
    "moe_router_topk": "--moe-router-topk",
    "moe_router_load_balancing_type": "--moe-router-load-balancing-type",
    "moe_aux_loss_coeff": "--moe-aux-loss-coeff",
    "make_vocab_size_divisible_by": "--make-vocab-size-divisible-by",
    # Megatron's own padding is based on the tokenizer's size, which may differ from the model's.
    "padded_vocab_size": "--padded-vocab-size",
    "tokenizer_type": "--tokenizer-type",
    "tokenizer_model": "--tokenizer-model",
}


def trainer_flags(args: Mapping[str, Any]) -> list[list[str]]:
    """Returns the flags that build a model, each with its value.

    Args:
        args: Arguments as returned by `Family.to_args`, with those of the tokenizer.

    Returns:
        Lists of one or two strings, such as `["--num-layers", "30"]`.
    """
    flags = []
    for name, flag in _VALUES.items():
        if args.get(name) is not None:
            flags.append([flag, _word(args[name])])
        if name == "num_attention_heads" and args.get("group_query_attention"):
            flags.append(["--num-query-groups", _word(args["num_query_groups"])])
    flags += [[flag] for name, flag in _WHEN_TRUE.items() if args.get(name)]
    flags += [[flag] for name, flag in _WHEN_FALSE.items() if args.get(name) is False]
    # Without tokenizer files, this flag gives the vocabulary.
    if args.get("tokenizer_type") == "NullTokenizer":
        flags.append(["--vocab-size", _word(args["vocab_size"])])
    return flags


def _word(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
