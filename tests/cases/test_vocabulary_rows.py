"""The flags that an import prints build exactly the rows of vocabulary that it has written.

Megatron pads the tokenizer's size; a Hugging Face model may have any number of rows beside it (Qwen
has 271 more than its tokenizer has ids), and the trainer loads an embedding into a smaller one
without a word. The truth is what Megatron's own parser, checks and tokenizer make of the flags at
the tensor-parallel size of the run.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402
from megatron.training.arguments import parse_args, validate_args  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from megatron_dwm.cli.convert.command import main  # noqa: E402
from megatron_dwm.conversion import (  # noqa: E402
    TorchDistCheckpoint,
    find_checkpoint,
    iter_hf_tensors,
)
from megatron_dwm.errors import DWMError  # noqa: E402
from tests import tiny_hf_models  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WORDS = "embedding.word_embeddings.weight"
RUN = "--micro-batch-size 1 --seq-length 64".split()


def write_model(folder, rows, tokens=None, largest=None):
    """Writes a Llama of `rows` rows with a tokenizer of `tokens` tokens, the last id `largest`."""
    values = {**tiny_hf_models.MODELS["llama_tied"][1], "vocab_size": rows}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)
    if tokens is not None:
        vocabulary = {f"t{i}": i for i in range(tokens - 1)}
        vocabulary["<e>"] = tokens - 1 if largest is None else largest
        raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<e>"))
        fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>")
        fast.save_pretrained(folder)
    return folder


def take_in(folder, run, capsys, *flags):
    """Imports a model; returns the words of the flags that were printed."""
    capsys.readouterr()
    assert main(["import", "--hf-path", str(folder), "--megatron-path", str(run), *flags]) == 0
    printed = capsys.readouterr().out.partition("needs:\n\n")[2]
    return shlex.split(printed.replace("\\\n", " "))


def rows_that_megatron_builds(words, tensor_parallel, monkeypatch):
    """Returns the rows of the model that Megatron builds from flags, by its own functions."""
    monkeypatch.setenv("WORLD_SIZE", str(tensor_parallel))
    monkeypatch.setenv("RANK", "0")
    layout = ["--tensor-model-parallel-size", str(tensor_parallel)]
    monkeypatch.setattr(sys, "argv", ["run", *cpu.default_flags(), *words, *RUN, *layout])
    args = parse_args()
    validate_args(args)
    build_tokenizer(args)
    config = gpt_config_from_args(args)
    assert not config.should_pad_vocab
    assert config.vocab_size % tensor_parallel == 0, "Megatron splits the rows evenly"
    return config.vocab_size


@pytest.mark.parametrize(
    ("rows", "tokens", "flags", "tensor_parallel"),
    [
        (640, 500, "", 1),
        (640, 500, "", 2),
        (640, 500, "--make-vocab-size-divisible-by 1", 4),
        (640, None, "", 2),
        (1280, 129, "--tensor-model-parallel-size 2", 1),
        (300, 250, "", 1),
        (300, 300, "", 4),
        (302, 100, "--make-vocab-size-divisible-by 1", 2),
        (300, 100, "--make-vocab-size-divisible-by 7 --tensor-model-parallel-size 2", 1),
        (128, 128, "", 1),
    ],
)
def test_flags_build_what_was_written(
    tmp_path, capsys, monkeypatch, rows, tokens, flags, tensor_parallel
):
    folder = write_model(tmp_path / "hf", rows, tokens)
    words = take_in(folder, tmp_path / "run", capsys, *flags.split())
    stored = TorchDistCheckpoint(find_checkpoint(tmp_path / "run")).load(WORDS)
    assert rows_that_megatron_builds(words, tensor_parallel, monkeypatch) == len(stored)
    original = dict(iter_hf_tensors(folder))["model.embed_tokens.weight"]
    assert torch.equal(stored[:rows], original) and not stored[rows:].any()


def test_rows_that_few_sizes_divide_are_said(tmp_path, capsys):
    folder = write_model(tmp_path / "hf", 301, 301)
    words = ["import", "--hf-path", str(folder), "--megatron-path"]
    assert main([*words, str(tmp_path / "a"), "--make-vocab-size-divisible-by", "1"]) == 0
    assert "--tensor-model-parallel-size must divide them" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "b")]) == 0
    assert "must divide" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "largest", "fits"), [(250, None, True), (251, None, False), (100, 250, False)]
)
def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path, capsys, tokens, largest, fits):
    folder = write_model(tmp_path / "hf", 250, tokens, largest)
    capsys.readouterr()
    words = ["import", "--hf-path", str(folder), "--megatron-path", str(tmp_path / "run")]
    assert (main(words) == 0) is fits
    message = capsys.readouterr().err
    assert fits or ("the tokenizer has ids up to 250, and the model 250 rows" in message)
    assert fits or (message.count("\n") == 1 and not (tmp_path / "run").exists())


def test_a_tokenizer_with_fewer_ids_is_said(tmp_path, capsys):
    folder = write_model(tmp_path / "hf", 640, 500)
    words = ["import", "--hf-path", str(folder), "--megatron-path", str(tmp_path / "run")]
    assert main(words) == 0
    assert "640 rows for the 500 ids of its tokenizer" in capsys.readouterr().err


def verify(run, folder):
    """Runs `verify` in a process of its own; returns its status and what it says."""
    words = ["verify", "--megatron-path", str(run), "--hf-path", str(folder), "--tokens", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_dwm", "convert", *words],
        cwd=ROOT,
        env={**os.environ, "MEGATRON_DWM_HOST": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_verify_builds_from_the_printed_flags(tmp_path, capsys):
    """It agrees with them as they are, and sees one that is changed or lost."""
    folder = write_model(tmp_path / "hf", 640, 500)
    run = tmp_path / "run"
    words = take_in(folder, run, capsys)
    path = run / "trainer_flags.txt"
    text = path.read_text()
    assert shlex.split(text) == words
    status, said = verify(run, folder)
    assert status == 0, said

    path.write_text(text.replace("--padded-vocab-size 640\n", ""))
    status, said = verify(run, folder)
    assert status == 2
    assert "has 640 rows of vocabulary, and its flags build 512" in said

    path.write_text(text.replace("--norm-epsilon 0.0001", "--norm-epsilon 0.1"))
    status, said = verify(run, folder)
    assert status == 1, said
    assert "DO NOT AGREE" in said


def test_verify_still_works_where_the_folder_was_moved(tmp_path, capsys):
    folder = write_model(tmp_path / "hf", 640, 500)
    take_in(folder, tmp_path / "run", capsys)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    status, said = verify(tmp_path / "elsewhere", folder)
    assert status == 0, said


def trained(run, out, **changes):
    """Writes an import's weights as a run does that began with it: with the run's arguments."""
    checkpoint = TorchDistCheckpoint(find_checkpoint(run))
    state = {key: checkpoint.load(key).clone() for key in checkpoint.tensors}
    dist_checkpoint.save(state, checkpoint_id=out / "iter_0000003", no_dist=True)
    args = {k: v for k, v in vars(checkpoint.args).items() if k != "hf_vocab_size"}
    saved = {"args": argparse.Namespace(**{**args, **changes}), "iteration": 3}
    torch.save(saved, out / "iter_0000003" / "common.pt")
    return out / "iter_0000003"


@pytest.mark.parametrize(("rows", "tokens"), [(640, 500), (300, 200)])
def test_an_export_after_training_has_all_rows(tmp_path, capsys, rows, tokens):
    folder = write_model(tmp_path / "hf", rows, tokens)
    take_in(folder, tmp_path / "run", capsys)
    run = trained(tmp_path / "run", tmp_path / "later")
    back = tmp_path / "back"
    assert main(["export", "--megatron-path", str(run), "--hf-path", str(back)]) == 0
    name = "model.embed_tokens.weight"
    assert torch.equal(dict(iter_hf_tensors(back))[name], dict(iter_hf_tensors(folder))[name])
    assert json.loads((back / "config.json").read_text())["vocab_size"] == rows


@pytest.mark.parametrize(
    ("saved", "built", "tokenizer", "refused"),
    [
        ({"padded_vocab_size": 640, "hf_vocab_size": 640}, 512, 500, True),
        ({"padded_vocab_size": 640, "hf_vocab_size": 500}, 512, 500, False),
        ({"padded_vocab_size": 640, "hf_vocab_size": 640}, 640, 500, False),
        # A run's own: 512 is what the rule gives for 500 tokens at this size, 640 is not.
        ({"padded_vocab_size": 640, "tensor_model_parallel_size": 1}, 512, 500, True),
        ({"padded_vocab_size": 640, "tensor_model_parallel_size": 1}, 768, 500, False),
        # The padding of a larger tensor-parallel size: nothing but padding is dropped.
        ({"padded_vocab_size": 1024, "tensor_model_parallel_size": 8}, 512, 500, False),
        ({"padded_vocab_size": 640, "tensor_model_parallel_size": 1}, 512, None, False),
    ],
)
def test_a_run_does_not_drop_rows_silently(tmp_path, saved, built, tokenizer, refused):
    from megatron_dwm.hosts.megatron_lm.load_check import check_vocabulary

    args = argparse.Namespace(make_vocab_size_divisible_by=128, **saved)
    torch.save({"args": args, "iteration": 1}, tmp_path / "common.pt")
    run = argparse.Namespace(load=str(tmp_path), padded_vocab_size=built)
    if not refused:
        check_vocabulary(run, str(tmp_path), tokenizer)
        return
    with pytest.raises(DWMError, match="give --padded-vocab-size 640"):
        check_vocabulary(run, str(tmp_path), tokenizer)
