"""`tools/report.py`: the weights by stage, validation losses, and the verdict on a bad domain."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import report  # noqa: E402


def write_log(folder: Path, bad_weight: float) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for iteration, window in enumerate(("warmup", "meta", "frozen"), start=1):
        weights = {"corrupt": bad_weight, "books": 2.0 - bad_weight}
        if window == "warmup":
            weights = {"corrupt": 1.0, "books": 1.0}
        lines.append(
            {
                "iteration": iteration,
                "stage": 1,
                "window": window,
                "domain_weight": weights,
                "domain_samples": {"corrupt": 8, "books": 8},
            }
        )
    (folder / "dwm_log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def trainer_output(path: Path, loss: float) -> Path:
    path.write_text(
        " [t] iteration 1/ 2 | elapsed time per iteration (ms): 900.0 |\n"
        " [t] iteration 2/ 2 | elapsed time per iteration (ms): 200.0 |\n"
        " validation loss at iteration 1 | lm loss value: 9.0E+00 | lm loss PPL: 1 |\n"
        f" validation loss at iteration 2 on validation set | lm loss value: {loss:E} | x\n"
        " validation loss at iteration 2 on test set | lm loss value: 1.0E+00 | x\n"
    )
    return path


@pytest.mark.parametrize(("bad_weight", "verdict"), [(0.25, ", below"), (1.5, "NOT below")])
def test_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad_weight: float, verdict: str
) -> None:
    """Stages come apart, the last validation loss counts, and the verdict can go either way."""
    run = write_log(tmp_path / "run", bad_weight)
    logs = [trainer_output(tmp_path / name, loss) for name, loss in (("a", 4.5), ("b", 5.0))]
    words = ["--run", str(run), "--log", str(logs[0]), "--stock-log", str(logs[1])]
    assert report.main([*words, "--good-domains", "books"]) == 0
    out = capsys.readouterr().out
    assert f"{bad_weight:.3f}" in out and "stage 1 frozen" in out and "warmup" not in out
    assert "4.5000" in out and "5.0000" in out and "(-0.5000)" in out
    assert verdict in out


def test_parts_of_a_log_are_read_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means over all of them; the newest may be missing, after a kill."""
    run = write_log(tmp_path / "run", 0.25)
    (run / "dwm_log.jsonl").rename(run / "dwm_log.1.jsonl")
    assert report.main(["--run", str(run)]) == 0
    alone = capsys.readouterr().out
    assert "0.250" in alone
    write_log(run, 0.75)
    assert report.main(["--run", str(run)]) == 0
    assert "0.500" in capsys.readouterr().out


def test_uniform_run_has_no_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its domains stand under the window's name."""
    run = write_log(tmp_path / "run", 0.25)
    lines = [json.loads(line) for line in (run / "dwm_log.jsonl").open()]
    for line in lines:
        del line["stage"]
        line["window"] = "uniform"
    (run / "dwm_log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert report.main(["--run", str(run)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["mean", "weight", "uniform"]
    assert [row.split()[0] for row in rows] == ["books", "corrupt"]


def test_other_json_lines_are_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of that name that something else has written."""
    (tmp_path / "dwm_log.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    assert report.main(["--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "dwm_log.jsonl: the line of iteration 1 has no window, domain_weight" in error
    assert error.count("\n") == 1


def test_missing_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is named, and there is no traceback."""
    assert report.main(["--run", str(tmp_path)]) == 2
    assert "dwm_log.jsonl: no such file" in capsys.readouterr().err


def test_output_without_validation_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log without a validation loss is named."""
    run = write_log(tmp_path / "run", 0.5)
    (tmp_path / "a").write_text("nothing\n")
    words = ["--run", str(run), "--log", str(tmp_path / "a"), "--stock-log", str(tmp_path / "a")]
    assert report.main(words) == 2
    assert "no line 'validation loss at" in capsys.readouterr().err
