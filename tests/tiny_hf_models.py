"""Tiny random Hugging Face models of every family that converts, written by transformers itself."""

import functools

VOCAB_SIZE = 250
_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Every number differs from its default, and the head dimension from h / n where it may.
_LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "layer_norm_epsilon": 1e-4,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Name -> model_type and what its configuration is made from.
MODELS = {
    "llama": ("llama", {**_LLAMA, "head_dim": 12, "rope_parameters": _LLAMA3}),
    "llama_tied": (
        "llama",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "qwen2": ("qwen2", {**_LLAMA, "rope_parameters": _ROPE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_LLAMA, "rope_parameters": _ROPE, "head_dim": 12}),
    "mixtral": (
        "mixtral",
        {**_LLAMA, "rope_parameters": _ROPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": ("gpt2", {**_GPT2, "n_inner": 72}),
    "gpt2_exact_gelu": (
        "gpt2",
        {**_GPT2, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
}


def write(name, folder, max_shard_size="60KB"):
    """Writes one model, its norms and biases drawn wide as well; returns its tensors by name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_dwm.conversion import iter_hf_tensors

    kind, values = MODELS[name]
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(float(parameter.mean() > 0.5), 0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return dict(iter_hf_tensors(folder))


def cached(make):
    """Returns `write`, which writes each model once into a folder that `make(name)` gives."""

    @functools.cache
    def once(name):
        folder = make(name)
        return folder, write(name, folder)

    return once
