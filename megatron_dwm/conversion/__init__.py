"""Conversion between Megatron checkpoints and Hugging Face folders.

`families` defines each model family once, as rules that both export and import follow;
`dist_checkpoint` and `legacy_checkpoint` read Megatron's checkpoints without a process group,
`torch_dist_writer` writes one, `hf_folder` and `hf_model` read Hugging Face safetensors folders.
None of them imports `megatron` or `transformers`.
"""

from megatron_dwm.conversion.dist_checkpoint import TorchDistCheckpoint, find_checkpoint
from megatron_dwm.conversion.hf_folder import (
    iter_hf_tensors,
    iter_megatron_tensors,
    read_hf_config,
)
from megatron_dwm.conversion.llama_layers import (
    hf_layer_to_megatron,
    megatron_layer_to_hf,
    merge_gate_up,
    merge_qkv,
    split_gate_up,
    split_qkv,
)
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.errors import ConversionError

__all__ = [
    "ConversionError",
    "ModelShape",
    "TorchDistCheckpoint",
    "find_checkpoint",
    "hf_layer_to_megatron",
    "iter_hf_tensors",
    "iter_megatron_tensors",
    "megatron_layer_to_hf",
    "merge_gate_up",
    "merge_qkv",
    "read_hf_config",
    "split_gate_up",
    "split_qkv",
]
