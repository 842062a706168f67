"""Megatron -> Hugging Face: writes the dense Llama of a `torch_dist` checkpoint as a folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_dwm.conversion import (
    ConversionError,
    LlamaShape,
    TorchDistCheckpoint,
    find_checkpoint,
    megatron_layer_to_hf,
)
from megatron_dwm.conversion.hf_folder import INDEX_FILE, LAYER_PREFIX
from megatron_dwm.conversion.llama import FUSED_NORM_NAMES, MODEL_NAMES
from tools.convert.tokenizer import Tokenizer, find_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_LAYERS = "decoder.layers."
_FC1 = "mlp.linear_fc1.weight"
# With `singleton_local_shards`, Megatron stores gate and up under names of their own.
_FC1_HALVES = {f"{_FC1}_w": 0, f"{_FC1}_v": 1}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers `export` and its flags."""
    command = commands.add_parser(
        "export",
        help="Megatron -> Hugging Face",
        description="Writes the language model of a Megatron run (torch_dist format, any parallel "
        "layout) as a folder for AutoModelForCausalLM and AutoTokenizer.",
    )
    command.set_defaults(run=export)
    add = command.add_argument
    add(
        "--megatron-path",
        required=True,
        metavar="RUN",
        help="run folder (its latest checkpoint is taken) or one iter_ folder",
    )
    add("--hf-path", required=True, metavar="OUT", help="folder to write")
    add("--iteration", type=int, metavar="N", help="iteration to take from a run folder")
    add("--dtype", choices=sorted(DTYPES), help="dtype to write (default: the checkpoint's)")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="true vocabulary size; padded rows behind it are cut (default: the tokenizer's)",
    )
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest weights file, such as 500MB or 5GB (default: 5GB)",
    )
    add(
        "--tokenizer-model",
        metavar="FILE",
        help="SentencePiece model or Hugging Face tokenizer folder (default: the one that the "
        "checkpoint names); 'none' exports without a tokenizer",
    )
    add(
        "--rope-scaling-factor",
        type=float,
        metavar="F",
        help="factor that a model with --use-rope-scaling was built with (default: the "
        "checkpoint's, which must be 8, as Megatron's own builders ignore the flag)",
    )
    add("--force", action="store_true", help="replace a model that OUT holds already")


def export(
    megatron_path: str,
    hf_path: str,
    iteration: int | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
    max_shard_size: str = "5GB",
    tokenizer_model: str | None = None,
    rope_scaling_factor: float | None = None,
    force: bool = False,
) -> None:
    """Exports a checkpoint; the arguments are the command line's.

    Everything is checked before the first weight is read, and OUT appears only when complete.

    Args:
        megatron_path: Run folder or folder of one iteration.
        hf_path: Folder to write.
        iteration: Iteration to take from a run folder; None takes the latest.
        dtype: A key of `DTYPES`; None keeps the checkpoint's.
        vocab_size: True vocabulary size; None takes the tokenizer's.
        max_shard_size: Largest weights file, such as `5GB`.
        tokenizer_model: Tokenizer to carry; None takes the checkpoint's, `none` takes none.
        rope_scaling_factor: Factor that a model with scaled RoPE was built with; None takes the
            checkpoint's where that is beyond doubt.
        force: Replace a model that the folder holds already.

    Raises:
        ConversionError: Something cannot be converted; the message names it.
    """
    out = Path(hf_path).absolute()
    _check_output(out, force)
    _check_shard_size(max_shard_size)
    checkpoint = TorchDistCheckpoint(find_checkpoint(megatron_path, iteration))
    args = checkpoint.args
    shape = LlamaShape.from_megatron_args(args, rope_scaling_factor)
    source = Source(checkpoint, shape)
    source.check()
    tokenizer = find_tokenizer(args, tokenizer_model)
    size = _true_vocab_size(vocab_size, tokenizer, args, shape.vocab_size)
    shape = dataclasses.replace(shape, vocab_size=size)
    stored = checkpoint.tensors["embedding.word_embeddings.weight"].dtype
    target = DTYPES[dtype] if dtype else stored
    notes = [tokenizer.note] if tokenizer.note else []

    with _complete_or_nothing(out) as folder:
        _write_weights(folder, source, shape, target, max_shard_size)
        _write_configs(folder, shape, target, tokenizer)
        warning = tokenizer.write(folder)
        if warning:
            notes.append(f"Warning: {warning}")
        # safetensors writes files that only their owner can read.
        for path in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", path)
    for note in notes:
        print(note, file=sys.stderr)
    print(
        f"Wrote {out}: iteration {checkpoint.iteration}, {shape.num_layers} layers, "
        f"vocabulary {shape.vocab_size}, {str(target).removeprefix('torch.')}."
    )


class Source:
    """Where each layer's tensors lie in a checkpoint: stacked over layers, or layer by layer."""

    def __init__(self, checkpoint: TorchDistCheckpoint, shape: LlamaShape) -> None:
        self.checkpoint = checkpoint
        self.shape = shape
        # layer -> name inside the layer -> (key, index in the stack or None, shape)
        self._layers: list[dict[str, tuple[str, int | None, tuple[int, ...]]]] = [
            {} for _ in range(shape.num_layers)
        ]
        self._unknown: list[str] = []
        for key, info in checkpoint.tensors.items():
            if key in MODEL_NAMES:
                continue
            single = re.fullmatch(re.escape(_LAYERS) + r"(\d+)\.(.+)", key)
            if single and int(single[1]) < shape.num_layers:
                self._layers[int(single[1])][_local(single[2])] = (key, None, info.shape)
            elif key.startswith(_LAYERS) and not single and info.shape[:1] == (shape.num_layers,):
                for index, layer in enumerate(self._layers):
                    layer[_local(key.removeprefix(_LAYERS))] = (key, index, info.shape[1:])
            else:
                self._unknown.append(f"{key} {info.shape} is unknown")

    def check(self) -> None:
        """Compares every name and shape with what the model needs.

        Raises:
            ConversionError: Names what is unknown, missing or of the wrong shape.
        """
        shape, issues = self.shape, list(self._unknown)
        outside = {
            "embedding.word_embeddings.weight": (shape.vocab_size, shape.hidden_size),
            "decoder.final_layernorm.weight": (shape.hidden_size,),
            "output_layer.weight": (shape.vocab_size, shape.hidden_size),
        }
        if shape.tied:
            del outside["output_layer.weight"]
            if "output_layer.weight" in self.checkpoint.tensors:
                issues.append("output_layer.weight is there though the embeddings are tied")
        for key, needed in outside.items():
            info = self.checkpoint.tensors.get(key)
            issues += _compare(key, info and info.shape, needed)
        for number, layer in enumerate(self._layers):
            needed = shape.layer_shapes()
            if any(name in layer for name in _FC1_HALVES):
                rows, columns = needed.pop(_FC1)
                needed |= {name: (rows // 2, columns) for name in _FC1_HALVES}
            for name in sorted(needed.keys() | layer.keys()):
                key, _, found = layer.get(name, (f"{_LAYERS}{number}.{name}", None, None))
                issues += _compare(key, found, needed.get(name))
        issues = list(dict.fromkeys(issues))
        if issues:
            more = f"; and {len(issues) - 8} more" if len(issues) > 8 else ""
            raise ConversionError(
                f"{self.checkpoint.folder} does not hold the dense Llama that its arguments "
                f"describe: {'; '.join(issues[:8])}{more}."
            )

    def layer(self, number: int) -> dict[str, torch.Tensor]:
        """Loads one layer under Megatron's local names."""
        tensors = {
            name: self.checkpoint.load(key, index)
            for name, (key, index, _) in self._layers[number].items()
        }
        if all(name in tensors for name in _FC1_HALVES):
            tensors[_FC1] = torch.cat([tensors.pop(name) for name in _FC1_HALVES])
        return tensors


def _local(name: str) -> str:
    return FUSED_NORM_NAMES.get(name, name)


def _compare(key: str, found: tuple | None, needed: tuple | None) -> list[str]:
    if found is None:
        return [f"{key} is missing"]
    if needed is None:
        return [f"{key} {found} is unknown"]
    return [] if found == needed else [f"{key} is {found}, needs {needed}"]


# --------------------------------------------------------------------------- weights


def _hf_tensors(source: Source, shape: LlamaShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the model's tensors in Hugging Face's names and layouts, one layer at a time."""
    checkpoint = source.checkpoint
    # The weight that is stored is an offset from one.
    zero_centered = getattr(checkpoint.args, "layernorm_zero_centered_gamma", False)

    def finish(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if zero_centered and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        return name, tensor

    embedding = "embedding.word_embeddings.weight"
    yield MODEL_NAMES[embedding], checkpoint.load(embedding)[: shape.vocab_size]
    for number in range(shape.num_layers):
        prefix = LAYER_PREFIX.format(index=number)
        for name, tensor in megatron_layer_to_hf(source.layer(number), shape).items():
            yield finish(prefix + name, tensor)
    norm = "decoder.final_layernorm.weight"
    yield finish(MODEL_NAMES[norm], checkpoint.load(norm))
    if not shape.tied:
        output = "output_layer.weight"
        yield MODEL_NAMES[output], checkpoint.load(output)[: shape.vocab_size]


def _write_weights(
    folder: Path, source: Source, shape: LlamaShape, dtype: torch.dtype, max_shard_size: str
) -> None:
    """Writes `model.safetensors`, or shards and their index, with one shard in memory."""
    plan = split_torch_state_dict_into_shards(
        _blueprint(shape, dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    file_of = plan.tensor_to_filename
    waiting = {file: set(names) for file, names in plan.filename_to_tensors.items()}
    shards: dict[str, dict[str, torch.Tensor]] = {file: {} for file in waiting}
    with tqdm(total=len(file_of), unit="tensor", desc="export") as progress:
        for name, tensor in _hf_tensors(source, shape):
            converted = tensor.to(dtype).contiguous()
            if dtype == torch.float16 and not converted.isfinite().all():
                raise ConversionError(
                    f"--dtype fp16 cannot hold the values of {name}; use bf16 or fp32."
                )
            # A view would keep the storage of the whole tensor that it was cut from.
            if converted.untyped_storage().nbytes() > converted.nbytes:
                converted = converted.clone()
            file = file_of[name]
            shards[file][name] = converted
            waiting[file].remove(name)
            if not waiting[file]:
                save_file(shards.pop(file), folder / file, metadata={"format": "pt"})
            progress.update()
    assert not shards, f"unwritten shards: {list(shards)}"
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(file_of.items()))}
        _write_json(folder / INDEX_FILE, index)


def _blueprint(shape: LlamaShape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the model's tensors without their contents, in the order of writing."""

    def empty(size: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    vocabulary = (shape.vocab_size, shape.hidden_size)
    tensors = {"model.embed_tokens.weight": empty(vocabulary)}
    layer = {name: empty(size) for name, size in shape.layer_shapes().items()}
    for number in range(shape.num_layers):
        prefix = LAYER_PREFIX.format(index=number)
        for name, tensor in megatron_layer_to_hf(layer, shape).items():
            tensors[prefix + name] = torch.empty_like(tensor)
    tensors["model.norm.weight"] = empty((shape.hidden_size,))
    if not shape.tied:
        tensors["lm_head.weight"] = empty(vocabulary)
    return tensors


# --------------------------------------------------------------------------- configuration


def _true_vocab_size(flag: int | None, tokenizer: Tokenizer, args: object, padded: int) -> int:
    """Returns the vocabulary size without padding: the flag's, tokenizer's or run's, in order."""
    # Megatron pads from the tokenizer's size; `vocab_size` describes the null tokenizer alone.
    known = tokenizer.vocab_size or getattr(args, "vocab_size", None)
    size = flag or known or padded
    if not 0 < size <= padded:
        origin = "--vocab-size" if flag else "the tokenizer's size"
        raise ConversionError(
            f"{origin} is {size}, and the checkpoint's embedding has {padded} rows; give "
            "--vocab-size with the size that the model was trained with, or its own tokenizer."
        )
    if flag and tokenizer.vocab_size and flag < tokenizer.vocab_size:
        raise ConversionError(
            f"--vocab-size is {flag}, and the tokenizer has {tokenizer.vocab_size} tokens; the "
            "model would lack rows for some. Leave the flag out, or name another tokenizer."
        )
    if not (flag or known):
        print(
            f"The true vocabulary size is unknown: all {padded} rows are kept, padding included. "
            "--vocab-size cuts it.",
            file=sys.stderr,
        )
    return size


def _write_configs(
    folder: Path, shape: LlamaShape, dtype: torch.dtype, tokenizer: Tokenizer
) -> None:
    """Writes `config.json` and `generation_config.json`."""
    ids = {key: tokenizer.ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = shape.to_hf_config(str(dtype).removeprefix("torch."))
    _write_json(folder / "config.json", {**config, **ids})
    known = {key: value for key, value in ids.items() if value is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **known})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- output folder


def _check_output(out: Path, force: bool) -> None:
    """Refuses to overwrite what is not asked for, or what is no model at all."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConversionError(f"--hf-path {out} is a file; give a folder.")
    if not any(out.iterdir()):
        return
    if not force:
        raise ConversionError(f"--hf-path {out} is not empty; give another folder or --force.")
    if not (out / "config.json").is_file():
        raise ConversionError(
            f"--hf-path {out} holds no config.json, so it is no exported model and --force will "
            "not replace it; give another folder."
        )


def _check_shard_size(size: str) -> None:
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?(KB|MB|GB|TB)", size.upper()):
        raise ConversionError(f"--max-shard-size is {size!r}; give a size such as 500MB or 5GB.")


@contextlib.contextmanager
def _complete_or_nothing(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` that takes its place when the block succeeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    folder = scratch / "new"
    try:
        folder.mkdir()
        yield folder
        old = scratch / "old"
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(folder, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
