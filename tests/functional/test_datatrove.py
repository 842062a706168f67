"""Blocks for datatrove: two tasks, one of them killed and run again, and the commands' bytes.

Pipelines run in a process of their own (run_datatrove.py), so that datatrove's log stays there.
Not exercised here: SLURM and Ray executors, several machines, GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove")
from megatron_dwm.cli import dsir, preprocess, tokenizer
from megatron_dwm.data.weight_file import read_weights
from megatron_dwm.errors import InputError
from tests.functional.harness import ROOT, environment

WORDS = "the cat sat on a mat while 42 dogs ran home; Zürich ate naïve soup, twice".split()


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(count)]


def write_lines(path: Path, values: list) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, a tokenizer, and what the commands make of them: `whole...`."""
    folder = tmp_path_factory.mktemp("datatrove")
    write_lines(folder / "input/a.jsonl", texts(1, 90))
    write_lines(folder / "input/b.jsonl", ["", *texts(2, 40), ["two", "", "sequences"], [], [""]])
    (folder / "input/c.txt").write_text("A plain text file.\n\nOne document.")
    (folder / "input/d.jsonl").write_text("\n")
    write_lines(folder / "input/e.jsonl", texts(3, 50))
    write_lines(folder / "target/t.jsonl", texts(4, 30))
    files = ["--input", f"{folder}/input/*"]
    train = [*files, "--out", f"{folder}/tokenizer", "--vocab-size", "300"]
    assert tokenizer.main(train) == 0
    words = [*files, "--output-prefix", f"{folder}/whole", "--append-eod", "--workers", "1"]
    words += ["--tokenizer-type", "SentencePieceTokenizer"]
    assert preprocess.main([*words, "--tokenizer-model", f"{folder}/tokenizer.model"]) == 0
    words = [*files, "--target", f"{folder}/target/*", "--output", f"{folder}/whole.csv"]
    assert dsir.main([*words, "--select", "0.3", "--workers", "1"]) == 0
    return folder


def start(name: str, folder: Path, *rank_to_kill: str) -> subprocess.Popen:
    words = ["-m", "tests.functional.run_datatrove", name, str(folder), *rank_to_kill]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run_killed_and_again(name: str, folder: Path, rank: str) -> None:
    """Runs a pipeline until the task has killed itself, ends the executor, and runs it again."""
    first = start(name, folder, rank)
    log = folder / f"{name}.log"
    try:
        deadline = time.monotonic() + 240
        while not (folder / "killed").exists():
            assert first.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    done = [path.name for path in (folder / "log/0/completions").iterdir()]
    assert done == [f"{1 - int(rank):05d}"]
    again = start(name, folder, rank)
    assert again.wait(timeout=240) == 0, log.read_text()[-3000:]
    assert "Skipping 1 already completed tasks" in log.read_text()


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A folder with the inputs, and nothing of another test."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_indexed_data_set_is_that_of_preprocess(own: Path) -> None:
    run_killed_and_again("indexed", own, "0")
    for suffix in ("bin", "idx"):
        found = (own / f"blocks_text_document.{suffix}").read_bytes()
        assert found == (own / f"whole_text_document.{suffix}").read_bytes()
    assert not (own / "blocks_text_document.parts").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_dsir_file_is_that_of_the_command(own: Path, rank: str) -> None:
    run_killed_and_again("dsir", own, rank)
    assert (own / "blocks.csv").read_bytes() == (own / "whole.csv").read_bytes()
    assert not (own / "blocks.csv.parts").exists()


def test_weights_are_those_of_score(own: Path) -> None:
    from tests.functional.test_score_corpus import write_classifier

    write_classifier(str(own / "hf"), vocab_size=300)
    command = ["--data", f"{own}/whole_text_document", "--hf", f"{own}/hf", "--seq-length", "32"]
    command += ["--chunk-tokens", "300", "--temperature", "0.5", "--output", f"{own}/whole.weights"]
    subprocess.run(
        [sys.executable, "-m", "megatron_dwm", "score", *command],
        cwd=ROOT,
        env=environment(),
        check=True,
        capture_output=True,
        timeout=240,
    )
    run_killed_and_again("score", own, "1")
    found, expected = (read_weights(own / f"{name}.weights") for name in ("blocks", "whole"))
    assert len(np.unique(expected.weights)) > 100
    assert found.weights.tobytes() == expected.weights.tobytes()
    assert not (own / "blocks.weights.scores").exists()


def test_the_pipeline_of_the_docs_runs(folder: Path, tmp_path: Path) -> None:
    """As it stands there, with two tasks for 16; what it leaves is what the commands make."""
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "text").mkdir()
    for number, path in enumerate(sorted((folder / "input").glob("*.jsonl"))):
        packed = zstandard.ZstdCompressor().compress(path.read_bytes())
        (tmp_path / f"text/{number}.jsonl.zst").write_bytes(packed)
    (tmp_path / "target.jsonl").symlink_to(folder / "target/t.jsonl")
    (tmp_path / "tokenizer.model").symlink_to(folder / "tokenizer.model")
    (code,) = re.findall(
        r"^```python\n(from datatrove.*?)^```",
        (ROOT / "docs/weight_files.md").read_text(),
        re.S | re.M,
    )
    assert "16" in code
    (tmp_path / "pipeline.py").write_text(code.replace("16", "2"))
    script = {"args": [sys.executable, "pipeline.py"], "cwd": tmp_path, "env": environment()}
    done = subprocess.run(**script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    argv = ["--input", f"{tmp_path}/text/*", "--target", f"{tmp_path}/target.jsonl"]
    argv += ["--output", f"{tmp_path}/own.csv", "--select", "0.25", "--workers", "1"]
    assert dsir.main(argv) == 0
    assert (tmp_path / "web.csv").read_bytes() == (tmp_path / "own.csv").read_bytes()
    assert (tmp_path / "data/web_text_document.idx").stat().st_size > 1000


# ---------------------------------------------------------------------------------- in one process


def test_a_block_between_leaves_out_documents_and_changes_texts(folder: Path, tmp_path: Path):
    """Parts are made of what comes through: the first file is left out, others are in capitals."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_dwm.corpus.datatrove_blocks import MergeIndexed, ReadTexts, WriteIndexed

    settings = {"tokenizer_type": "NullTokenizer", "vocab_size": 100}
    for number in range(3):
        values = [f"{10 * number + k}" for k in range(4)]
        write_lines(tmp_path / f"in/{number}.jsonl", [*values, ["1", "2"]])

    def between(documents):
        for document in documents:
            if document.metadata["file_number"] and document.text != "22":
                document.text = f"{document.text.replace(chr(10), ' ')} 99"
                yield document

    for rank in (1, 0):
        read = ReadTexts([f"{tmp_path}/in/*"])
        write = WriteIndexed(f"{tmp_path}/out", **settings)
        for _ in write.run(between(read.run(None, rank, 2)), rank, 2):
            pass
    MergeIndexed(f"{tmp_path}/out").run()
    data = IndexedDataset(f"{tmp_path}/out_text_document")
    found = [data.get(n).tolist() for n in range(len(data))]
    assert found == [
        *([n, 99] for n in (10, 11, 12, 13)),
        [1, 2, 99],
        *([n, 99] for n in (20, 21, 23)),
        [1, 2, 99],
    ]


def test_what_is_missing_or_does_not_belong_together_is_refused(folder: Path, tmp_path: Path):
    from megatron_dwm.corpus.datatrove_blocks import (
        DsirCounts,
        DsirScores,
        MergeDsir,
        MergeIndexed,
        ReadTexts,
        WriteIndexed,
    )

    def taken(*steps, rank=0, tasks=1):
        data = None
        for step in steps:
            data = step.run(data, rank, tasks)
        for _ in data or ():
            pass

    def read():
        return ReadTexts([f"{folder}/input/*"])

    output = f"{tmp_path}/o.csv"
    with pytest.raises(InputError, match="files none: no such file"):
        ReadTexts(["none"])
    with pytest.raises(InputError, match="tokeniser_type: no such setting"):
        WriteIndexed("x", tokeniser_type="NullTokenizer")
    with pytest.raises(InputError, match="tokenizer_type: missing"):
        WriteIndexed("x")
    with pytest.raises(InputError, match="indexed of no tasks of WriteIndexed"):
        taken(MergeIndexed(f"{tmp_path}/o"))
    with pytest.raises(InputError, match="tasks=1, not 2"):
        taken(MergeIndexed(f"{tmp_path}/o"), tasks=2)
    with pytest.raises(InputError, match="target-counts of no tasks"):
        taken(read(), DsirScores(output))
    taken(read(), DsirCounts(output, target=True))
    taken(read(), DsirCounts(output), tasks=2)
    with pytest.raises(InputError, match="input-counts number 1 of 2 tasks .* is missing"):
        taken(read(), DsirScores(output))
    taken(read(), DsirCounts(output, ngrams=3), rank=1, tasks=2)
    with pytest.raises(InputError, match="different ngrams or buckets"):
        taken(read(), DsirScores(output))
    taken(read(), DsirCounts(output), rank=1, tasks=2)
    taken(read(), DsirScores(output), tasks=2)
    with pytest.raises(InputError, match="scores number 1 of 2 tasks"):
        taken(MergeDsir(output))
    taken(read(), DsirScores(output), tasks=3)
    with pytest.raises(InputError, match="scores of 2 and 3 tasks .* remove the folder"):
        taken(MergeDsir(output))
