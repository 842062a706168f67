"""Reads Hugging Face folders of dense Llama models, one tensor at a time.

`iter_megatron_tensors` is what a Megatron model is initialised from (`--dwm-init hf:DIR`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_dwm.conversion.dwm_classifier import stock_config
from megatron_dwm.conversion.errors import ConversionError
from megatron_dwm.conversion.llama import LAYER_NAMES, MODEL_NAMES, hf_layer_to_megatron
from megatron_dwm.conversion.llama_shape import LlamaShape
from megatron_dwm.json_files import JsonError, json_type, read_object, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LAYER_PREFIX = "model.layers.{index}."


def read_hf_config(folder: str | os.PathLike) -> LlamaShape:
    """Reads the shape of the model from a folder's `config.json`.

    Raises:
        ConversionError: The file is missing or damaged, or the model is no dense Llama.
    """
    path = Path(folder) / "config.json"
    return LlamaShape.from_hf_config(stock_config(_read_json(path)))


def iter_hf_tensors(
    folder: str | os.PathLike, wanted: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a folder, sharded or not, one at a time.

    Args:
        folder: Folder with `model.safetensors`, or `model.safetensors.index.json` and shards.
        wanted: Called with a tensor's name; tensors for which it is false are not read.

    Yields:
        Name and tensor, on the CPU, in the stored dtype.

    Raises:
        ConversionError: A file is missing or damaged, or lacks a tensor of the index.
    """
    by_file: dict[Path, list[str]] = {}
    for name, path in _tensor_files(Path(folder)).items():
        if wanted is None or wanted(name):
            by_file.setdefault(path, []).append(name)
    for path, names in by_file.items():
        yield from _read(path, names)


def iter_megatron_tensors(
    folder: str | os.PathLike, num_layers: int | None = None, *, fused_layernorm: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a folder's tensors under Megatron's names and in its layouts, unsharded.

    Args:
        folder: A Hugging Face folder of a dense Llama.
        num_layers: Take only the first so many layers; None takes all.
        fused_layernorm: Name norms as Transformer Engine's fused layers do.

    Yields:
        Megatron name (`decoder.layers.0.mlp.linear_fc1.weight`) and tensor: the embedding
        `[V, h]`, every layer, the final norm `[h]` and, unless tied, the output layer `[V, h]`.

    Raises:
        ConversionError: The folder has fewer layers, or a tensor is missing or does not fit.
    """
    folder = Path(folder)
    config = read_hf_config(folder)
    layers = config.num_layers if num_layers is None else num_layers
    if layers > config.num_layers:
        raise ConversionError(f"{folder} has {config.num_layers} layers; {layers} were asked for.")
    files = _tensor_files(folder)
    outside = {megatron: hf for megatron, hf in MODEL_NAMES.items()}
    if config.tied:
        del outside["output_layer.weight"]

    def model_tensor(name: str) -> tuple[str, torch.Tensor]:
        return name, _load(files, outside[name], folder)

    yield model_tensor("embedding.word_embeddings.weight")
    for index in range(layers):
        prefix = LAYER_PREFIX.format(index=index)
        tensors = {
            name: _load(files, prefix + name, folder)
            for names in LAYER_NAMES.values()
            for name in names
        }
        extra = [n for n in files if n.startswith(prefix) and n[len(prefix) :] not in tensors]
        extra = [n for n in extra if not n.endswith("rotary_emb.inv_freq")]
        if extra:
            raise ConversionError(f"{folder}: {extra[0]} has no place in a dense Llama layer.")
        layer = hf_layer_to_megatron(tensors, config, fused_layernorm=fused_layernorm)
        for name, tensor in layer.items():
            yield f"decoder.layers.{index}.{name}", tensor
    yield model_tensor("decoder.final_layernorm.weight")
    if not config.tied:
        yield model_tensor("output_layer.weight")


def _load(files: dict[str, Path], name: str, folder: Path) -> torch.Tensor:
    if name not in files:
        raise ConversionError(f"{folder} lacks the tensor {name}.")
    return next(_read(files[name], [name]))[1]


def _read(path: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns tensor name -> file for a folder, single or sharded."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict):
            raise ConversionError(
                f"{index}: weight_map is a JSON {json_type(weight_map)}, no object."
            )
        bad = [file for file in weight_map.values() if not isinstance(file, str)]
        if bad:
            raise ConversionError(f"{index}: weight_map names the file {shown(bad[0])}, no string.")
        files = {name: folder / file for name, file in weight_map.items()}
        # Shards lie beside their index: an index must not name files elsewhere.
        odd = [f for f in weight_map.values() if not re.fullmatch(r"[^/\\]+\.safetensors", f)]
        missing = sorted({path.name for path in files.values() if not path.is_file()})
        if odd or missing or not files:
            found = f"names {(odd or missing)[0]}, which is not there" if files else "is empty"
            raise ConversionError(f"{index} {found}; download or export the folder again.")
        return files
    single = folder / SINGLE_FILE
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{single} cannot be read: {error}") from error
    raise ConversionError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors weights are read. "
        "Save the model with save_pretrained(safe_serialization=True)."
    )


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ConversionError(f"{path} is missing; give a folder that save_pretrained wrote.")
    try:
        return read_object(path)
    except JsonError as error:
        raise ConversionError(f"{path} is no valid JSON object: {error}.") from error
