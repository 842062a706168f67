"""Made-up texts, a corpus of them, and a tokenizer trained on it."""

import json
import random
from pathlib import Path

import pytest

from megatron_dwm.cli import tokenizer as train_tokenizer

WORDS = (
    "the cat sat on a mat while 42 dogs ran home; Zürich ate naïve soup, twice (or thrice)".split()
)


def make_text(rng: random.Random, words: int) -> str:
    separators = [" "] * 12 + ["  ", "\n", "\n\n", "\n    ", "\t", " \n"]
    return "".join(rng.choice(WORDS) + rng.choice(separators) for _ in range(words))


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [make_text(rng, rng.randint(1, 400)) for _ in range(300)]


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    argv = ["--input", str(corpus), "--out", str(prefix), "--vocab-size", "320"]
    assert train_tokenizer.main(argv) == 0
    return Path(f"{prefix}.model")


@pytest.fixture(scope="module")
def pieces(model):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model))
