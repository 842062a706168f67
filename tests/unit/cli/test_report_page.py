"""`megatron-dwm report --html`: what the flags do; the page itself is in tests/unit/logs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_dwm.cli import preprocess, report
from tests.unit.logs.made_up_runs import log_lines, whole_run, write_log, write_seen

pytest.importorskip("matplotlib")


def test_texts_by_the_tokenizer_of_the_data(
    corpus: Path, texts: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenized by the project's own command, and read back; without the tokenizer it says so."""
    prefix = str(tmp_path / "data")
    words = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    words += ["--input", str(corpus), "--output-prefix", prefix, "--append-eod", "--workers", "1"]
    assert preprocess.main(words) == 0
    run = write_log(tmp_path / "run", log_lines())
    write_seen(run, [f"{prefix}_text_document"], [[1.0 + k for k in range(len(texts))]], saves=1)
    page = tmp_path / "report.html"
    made = [str(run), "--html", str(page)]
    capsys.readouterr()
    assert report.main(made) == 0
    out, error = capsys.readouterr()
    assert "so tokens are not bytes; give the tokenizer" in error and error.count("\n") == 1
    assert f"wrote {page}" in out and "mean weight" in out
    assert "Documents are left out" in page.read_text()
    assert report.main([*made, "--tokenizer-model", str(model)]) == 0
    # The first document weighs most: one save turns the weights round.
    start = " ".join(texts[0][:80].split())
    assert start in " ".join(page.read_text().replace("&#x27;", "'").split())


def test_bad_tokenizers_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_log(tmp_path / "run", log_lines(steps=8))
    words = [str(run), "--html", str(tmp_path / "a.html")]
    assert report.main([*words, "--tokenizer-type", "SentencePieceTokenizer"]) == 2
    assert "needs --tokenizer-model FILE" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


def test_null_tokenizer_is_bytes(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    page = tmp_path / "a.html"
    assert report.main([str(run), "--html", str(page), "--tokenizer-type", "NullTokenizer"]) == 0
    assert "Document 39" not in page.read_text() and "Document 38: word" in page.read_text()


def test_json_stays_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_log(tmp_path / "run", log_lines())
    assert report.main([str(run), "--html", str(tmp_path / "a.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mean_weight_by_stage"]["stage 2 meta"]["code"] < 1
    assert (tmp_path / "a.html").exists()


def test_a_run_by_its_name_alone_is_the_table_of_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_log(tmp_path / "run", log_lines())
    assert report.main(["--run", str(run)]) == 0
    before = capsys.readouterr().out
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == before


def test_without_matplotlib_the_page_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert report.main([str(tmp_path), "--html", str(tmp_path / "a.html")]) == 2
    error = capsys.readouterr().err
    assert "--html needs matplotlib" in error and error.count("\n") == 1


def test_a_page_that_is_too_large_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_dwm.logs.html_report.MOST_BYTES", 1 << 10)
    run = write_log(tmp_path / "run", log_lines(steps=8))
    assert report.main([str(run), "--html", str(tmp_path / "a.html")]) == 2
    assert "give fewer runs" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
