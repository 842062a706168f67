"""What the tutorials share: synthetic text, and a small run of the trainer."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import socket
import sys
from pathlib import Path
from typing import Any

from megatron_dwm.cli.main import main as megatron_dwm
from megatron_dwm.hosts import cpu
from megatron_dwm.logs.compare import read_run

cpu.install()  # on a machine with a GPU it does nothing

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_dwm.py"
# A Llama of 2 layers of 64 that reads 32 samples of 32 tokens a step.
MODEL = """
--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--seq-length 32 --max-position-embeddings 32 --micro-batch-size 32 --global-batch-size 32
--lr 5e-3 --lr-decay-style constant --clip-grad 1.0 --seed 1 --num-workers 0
--no-create-attention-mask-in-dataloader --tokenizer-type SentencePieceTokenizer
--tokenizer-model tokenizer.model --log-interval 10 --eval-interval 20 --eval-iters 4
--save-interval 1000
""".split()
_SYLLABLES = ["ka", "lo", "mi", "ren", "tu", "sal", "ver", "po", "nim", "da"]
_WORDS = ["".join(random.Random(k).choices(_SYLLABLES, k=3)) for k in range(24)]


def text(documents: int, seed: int, shuffled: bool = False) -> list[dict[str, str]]:
    """Makes documents of made-up words.

    Args:
        documents: number of documents.
        seed: seed of the text. Each word is followed by one of two others, so that there is
            something to learn.
        shuffled: put the words of each document in random order, so that there is nothing to learn.
    """
    draw, found, at = random.Random(seed), [], seed % len(_WORDS)
    for _ in range(documents):
        words = []
        for _ in range(draw.randint(30, 60)):
            at = (7 * at + draw.choice([1, 2])) % len(_WORDS)
            words.append(_WORDS[at])
        if shuffled:
            draw.shuffle(words)
        found.append({"text": " ".join(words) + "."})
    return found


def write(path: str, documents: list[dict[str, str]]) -> None:
    """Writes documents as JSON Lines."""
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in documents))


def command(words: str) -> None:
    """Runs `megatron-dwm WORDS`, and ends the tutorial if it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = megatron_dwm(words.split())
    if code:
        raise RuntimeError(f"megatron-dwm {words}\n{said.getvalue()}")


def data_set(name: str, documents: list[dict[str, str]]) -> str:
    """Makes a Megatron data set from documents; returns its prefix."""
    write(f"{name}.jsonl", documents)
    command(
        f"preprocess --input {name}.jsonl --output-prefix {name} --append-eod --workers 1"
        " --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
    )
    return f"{name}_text_document"


def data_sets() -> tuple[str, str, str, str]:
    """Makes a tokenizer and the first tutorial's data sets.

    Returns:
        Prefixes of good text, noise, the meta set and the validation set.
    """
    write("good.jsonl", text(200, seed=1))
    command("tokenizer --input good.jsonl --out tokenizer --vocab-size 300")
    return (
        data_set("good", text(200, seed=1)),
        data_set("noise", text(200, seed=2, shuffled=True)),
        data_set("meta", text(100, seed=3)),
        data_set("valid", text(60, seed=4)),
    )


def print_weights(lines: list[dict[str, Any]], figure: str) -> None:
    """Prints a metric and the mean weight by data set for every 20th line of a step log."""
    for line in lines[19::20]:
        by_name = sorted(line["domain_weight"].items())
        weights = "   ".join(f"{name.split('_')[0]} {w:.2f}" for name, w in by_name)
        print(f"step {line['iteration']:3d}   {figure} {line[figure]:5.2f}   {weights}")


def train(name: str, flags: str) -> None:
    """Runs `megatron-dwm train pretrain_dwm.py MODEL FLAGS`, with its output in `NAME.log`.

    It runs on one rank, in a process forked from this one: importing the trainer again would take
    longer than these runs.
    """
    words = ["train", str(SCRIPT), *MODEL, *flags.split(), "--data-cache-path", "cache"]
    process = multiprocessing.get_context("fork").Process(target=_run, args=(name, words))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(Path(f"{name}.log").read_text()[-3000:])


def _run(name: str, words: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = port
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    raise SystemExit(megatron_dwm(words + cpu.default_flags()))


def validation_losses(name: str) -> tuple[list[int], list[float]]:
    """Reads steps and validation losses from a run's output."""
    losses = read_run(name, f"{name}.log").losses
    return list(losses), list(losses.values())


def log_of(folder: str) -> list[dict[str, Any]]:
    """Reads the step log in a run's folder."""
    lines = (Path(folder) / "dwm_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
