"""Reads Hugging Face folders of dense Llama models, one tensor at a time.

`iter_megatron_tensors` initialises a Megatron model (`--dwm-init hf:DIR`).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_dwm.conversion.dwm_classifier import stock_config
from megatron_dwm.conversion.families import llama_from_config
from megatron_dwm.conversion.llama_layers import LAYER_NAMES, MODEL_NAMES, hf_layer_to_megatron
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.errors import ConversionError
from megatron_dwm.files.json_files import JsonError, json_type, read_object, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_BIN_FILE = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"
_ORDER = (SINGLE_FILE, INDEX_FILE, _BIN_FILE, _BIN_INDEX)
_ADAPTER = "adapter_config.json"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
# File names of weights, whether they are read or not.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|index\.json)$", re.IGNORECASE
)
LAYER_PREFIX = "model.layers.{index}."


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weight files of a Hugging Face folder.

    Attributes:
        chosen: The file, or the index, that transformers uses.
        files: The files to read, in transformers' order.
        unread: Names of other weights in the folder.
    """

    chosen: Path
    files: list[Path]
    unread: list[str]


def read_hf_config(folder: str | os.PathLike) -> ModelShape:
    """Reads the shape of the model from a folder's `config.json`.

    Raises:
        ConversionError: The file is missing or damaged, or the model is not a dense Llama.
    """
    path = Path(folder) / "config.json"
    return llama_from_config(stock_config(_read_json(path)))


def iter_hf_tensors(
    folder: str | os.PathLike, wanted: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a folder, sharded or not, one at a time.

    Args:
        folder: Folder with `model.safetensors`, or `model.safetensors.index.json` and shards.
        wanted: Called with a tensor's name; tensors for which it returns false are not read.

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
        num_layers: Use only this many first layers; None: all.
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


def find_weights(folder: str | os.PathLike) -> Weights:
    """Picks the files that hold a folder's weights, in the order of `from_pretrained`.

    All readers of a Hugging Face folder's weights use this. transformers uses the first of: the
    file that `transformers_weights` in config.json names, `model.safetensors`, its index,
    `pytorch_model.bin`, its index. From an index it reads all tensors of the named files.

    Raises:
        ConversionError: There are none, an index is damaged or names a missing file, or the folder
            holds weights that are not those of a plain model.
    """
    folder = Path(folder)
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in present:
        if name == _ADAPTER or _DISTRIBUTED.match(name):
            what = "an adapter" if name == _ADAPTER else "a distributed checkpoint"
            raise ConversionError(
                f"{folder} holds {what} ({name}), which transformers would read; merge it into a "
                "model, save that with save_pretrained, and give the new folder."
            )
    chosen = _named_weights(folder) or next((n for n in _ORDER if (folder / n).is_file()), None)
    if chosen is None:
        raise ConversionError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors weights are "
            "read. Save the model with save_pretrained(safe_serialization=True)."
        )
    shards = [chosen]
    if chosen.endswith(".json"):
        shards = sorted(set(_weight_map(folder / chosen).values()))
    used = {chosen, *shards}
    unread = [n for n in present if n not in used and _WEIGHTS.search(n)]
    return Weights(folder / chosen, [folder / name for name in shards], unread)


def _named_weights(folder: Path) -> str | None:
    """Returns the file that config.json names for transformers, or None."""
    config = folder / "config.json"
    named = _read_json(config).get("transformers_weights") if config.is_file() else None
    if named is None:
        return None
    fits = isinstance(named, str) and re.fullmatch(r"[^/\\]+\.safetensors(\.index\.json)?", named)
    if not fits or not (folder / named).is_file():
        raise ConversionError(
            f"{config} has transformers_weights {named!r}, not a safetensors file beside it; take "
            "the key out, or put the file there."
        )
    return named


def _weight_map(index: Path) -> dict[str, str]:
    """Returns tensor name -> file name, from an index whose files all exist."""
    weight_map = _read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise ConversionError(
            f"{index}: weight_map is a JSON {json_type(weight_map)}, not an object; download the "
            "folder again."
        )
    # Shards are beside their index: an index must not name files elsewhere.
    ending = "bin" if index.name == _BIN_INDEX else "safetensors"
    bad = [file for file in weight_map.values() if not isinstance(file, str)]
    if bad:
        raise ConversionError(f"{index}: weight_map names the file {shown(bad[0])}, not a string.")
    odd = [
        file
        for file in weight_map.values()
        if not (isinstance(file, str) and re.fullmatch(rf"[^/\\]+\.{ending}", file))
    ]
    missing = sorted({file for file in weight_map.values() if file not in odd})
    missing = [file for file in missing if not (index.parent / file).is_file()]
    if odd or missing or not weight_map:
        found = f"names {(odd or missing)[0]}, which is not there" if weight_map else "is empty"
        raise ConversionError(f"{index} {found}; download or export the folder again.")
    return weight_map


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns tensor name -> file for a folder, single or sharded."""
    weights = find_weights(folder)
    if weights.chosen.name in (_BIN_FILE, _BIN_INDEX):
        raise ConversionError(
            f"{folder} has {weights.chosen.name}, and only safetensors weights are read. Save the "
            "model with save_pretrained(safe_serialization=True)."
        )
    files: dict[str, Path] = {}
    for path in weights.files:
        try:
            with safe_open(path, framework="pt") as file:
                # If a tensor is in several files, transformers keeps the last one.
                files |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} cannot be read: {error}") from error
    if weights.chosen.name.endswith(".json"):
        lost = sorted(_weight_map(weights.chosen).keys() - files.keys())
        if lost:
            raise ConversionError(
                f"{weights.chosen} names {lost[0]}, which none of its files holds; download or "
                "export the folder again."
            )
    return files


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ConversionError(f"{path} is missing; give a folder that save_pretrained wrote.")
    try:
        return read_object(path)
    except JsonError as error:
        raise ConversionError(f"{path} is not a valid JSON object: {error}.") from error
