"""Corpus to Megatron data sets: one per source of a regime, the meta set, the held-out target."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from quality import noise
from quality.plan import LENGTHS, NOISE, OTHERS, PROSE, REGIMES, SCARCE_EPOCHS, Size

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"

SEED = 1234
SURPLUS = 1.15  # of what the longest run reads, so that a source is not read twice for rounding
PIECE = 4000  # characters of a document at most

Encode = Callable[[str], numpy.ndarray]


class DataError(Exception):
    """The data cannot be built; the message says why and what to do."""


def prepare(folder: Path, corpus: Path | None, size: Size) -> dict[str, Any]:
    """Builds what is missing of the data sets.

    Args:
        folder: where they go; with them `data.json`, which is written last.
        corpus: a corpus of `tools/build_demo_corpus.py`; None: one is built beside.
        size: the model, whose tokens and sequence length decide.

    Returns:
        `data.json`: what the data was made from, and tokens and documents of each data set.

    Raises:
        DataError: with one line for the user.
    """
    wanted = {"sequence": size.sequence, "vocabulary": size.vocabulary, "tokens": size.tokens}
    done = folder / "data.json"
    if done.exists():
        found = json.loads(done.read_text())
        if {name: found.get(name) for name in wanted} == wanted:
            return found
        raise DataError(
            f"{done} is of other runs ({ {n: found.get(n) for n in wanted} }, now {wanted}); give "
            "another --out, or remove the folder"
        )
    if corpus is None:
        corpus = folder.parents[1] / "corpus"
        build_corpus(corpus)
    check_corpus(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    encode, eod = encoder(folder, corpus, size)
    made: dict[str, Any] = {**wanted, "corpus": digest(corpus), "sets": {}}
    for name, tokens in sources(corpus, encode, size):
        made["sets"][name] = write(folder / name, tokens, eod, size.vocabulary)
        print(f"{name:22} {made['sets'][name]['tokens']:>10} tokens", flush=True)
    partial = folder / "data.json.part"
    partial.write_text(json.dumps(made, indent=1))
    os.replace(partial, done)
    return made


def build_corpus(folder: Path) -> None:
    """Builds the corpus unless it is there."""
    if not (folder / "manifest.json").exists():
        command = [sys.executable, str(TOOLS / "build_demo_corpus.py"), "--out", str(folder)]
        if subprocess.run(command, check=False).returncode:
            raise DataError(f"the corpus could not be built in {folder}; see above")


def check_corpus(folder: Path) -> None:
    """Refuses a folder that is not a corpus with all domains."""
    needed = [f"train/{n}.jsonl" for n in (*PROSE, *OTHERS)]
    needed += ["target/meta.jsonl", "target/valid.jsonl", "manifest.json"]
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise DataError(
            f"--corpus {folder} lacks {', '.join(missing)}; build it with all domains: "
            f"tools/build_demo_corpus.py --out {folder}"
        )


def digest(corpus: Path) -> str:
    """Returns what tells two corpora apart."""
    files = json.loads((corpus / "manifest.json").read_text())["files"]
    sums = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(sums.encode()).hexdigest()[:16]


def encoder(folder: Path, corpus: Path, size: Size) -> tuple[Encode, int]:
    """Returns text to token ids, and the end-of-document id."""
    if size.vocabulary == 256:
        # UTF-8 has no byte 255.
        return lambda text: numpy.frombuffer(text.encode(), numpy.uint8).astype(numpy.int64), 255
    from megatron_dwm.cli import tokenizer as command
    from megatron_dwm.corpus.preprocess_workers import (
        build_megatron_tokenizer,
        quiet_megatron_import,
    )

    inputs = sorted(str(p) for p in (corpus / "train").glob("*.jsonl"))
    words = ["--input", *inputs, "--out", str(folder / "tokenizer"), "--skip-existing"]
    if command.main([*words, "--vocab-size", str(size.vocabulary)]):
        raise DataError(f"the tokenizer could not be trained in {folder}; see above")
    with quiet_megatron_import():
        tokenizer = build_megatron_tokenizer(
            argparse.Namespace(
                tokenizer_type="SentencePieceTokenizer",
                tokenizer_model=str(folder / "tokenizer.model"),
                append_eod=True,
                vocab_file=None,
                merge_file=None,
            )
        )
    return lambda text: numpy.asarray(tokenizer.tokenize(text), numpy.int64), tokenizer.eod


def sources(
    corpus: Path, encode: Encode, size: Size
) -> Iterator[tuple[str, Iterator[numpy.ndarray]]]:
    """Yields the name of each data set and its documents as token ids, as many as are needed."""
    longest = size.tokens * max(LENGTHS) * SURPLUS

    def limit(name: str) -> float:
        return longest * max(regime.shares.get(name, 0) for regime in REGIMES.values())

    def cut(name: str, documents: Iterable[numpy.ndarray]) -> tuple[str, Iterator[numpy.ndarray]]:
        return name, up_to(limit(name), documents)

    prose: list[str] = []
    for name in PROSE:
        pieces = read_pieces(corpus, f"train/{name}")
        prose += pieces[: 2_000_000 // PIECE]
        yield cut(name, map(encode, pieces))
        yield cut(f"shuffled_{name}", shuffled(map(encode, pieces), size.sequence + 1))
        scarce = size.tokens * REGIMES["scarce"].shares[f"scarce_{name}"] / SCARCE_EPOCHS
        yield f"scarce_{name}", up_to(scarce, map(encode, pieces))
    for name in OTHERS:
        yield cut(name, map(encode, read_pieces(corpus, f"train/{name}")))
    yield from (cut(name, map(encode, texts)) for name, texts in noisy(corpus, prose).items())
    for name in ("meta", "valid"):
        yield name, map(encode, read_texts(corpus, f"target/{name}"))


def noisy(corpus: Path, prose: list[str]) -> dict[str, Iterator[str]]:
    """Returns the documents of each kind of natural noise."""
    rng = random.Random(SEED)
    rng.shuffle(prose)
    pages = noise.page_heads(read_texts(corpus, "train/html"), 400)[:200]
    found = {
        "ocr": (noise.scan(text, rng) for text in itertools.cycle(prose)),
        "boilerplate": noise.boilerplate(pages, random.Random(SEED + 1)),
        "duplicates": noise.near_duplicates(prose, random.Random(SEED + 2)),
        "language": iter(read_pieces(corpus, "train/multilingual")),
    }
    assert found.keys() == NOISE.keys()
    return found


def shuffled(documents: Iterable[numpy.ndarray], block: int) -> Iterator[numpy.ndarray]:
    """Yields each document with its tokens shuffled within blocks."""
    for k, tokens in enumerate(documents):
        yield noise.shuffle_blocks(tokens, block, SEED + k)


def up_to(limit: float, documents: Iterable[numpy.ndarray]) -> Iterator[numpy.ndarray]:
    """Yields documents until there are `limit` tokens; the last one is cut off there."""
    left = int(limit)
    for tokens in documents:
        if left <= 0:
            return
        yield tokens[:left]
        left -= len(tokens) + 1


def read_texts(corpus: Path, name: str) -> list[str]:
    """Returns the texts of a file of the corpus in a fixed, shuffled order."""
    with open(corpus / f"{name}.jsonl") as file:
        texts = [json.loads(line)["text"] for line in file]
    random.Random(SEED).shuffle(texts)
    return texts


def read_pieces(corpus: Path, name: str) -> list[str]:
    """Returns the texts of a file, cut between paragraphs into pieces, in a fixed, shuffled order.

    Few tokens of a source then still come from many documents.
    """
    # The folder of the command that builds the corpus, no package of its own.
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    from demo_corpus.corruption import cut_paragraphs

    texts = read_texts(corpus, name)
    pieces = [piece for text in texts for piece in cut_paragraphs(text, PIECE)]
    random.Random(SEED).shuffle(pieces)
    return pieces


def write(
    prefix: Path, documents: Iterable[numpy.ndarray], eod: int, vocabulary: int
) -> dict[str, int]:
    """Writes an indexed data set, `eod` after each document; returns tokens and documents."""
    from megatron_dwm.corpus.preprocess_workers import quiet_megatron_import

    with quiet_megatron_import():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    dtype = DType.optimal_dtype(vocabulary)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    made = {"tokens": 0, "documents": 0}
    for tokens in documents:
        ids = numpy.append(tokens, eod).astype(dtype)
        builder.add_document(ids, [len(ids)])
        made["tokens"] += len(ids)
        made["documents"] += 1
    builder.finalize(f"{prefix}.idx")
    return made


def data_flags(folder: Path, size: Size, regime: str) -> list[str]:
    """Returns the trainer's data flags for a regime."""
    blend: list[str] = []
    for name, share in REGIMES[regime].shares.items():
        blend += [f"{share:g}", str(folder / name)]
    words = ["--train-data-path", *blend, "--valid-data-path", str(folder / "valid")]
    if size.vocabulary == 256:
        return [*words, "--tokenizer-type", "NullTokenizer", "--vocab-size", "256"]
    words += ["--tokenizer-type", "SentencePieceTokenizer"]
    return [*words, "--tokenizer-model", str(folder / "tokenizer.model")]
