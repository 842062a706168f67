"""Hugging Face -> Megatron: writes a checkpoint that the stock trainer loads with `--load`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import torch

from megatron_dwm.conversion.carried_files import FOLDER, GENERATION, carry, sort_out
from megatron_dwm.conversion.dist_checkpoint import TRACKER
from megatron_dwm.conversion.export import DTYPES
from megatron_dwm.conversion.families.rope import BUILT_IN_ROPE_FACTOR
from megatron_dwm.conversion.hf_folder import find_weights
from megatron_dwm.conversion.hf_model import HfModel, padded_vocabulary
from megatron_dwm.conversion.output_folder import check_output, complete_or_nothing
from megatron_dwm.conversion.tensor_rules import Rule
from megatron_dwm.conversion.tokenizer_files import largest_id
from megatron_dwm.conversion.torch_dist_writer import chunks, write_checkpoint
from megatron_dwm.conversion.trainer_flags import FLAGS_FILE, trainer_flags
from megatron_dwm.errors import ConversionError, in_short
from megatron_dwm.progress import bar

RELEASE = "release"
# Usual tensor-parallel sizes divide it.
_USUAL_TENSOR_PARALLEL = 8


def import_model(
    hf_path: str,
    megatron_path: str,
    dtype: str | None = None,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    rope_scaling_factor: float | None = None,
    force: bool = False,
) -> None:
    """Imports a model; the arguments are the command line's.

    Everything is checked before the first weight is read, and OUT appears only when complete.

    Args:
        hf_path: Folder with `config.json` and safetensors.
        megatron_path: Folder to write: `release/`, the tracker file, the trainer's flags, the
            tokenizer and other files of the model.
        dtype: A key of `DTYPES`; None keeps the folder's.
        make_vocab_size_divisible_by: Padding of the vocabulary, together with the next.
        tensor_model_parallel_size: The padded vocabulary is a multiple of the product.
        rope_scaling_factor: The factor of a model with Llama 3's RoPE scaling, if the stock
            trainer's is different.
        force: Replace an import that the folder already holds.

    Raises:
        ConversionError: Something cannot be converted; the message names it.
    """
    out = Path(megatron_path).absolute()
    check_output(out, "--megatron-path", force, _foreign)
    for flag, value in (
        ("--make-vocab-size-divisible-by", make_vocab_size_divisible_by),
        ("--tensor-model-parallel-size", tensor_model_parallel_size),
    ):
        if value < 1:
            raise ConversionError(f"{flag} is {value}; give a positive number.")
    if not Path(hf_path).is_dir():
        raise ConversionError(f"--hf-path {hf_path} is not a folder; give one with config.json.")
    model = HfModel(hf_path)
    shape = model.shape
    _check_rope(model, rope_scaling_factor)
    target = DTYPES[dtype] if dtype else _only_dtype(model)
    padded = padded_vocabulary(
        shape.vocab_size, make_vocab_size_divisible_by, tensor_model_parallel_size
    )
    weights = find_weights(hf_path)
    carried, left = sort_out(Path(hf_path), weights)
    kind = _tokenizer(carried)
    notes = _notes(Path(hf_path), kind, shape.vocab_size, padded)
    place = out / FOLDER
    values = {
        **model.family.to_args(shape),
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "padded_vocab_size": padded,
        "vocab_size": shape.vocab_size,
        "hf_vocab_size": shape.vocab_size,
        "tokenizer_type": kind,
        "tokenizer_model": _tokenizer_path(place, kind),
    }

    with complete_or_nothing(out) as folder:
        _write(folder / RELEASE, model, padded, target, argparse.Namespace(**values, **_FIXED))
        carry(Path(hf_path), carried, folder / FOLDER, shape.vocab_size)
        (folder / FLAGS_FILE).write_text(flags_text(out, values), encoding="utf-8")
        (folder / TRACKER).write_text(RELEASE, encoding="utf-8")
    if weights.unread:
        notes.append(
            f"The weights of {weights.chosen.name} are taken, as transformers does; not read: "
            f"{', '.join(weights.unread)}."
        )
    if left:
        notes.append(f"Not carried, as no part of model or tokenizer: {', '.join(left)}.")
    for note in notes:
        print(note, file=sys.stderr)
    print(
        f"Wrote {out}: {model.family.label}, {shape.num_layers} layers, vocabulary "
        f"{shape.vocab_size} in {padded} rows, {str(target).removeprefix('torch.')}. The trainer "
        "needs:\n"
    )
    print(flags_block(flags_text(out, values)))
    if shape.activation == "gelu_new":
        print(
            "\nThis model's GELU is the tanh approximation, which Megatron computes only where it "
            "fuses it with the bias: do not give --no-bias-gelu-fusion.",
            file=sys.stderr,
        )


# An import's arguments beyond the model: how it is stored, and that nothing was trained.
_FIXED = {
    "add_position_embedding": True,
    "ckpt_format": "torch_dist",
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "no_save_optim": True,
    "no_save_rng": True,
}


def flags_text(out: Path, values: dict) -> str:
    """Returns the trainer's flags, with `--load`: one per line, quoted for a shell."""
    flags = [*trainer_flags(values), ["--load", str(out)]]
    return "".join(f"{shlex.join(flag)}\n" for flag in flags)


def flags_block(text: str) -> str:
    """Returns the result of `flags_text` as lines of a shell command."""
    return " \\\n".join(f"    {line}" for line in text.splitlines())


def _write(
    folder: Path,
    model: HfModel,
    padded: int,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> None:
    shape = dataclasses.replace(model.shape, vocab_size=padded)
    rules = model.family.rules(shape)
    total = sum(1 for rule in rules for _ in chunks(rule, shape))
    with bar(total, "tensor", "import") as progress:

        def load(rule: Rule) -> torch.Tensor:
            progress.update()
            return model.load(rule, dtype, padded)

        write_checkpoint(folder, shape, rules, args, dtype, load)


def _only_dtype(model: HfModel) -> torch.dtype:
    if len(model.dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in model.dtypes))
        raise ConversionError(f"{model.folder} mixes {names}; give --dtype with the one to write.")
    return next(iter(model.dtypes))


def _check_rope(model: HfModel, given: float | None) -> None:
    """Refuses RoPE scaling that the stock trainer would not apply, unless the user confirms it."""
    scaling = model.shape.rope_scaling or {}
    factor = float(scaling["factor"]) if scaling.get("rope_type") == "llama3" else None
    if given is not None and given != factor:
        raise ConversionError(
            f"--rope-scaling-factor is {given:g}, and {model.folder} has "
            f"{'no Llama 3 scaling of RoPE' if factor is None else f'{factor:g}'}."
        )
    if factor not in (None, BUILT_IN_ROPE_FACTOR, given):
        raise ConversionError(
            f"{model.folder} scales RoPE by {factor:g}, and Megatron's own builders use "
            f"{BUILT_IN_ROPE_FACTOR:g} whatever --rope-scaling-factor says, so the stock trainer "
            f"would compute another model. Give --rope-scaling-factor {factor:g} if your model "
            "builder sets it."
        )


def _tokenizer(carried: list[str]) -> str:
    """Returns Megatron's tokenizer type for a folder's files."""
    names = set(carried)
    if names & {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json"}:
        return "HuggingFaceTokenizer"
    return "SentencePieceTokenizer" if "tokenizer.model" in names else "NullTokenizer"


def _notes(folder: Path, kind: str, rows: int, padded: int) -> list[str]:
    """Compares tokenizer and model, and returns notes for the user.

    Raises:
        ConversionError: The tokenizer has ids for which the model has no row.
    """
    notes = []
    if padded % _USUAL_TENSOR_PARALLEL:
        notes.append(
            f"The {padded} rows of the vocabulary are split over tensor-parallel ranks: a run's "
            "--tensor-model-parallel-size must divide them. For another size, import with "
            "--tensor-model-parallel-size."
        )
    if kind == "NullTokenizer":
        notes.append(f"{folder} holds no tokenizer, so none is carried.")
        if (folder / GENERATION).is_file():
            notes.append(
                f"{GENERATION} is given back by an export of this import; a run that begins here "
                "has no tokenizer beside which an export of the run would find it."
            )
        return notes
    try:
        ids = largest_id(folder, kind) + 1
    except Exception as error:  # a foreign tokenizer may raise anything
        notes.append(
            f"The tokenizer could not be loaded here ({in_short(error)}), so its size was not "
            "compared with the model's."
        )
        return notes
    if ids > rows:
        raise ConversionError(
            f"{folder}: the tokenizer has ids up to {ids - 1}, and the model {rows} rows, so some "
            "tokens have none. Give the model rows with resize_token_embeddings and save it, or "
            "give its own tokenizer."
        )
    if ids < rows:
        notes.append(
            f"The model has {rows} rows for the {ids} ids of its tokenizer; all are kept, by "
            "--padded-vocab-size."
        )
    return notes


def _tokenizer_path(place: Path, kind: str) -> str | None:
    if kind == "NullTokenizer":
        return None
    return str(place / "tokenizer.model" if kind == "SentencePieceTokenizer" else place)


def _foreign(out: Path) -> str | None:
    """Returns why a folder is not an import, or None; a run started from one is not an import."""
    if not (out / TRACKER).is_file() or not (out / RELEASE).is_dir():
        return f"holds no {RELEASE}/ beside a tracker file, so it is not an import"
    runs = sorted(path.name for path in out.glob("iter_*"))
    return f"holds {runs[-1]}, which a run has saved there" if runs else None
