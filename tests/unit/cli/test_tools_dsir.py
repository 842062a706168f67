"""`megatron-dwm dsir`: rows, workers, killed runs, bad input, and the way into a weight file."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.cli import dsir
from megatron_dwm.corpus import dsir_run, text_batches
from tests.unit.restated_dsir import buckets_of

ROOT = Path(__file__).resolve().parents[3]
# The second has no text, nor has the third; the last one is of several sequences.
MIXED = ["One fish.", "", ["", ""], "  ", ["two fish", "", "Red fish, blue fish"]]


def write_lines(path: Path, texts: list) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def files(tmp_path: Path, texts: list[str]) -> list[Path]:
    """Inputs of all kinds, one without any document among them."""
    (tmp_path / "c.txt").write_text("A plain text file.\n\nOne document.")
    (tmp_path / "d.jsonl").write_bytes(b"\n\n")
    return [
        write_lines(tmp_path / "a.jsonl", texts[:150]),
        write_lines(tmp_path / "b.jsonl.gz", [*MIXED, *texts[150:200]]),
        tmp_path / "c.txt",
        tmp_path / "d.jsonl",
        write_lines(tmp_path / "e.jsonl", texts[200:280]),
    ]


@pytest.fixture
def target(tmp_path: Path, texts: list[str]) -> Path:
    return write_lines(tmp_path / "target.jsonl", ["", *texts[280:], "Red fish, blue fish"])


def command(files: list[Path], target: Path, output: Path, *more: str) -> list[str]:
    argv = ["--input", *map(str, files), "--target", str(target), "--output", str(output)]
    return [*argv, "--workers", "1", *more]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "ngrams", "buckets", "smoothing"),
    [([], 2, 10_000, 0), (["--ngrams", "3", "--buckets", "50", "--smoothing", "0.5"], 3, 50, 0.5)],
)
def test_rows_are_those_of_the_plain_restatement(
    files, target, texts, tmp_path, capsys, more, ngrams, buckets, smoothing
):
    output = tmp_path / "new" / "out.csv"
    assert dsir.main(command(files, target, output, *more)) == 0
    documents = [*texts[:150], MIXED[0], MIXED[3], "two fish\nRed fish, blue fish"]
    documents += [*texts[150:200], (tmp_path / "c.txt").read_text(), *texts[200:280]]

    def shares(all_texts: list[str], pseudo: float) -> list[float]:
        found = [b for text in all_texts for b in buckets_of(text, ngrams, buckets)]
        counts = np.bincount(found, minlength=buckets) + pseudo
        return (counts / counts.sum()).tolist()

    p = shares([*texts[280:], "Red fish, blue fish"], smoothing)
    q = shares(documents, 0)
    found = rows(output)
    assert list(found[0]) == ["document", "log_weight", "ngrams"]
    assert [row["document"] for row in found] == [str(n) for n in range(len(documents))]
    for row, text in zip(found, documents, strict=True):
        own = list(buckets_of(text, ngrams, buckets))
        expected = sum(math.log(p[b] + 1e-8) - math.log(q[b] + 1e-8) for b in own)
        assert float(row["log_weight"]) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert int(row["ngrams"]) == len(own)
    assert f"{len(documents)} documents" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["out.csv"]


def test_bytes_are_the_same_for_any_number_of_workers(files, target, tmp_path, monkeypatch):
    # Many batches, so that their order is at stake.
    monkeypatch.setattr(text_batches, "BLOCK_BYTES", 2000)
    found = set()
    for workers in "123":
        output = tmp_path / f"{workers}.csv"
        more = ["--select", "0.3", "--workers", workers]
        assert dsir.main(command(files, target, output, *more)) == 0
        found.add(output.read_bytes())
    assert len(found) == 1


def test_selection_goes_by_fraction_seed_and_length(files, target, tmp_path):
    def selected(*more: str) -> list[int]:
        output = tmp_path / "out.csv"
        assert dsir.main(command(files, target, output, *more)) == 0
        found = rows(output)
        least = int(more[more.index("--min-ngrams") + 1]) if "--min-ngrams" in more else 0
        assert all(int(row["ngrams"]) >= least for row in found if row["selected"] == "1")
        return [int(row["document"]) for row in found if row["selected"] == "1"]

    first = selected("--select", "0.1")
    assert len(first) == 28  # of 284
    assert selected("--select", "0.1") == first
    assert selected("--select", "0.1", "--seed", "5") != first
    assert len(selected("--select", "1", "--min-ngrams", "300")) < 284


def test_the_file_fits_the_data_set_that_preprocess_makes(files, target, model, tmp_path):
    from megatron_dwm.cli import preprocess, weights
    from megatron_dwm.data.weight_file import read_weights

    # The tokenizer has no tokens for spaces alone.
    write_lines(tmp_path / "b.jsonl.gz", [text for text in MIXED if text != "  "])
    output, prefix = tmp_path / "out.csv", tmp_path / "data"
    assert dsir.main(command(files, target, output, "--select", "0.25")) == 0
    argv = ["--input", *map(str, files), "--output-prefix", str(prefix), "--workers", "1"]
    argv += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    assert preprocess.main(argv) == 0
    found = rows(output)
    for column, more in (("log_weight", ["--scores"]), ("selected", [])):
        make = ["make", f"{prefix}_text_document", "--from", str(output), "--column", column]
        assert weights.main([*make, *more, "--force"]) == 0
        values = read_weights(f"{prefix}_text_document.weights").weights
        numbers = np.array([float(row[column]) for row in found])
        if column == "selected":
            assert ((values > 0) == (numbers == 1)).all()
        else:
            expected = np.exp(numbers - numbers.max())
            assert values == pytest.approx(expected / expected.mean(), rel=1e-5)


# --- killed and started again -------------------------------------------------------------------


KILLED = """
import os, signal, sys
from megatron_dwm.corpus import part_folder
from megatron_dwm.cli import dsir
left = int(sys.argv[1])
replace = os.replace
def killing(*paths):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = killing
dsir.main(sys.argv[2:])
"""


def kill_at(part: int, argv: list[str]) -> None:
    """Runs the command until it is killed before its nth file appears; its workers end as well."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(part), *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,  # waits for whoever has the pipes, and so for the workers
        timeout=120,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()


# One part for the target, five counts, five of scores, and the output.
@pytest.mark.parametrize("part", [1, 3, 7, 9, 12])
def test_a_killed_run_ends_with_the_same_bytes(files, target, tmp_path, monkeypatch, part):
    more = ["--select", "0.3", "--workers", "2"]
    assert dsir.main(command(files, target, tmp_path / "whole.csv", *more)) == 0
    argv = command(files, target, tmp_path / "out.csv", *more)
    kill_at(part, argv)
    assert not (tmp_path / "out.csv").exists()
    read = []
    original = dsir_run.read_batches

    def noted(paths, override):
        read.extend(paths)
        return original(paths, override)

    monkeypatch.setattr(dsir_run, "read_batches", noted)
    assert dsir.main(argv) == 0
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert read == [target, *files, *files][part - 1 :]
    assert not (tmp_path / "out.csv.dsir").exists()


def test_work_of_another_run_is_refused_unless_restarted(files, target, tmp_path, capsys):
    output = tmp_path / "out.csv"
    kill_at(4, command(files, target, output))
    for more, named in (
        (["--ngrams", "3"], "another --ngrams"),
        (["--smoothing", "1", "--buckets", "9"], "another --buckets and --smoothing"),
        (["--input", str(files[0])], "another --input"),
    ):
        assert dsir.main(command(files, target, output, *more)) == 2
        error = capsys.readouterr().err.strip()
        assert named in error and "--restart" in error and len(error.splitlines()) == 1
    write_lines(files[-1], ["another text"])
    assert dsir.main(command(files, target, output)) == 2
    assert "another --input" in capsys.readouterr().err
    assert dsir.main(command(files, target, output, "--restart")) == 0
    assert dsir.main(command(files, target, tmp_path / "whole.csv")) == 0
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_damaged_part_is_made_again(files, target, tmp_path):
    output = tmp_path / "out.csv"
    kill_at(12, command(files, target, output))
    for part in sorted((tmp_path / "out.csv.dsir").glob("*.npz"))[::3]:
        part.write_bytes(part.read_bytes()[:100])
    assert dsir.main(command(files, target, output)) == 0
    assert dsir.main(command(files, target, tmp_path / "whole.csv")) == 0
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--input", "none.jsonl"], "--input none.jsonl: no such file"),
        (["--target", "none.jsonl"], "--target none.jsonl: no such file"),
        (["--json-key", "body"], "target.jsonl, line 1: no key 'body'"),
        (["--target", "{}/empty.jsonl"], "--target: no text in it"),
        (["--input", "{}/empty.jsonl"], "--input: no text in it"),
        (["--input", "{}/bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--input", "{}/lone.jsonl"], r"lone.jsonl, line 2: the text has a lone surrogate (\ud8"),
        (["--select", "1", "--min-ngrams", "9999"], "--min-ngrams 9999: no document has as many"),
        (["--select", "0"], "--select 0.0: must be above 0"),
        (["--ngrams", "0"], "--ngrams 0: must be at least 1"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--smoothing", "nan"], "--smoothing nan: must be finite"),
        (["--min-ngrams", "5"], "--min-ngrams: needs --select"),
        (["--output", "{}/out.tsv"], "out.tsv: the name must end in .csv"),
    ],
)
def test_bad_input_is_one_line(files, target, tmp_path, capsys, more, message):
    write_lines(tmp_path / "empty.jsonl", ["", " \n "])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{\n')
    (tmp_path / "lone.jsonl").write_text('{"text": "a"}\n{"text": "b \\ud83d c"}\n')
    argv = command(files, target, tmp_path / "out.csv", *(m.format(tmp_path) for m in more))
    try:
        code = dsir.main(argv)
    except SystemExit as end:  # argparse, which prints the usage first
        code = end.code
    out, error = capsys.readouterr()
    assert code == 2 and out == ""
    assert error.splitlines()[-1].startswith("megatron-dwm dsir: error: ")
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "out.csv").exists()
