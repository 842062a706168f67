"""Megatron -> Hugging Face: writes a run's weighting model (DWM) as a sequence classifier."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from megatron_dwm.conversion.dist_checkpoint import find_checkpoint
from megatron_dwm.conversion.dwm_checkpoint import DWMCheckpoint, find_snapshots
from megatron_dwm.conversion.dwm_classifier import (
    LENGTH,
    MODULE,
    TEMPERATURE,
    classifier_config,
    module_source,
)
from megatron_dwm.conversion.export import DTYPES
from megatron_dwm.conversion.output_folder import check_output, complete_or_nothing
from megatron_dwm.conversion.tokenizer_files import PROBES, Tokenizer, find_tokenizer
from megatron_dwm.errors import ConversionError
from megatron_dwm.progress import bar


def export_dwm(
    megatron_path: str,
    hf_path: str,
    iteration: int | None = None,
    all_stages: bool = False,
    dtype: str | None = None,
    tokenizer_model: str | None = None,
    force: bool = False,
) -> None:
    """Exports weighting models; the arguments are the command line's.

    Args:
        megatron_path: Run folder, folder of one iteration, or stage snapshot.
        hf_path: Folder to write.
        iteration: Iteration to use from a run folder; None: the latest.
        all_stages: Write every snapshot of the run to a folder of the same name.
        dtype: A key of `DTYPES`; None keeps the checkpoint's.
        tokenizer_model: Tokenizer to export; None: the run's; `none`: no tokenizer.
        force: Replace a model that a folder already holds.

    Raises:
        ConversionError: Something cannot be converted; the message names it.
    """
    out = Path(hf_path).absolute()
    if all_stages:
        wanted = [(folder, out / folder.name) for folder in find_snapshots(megatron_path)]
        if out.exists() and not out.is_dir():
            raise ConversionError(f"--hf-path {out} is a file; give a folder.")
    else:
        wanted = [(find_checkpoint(megatron_path, iteration), out)]
    for _, target in wanted:
        check_output(target, "--hf-path", force, _foreign)
    notes: dict[str, None] = {}
    for folder, target in wanted:
        line, found = _export_one(folder, target, dtype, tokenizer_model)
        notes.update(dict.fromkeys(found))
        print(line)
    for note in notes:
        print(note, file=sys.stderr)


def _foreign(out: Path) -> str | None:
    """Returns why a folder is not an exported model, or None."""
    return None if (out / "config.json").is_file() else "holds no config.json"


def _export_one(
    source: Path, out: Path, dtype: str | None, tokenizer_model: str | None
) -> tuple[str, list[str]]:
    """Writes one model; returns the line that says so, and notes."""
    checkpoint = DWMCheckpoint(source)
    shape = checkpoint.shape()
    pooling = checkpoint.described["pooling"]
    args = checkpoint.run_args or argparse.Namespace()
    tokenizer = find_tokenizer(args, tokenizer_model)
    if tokenizer.vocab_size is not None and tokenizer.vocab_size > shape.vocab_size:
        raise ConversionError(
            f"the tokenizer has {tokenizer.tokens} tokens with ids up to "
            f"{tokenizer.vocab_size - 1}, and the weighting model in {source} a vocabulary of "
            f"{shape.vocab_size}; give the run's own --tokenizer-model."
        )
    target = DTYPES[dtype] if dtype else checkpoint.dtype
    notes = [*checkpoint.notes, *([tokenizer.note] if tokenizer.note else [])]
    with complete_or_nothing(out) as folder:
        padding, warning = _write_tokenizer(folder, tokenizer, args)
        if warning:
            notes.append(warning)
        rows = shape.vocab_size if padding is None else max(shape.vocab_size, padding + 1)
        padded = dataclasses.replace(shape, vocab_size=rows)
        name = str(target).removeprefix("torch.")
        config = classifier_config(padded, pooling, name, shape.vocab_size, padding)
        config |= {key: tokenizer.ids.get(key) for key in ("bos_token_id", "eos_token_id")}
        config |= {
            key: getattr(args, name)
            for key, name in ((TEMPERATURE, "dwm_temperature"), (LENGTH, "seq_length"))
            if hasattr(args, name)
        }
        text = json.dumps(config, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        if pooling == "mean":
            (folder / MODULE).write_text(module_source(padded), encoding="utf-8")
        _write_weights(folder, checkpoint, shape, rows, target)
    how = f"{pooling} pooling"
    if pooling == "mean":
        how += f" by {MODULE}, so load it with trust_remote_code=True"
    return (
        f"Wrote {out}: weighting model of {source.name}, {shape.num_layers} layers, vocabulary "
        f"{shape.vocab_size}, {name}, {how}."
    ), notes


def _write_weights(
    folder: Path, checkpoint: DWMCheckpoint, shape: Any, rows: int, dtype: torch.dtype
) -> None:
    """Writes the safetensors; the embedding gets a zero row for padding if it needs one."""
    state = {}
    tensors = checkpoint.hf_tensors(shape)
    for name, tensor in bar(None, "tensor", "export-dwm", iterable=tensors):
        if name == "model.embed_tokens.weight":
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.size(0)))
        state[name] = tensor.to(dtype).contiguous().clone()
        if dtype == torch.float16 and not state[name].isfinite().all():
            raise ConversionError(
                f"--dtype fp16 cannot hold the values of {name}; use bf16 or fp32."
            )
    save_torch_state_dict(state, folder)
    # safetensors makes files readable only by their owner.
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


# --------------------------------------------------------------------------------- tokenizer


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer, args: Any
) -> tuple[int | None, str | None]:
    """Writes the tokenizer, with a token for padding that no text contains.

    transformers uses the last token that is not padding, so the padding token must not occur in
    texts: if the tokenizer pads with another special token, or has no padding token, one is added.

    Returns:
        The id of padding, None without a tokenizer that transformers can load; and a warning.
    """
    warning = tokenizer.write(folder)
    if warning or tokenizer.vocab_size is None:
        note = "Batches of several texts need a padding token, and none is set: score one by one."
        return None, f"Warning: {warning} {note}" if warning else None
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    expected = [loaded(text).input_ids for text in PROBES]
    if getattr(args, "tokenizer_hf_no_include_special_tokens", False):
        plain = [loaded(text, add_special_tokens=False).input_ids for text in PROBES]
        if plain != expected:
            # In training, the tokenizer was told to add none.
            loaded.backend_tokenizer.post_processor = None
            expected = plain
    taken = {loaded.eos_token_id, loaded.bos_token_id, loaded.unk_token_id}
    if loaded.pad_token_id is None or loaded.pad_token_id in taken:
        loaded.add_special_tokens({"pad_token": _unused_name(loaded)})
    loaded.padding_side = "right"
    loaded.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    # In a vocabulary with gaps, the new token may get an id that another token has.
    twice = list(again.get_vocab().values()).count(again.pad_token_id) > 1
    same = [again(text).input_ids for text in PROBES] == expected
    if twice or not same or again.pad_token_id in taken:
        raise ConversionError(
            "the tokenizer cannot be given a padding token without reading texts differently; "
            "give --tokenizer-model none to export without a tokenizer."
        )
    return again.pad_token_id, None


def _unused_name(tokenizer: Any) -> str:
    vocabulary = tokenizer.get_vocab()
    name = "<|pad|>"
    while name in vocabulary:
        name = re.sub(r"\|>$", "_|>", name)
    return name
