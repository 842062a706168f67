"""Megatron -> Hugging Face: writes a checkpoint's language model as a folder."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from megatron_dwm.conversion.carried_files import CONFIG, GENERATION, Carried, find_carried
from megatron_dwm.conversion.dist_checkpoint import TorchDistCheckpoint, find_checkpoint
from megatron_dwm.conversion.families import hf_config, shape_from_args
from megatron_dwm.conversion.hf_folder import INDEX_FILE
from megatron_dwm.conversion.legacy_checkpoint import LegacyCheckpoint, is_legacy
from megatron_dwm.conversion.output_folder import check_output, complete_or_nothing
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.stored_model import StoredModel
from megatron_dwm.conversion.tensor_rules import Rule
from megatron_dwm.conversion.tokenizer_files import Tokenizer, find_tokenizer
from megatron_dwm.errors import ConversionError
from megatron_dwm.progress import bar

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        iteration: Iteration to use from a run folder; None: the latest.
        dtype: A key of `DTYPES`; None keeps the checkpoint's.
        vocab_size: True vocabulary size; None takes the tokenizer's.
        max_shard_size: Largest weights file, such as `5GB`.
        tokenizer_model: Tokenizer to export; None: the checkpoint's; `none`: no tokenizer.
        rope_scaling_factor: Factor that a model with scaled RoPE was built with; None uses the
            checkpoint's if it is unambiguous.
        force: Replace a model that the folder already holds.

    Raises:
        ConversionError: Something cannot be converted; the message names it.
    """
    out = Path(hf_path).absolute()
    check_output(out, "--hf-path", force, _is_model)
    _check_shard_size(max_shard_size)
    found = find_checkpoint(megatron_path, iteration, legacy=True)
    checkpoint = LegacyCheckpoint(found) if is_legacy(found) else TorchDistCheckpoint(found)
    args = checkpoint.args
    shape = shape_from_args(args, rope_scaling_factor)
    source = StoredModel(checkpoint, shape)
    source.check()
    tokenizer = find_tokenizer(args, tokenizer_model)
    carried, more = _carried(found, args, tokenizer_model, shape)
    imported = None if carried is None else carried.vocab_size
    size = _true_vocab_size(vocab_size, tokenizer, args, shape.vocab_size, imported)
    shape = dataclasses.replace(shape, vocab_size=size)
    target = DTYPES[dtype] if dtype else source.dtype()
    zero_centered = getattr(args, "layernorm_zero_centered_gamma", False)
    notes = [*([tokenizer.note] if tokenizer.note else []), *more]

    with complete_or_nothing(out) as folder:
        _write_weights(folder, source, shape, target, max_shard_size, zero_centered)
        warning = tokenizer.write(folder)
        if carried is not None:
            carried.write(folder, with_tokenizer=tokenizer_model != "none")
        _write_configs(folder, shape, target, tokenizer, carried)
        if warning:
            notes.append(f"Warning: {warning}")
        # safetensors makes files readable only by their owner.
        for path in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", path)
    for note in notes:
        print(note, file=sys.stderr)
    print(
        f"Wrote {out}: {source.family.label}, iteration {checkpoint.iteration}, "
        f"{shape.num_layers} layers, "
        f"vocabulary {shape.vocab_size}, {str(target).removeprefix('torch.')}."
    )


# --------------------------------------------------------------------------- weights


def _hf_tensors(
    source: StoredModel, rules: list[Rule], vocab_size: int, zero_centered: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the model's tensors in Hugging Face's names and layouts, rule by rule.

    With `zero_centered`, the stored weight of a norm is an offset from one.
    """
    for rule in rules:
        tensor = source.load(rule)
        if rule.kind == "vocab":
            tensor = tensor[:vocab_size]
        elif rule.kind == "norm" and zero_centered:
            tensor = tensor.float() + 1
        yield from rule.to_hf(tensor).items()


def _write_weights(
    folder: Path,
    source: StoredModel,
    shape: ModelShape,
    dtype: torch.dtype,
    max_shard_size: str,
    zero_centered: bool,
) -> None:
    """Writes `model.safetensors`, or shards and their index, with one shard in memory."""
    rules = source.family.rules(shape)
    blueprint = {
        name: torch.empty(size, dtype=dtype, device="meta")
        for rule in rules
        for name, size in rule.hf_shapes().items()
    }
    plan = split_torch_state_dict_into_shards(
        blueprint,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    file_of = plan.tensor_to_filename
    waiting = {file: set(names) for file, names in plan.filename_to_tensors.items()}
    shards: dict[str, dict[str, torch.Tensor]] = {file: {} for file in waiting}
    with bar(len(file_of), "tensor", "export") as progress:
        for name, tensor in _hf_tensors(source, rules, shape.vocab_size, zero_centered):
            converted = tensor.to(dtype).contiguous()
            if dtype == torch.float16 and not converted.isfinite().all():
                raise ConversionError(
                    f"--dtype fp16 cannot hold the values of {name}; use bf16 or fp32."
                )
            # A view would keep the storage of the whole original tensor.
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


# --------------------------------------------------------------------------- configuration


def _carried(
    checkpoint: Path, args: object, tokenizer: str | None, shape: ModelShape
) -> tuple[Carried | None, list[str]]:
    """Returns the files carried by the import of this model, and notes."""
    carried = find_carried(checkpoint, args, tokenizer)
    if carried is None and tokenizer not in (None, "none"):
        if find_carried(checkpoint, args, None) is not None:
            return None, [
                f"With --tokenizer-model {tokenizer}, generation_config.json and config.json of "
                "the import are not carried: their token ids are those of the import's tokenizer."
            ]
    if carried is None or carried.fits(shape):
        return carried, []
    return None, [
        f"The files that the import {carried.folder} has carried are another model's: its "
        "generation_config.json and config.json are left out."
    ]


def _true_vocab_size(
    flag: int | None, tokenizer: Tokenizer, args: object, padded: int, imported: int | None
) -> int:
    """Returns the vocabulary size without padding: from flag, tokenizer or run, in this order."""
    # Megatron pads from the tokenizer's size; `vocab_size` is only for the null tokenizer. An
    # import writes down the size that it read.
    known = (
        getattr(args, "hf_vocab_size", None)
        or imported
        or tokenizer.vocab_size
        or _null_vocabulary(args)
    )
    size = flag or max(known or padded, tokenizer.vocab_size or 0)
    if not 0 < size <= padded:
        origin = "--vocab-size" if flag else "the tokenizer's size"
        raise ConversionError(
            f"{origin} is {size}, and the checkpoint's embedding has {padded} rows; give "
            "--vocab-size with the size that the model was trained with, or its own tokenizer."
        )
    if flag and tokenizer.vocab_size and flag < tokenizer.vocab_size:
        raise ConversionError(
            f"--vocab-size is {flag}, and the tokenizer has {tokenizer.tokens} tokens with ids up "
            f"to {tokenizer.vocab_size - 1}; the model would lack rows for some. Leave the flag "
            "out, or name another tokenizer."
        )
    if not (flag or known):
        print(
            f"The true vocabulary size is unknown: all {padded} rows are kept, padding included. "
            "--vocab-size cuts it.",
            file=sys.stderr,
        )
    return size


def _null_vocabulary(args: object) -> int | None:
    """Returns the largest id + 1 of a run without a tokenizer, or None."""
    size = getattr(args, "vocab_size", None)
    single = (getattr(args, f"null_tokenizer_{name}_id", None) for name in ("eod", "pad"))
    return size and max([size, *(number + 1 for number in single if number is not None)])


def _write_configs(
    folder: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    carried: Carried | None,
) -> None:
    """Writes `config.json`, and `generation_config.json` unless it was carried."""
    ids = {key: tokenizer.ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = hf_config(shape, str(dtype).removeprefix("torch."))
    both = {**config, **ids} if carried is None else carried.merged_config(config, ids)
    _write_json(folder / CONFIG, both)
    if (folder / GENERATION).exists():
        return
    known = {key: value for key, value in ids.items() if value is not None}
    _write_json(folder / GENERATION, {"_from_model_config": True, **known})


def _is_model(out: Path) -> str | None:
    """Returns why a folder is not an exported model, or None."""
    known = (out / "config.json").is_file()
    return None if known else "holds no config.json, so it is not an exported model"


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _check_shard_size(size: str) -> None:
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?(KB|MB|GB|TB)", size.upper()):
        raise ConversionError(f"--max-shard-size is {size!r}; give a size such as 500MB or 5GB.")
