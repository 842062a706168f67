"""`megatron-dwm report`: the weights by stage, validation losses, and the verdict on a bad domain.

Of runs side by side, the expected figures are worked out by hand from outputs that the tests make
up in the trainer's format. That the trainer prints in that format is not exercised here.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest

from megatron_dwm.cli import report


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


# ------------------------------------------------------------------------- runs side by side


def iteration_line(iteration: int, milliseconds: float, samples: int = 16) -> str:
    return (
        f" [2026-01-01 00:00:00.000000] iteration {iteration:8d}/{40:8d} | consumed samples: "
        f"{iteration * samples:12d} | elapsed time per iteration (ms): {milliseconds:.1f} | "
        "learning rate: 1.0E-03 | lm loss: 5.0E+00 |\n"
    )


def process_output(
    losses: dict[int, float],
    milliseconds: float = 100.0,
    processor: float | None = None,
    start: int = 0,
    stop: int = 40,
    length: int | None = 128,
) -> str:
    """What one process of a run prints: two ranks, a line every 10 steps, the first one slow.

    Args:
        losses: validation loss by iteration.
        milliseconds: of a step.
        processor: processor seconds of a step, mean over the ranks; None: not printed.
        start: iterations done before.
        stop: the last one.
        length: of a sample; None: not printed.
    """
    text = "------------------------ arguments ------------------------\n"
    if length is not None:
        text += f"  seq_length ...................................... {length}\n"
    text += iteration_line(start + 1, 9 * milliseconds)
    for end in range(start + 10, stop + 1, 10):
        if processor is not None:
            for rank, share in ((0, 0.9), (1, 1.1)):
                seconds = 10 * processor * share * (5 if end == start + 10 else 1)
                text += (
                    f"processor time of steps {end - 9} to {end} on rank {rank} (s): {seconds:.3f}"
                )
                # Ranks share a pipe: now and then the ends of two lines come last.
                text += "" if rank == 0 and end == stop else "\n"
        text += iteration_line(end, milliseconds)
        if end in losses:
            text += (
                f" validation loss at iteration {end} | lm loss value: {losses[end]:E} | lm loss "
                "PPL: 1.0E+02 | \n"
            )
    if stop in losses:
        text += (
            f" validation loss at iteration {stop} on validation set | lm loss value: "
            f"{losses[stop]:E} | lm loss PPL: 1.0E+02 | \n"
            f" validation loss at iteration {stop} on test set | lm loss value: 1.0E+00 | x\n"
        )
    return text


LOSSES = {20: 6.0, 40: 5.0}
BETTER = {20: 5.8, 40: 4.8}


def compare(tmp_path: Path, outputs: dict[str, str], *words: str) -> int:
    arguments = []
    for name, text in outputs.items():
        path = tmp_path / f"{name}=.log"  # a path may hold an equals sign
        path.write_text(text)
        arguments += ["--compare", f"{name}={path}"]
    return report.main([*arguments, *words])


def table(text: str) -> dict[str, list[str]]:
    """Returns the words of each run's line by the run's name."""
    rows = re.findall(r"^  (\w+) {2,}(.*)$", text, flags=re.MULTILINE)
    return {name: rest.split() for name, rest in rows}


def test_equal_tokens_and_equal_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 steps of stock take 8 s; a step of the other takes 1.25 of that, so it has done 32.

    At its step 32 its loss lies 12/20 of the way from 5.8 to 4.8, at 5.2. By the clock, which runs
    slower for stock (the machine was busy), it would have been ahead.
    """
    outputs = {
        "stock": process_output(LOSSES, milliseconds=900, processor=0.2),
        "learned": process_output(BETTER, milliseconds=450, processor=0.25),
    }
    assert compare(tmp_path, outputs) == 0
    out = capsys.readouterr().out
    assert "0.08M tokens" in out and "8.0 s" in out and "processor time" in out
    assert table(out) == {
        "stock": ["5.0000", "5.0000", "1.00", "1.00"],
        "learned": ["4.8000", "(-0.2000)", "5.2000", "(+0.2000)", "1.25", "0.50"],
    }


def test_the_clock_counts_where_a_run_has_no_processor_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The slow first line is left out; a run that was over earlier shows its last loss."""
    outputs = {
        "stock": process_output(LOSSES, milliseconds=100, processor=0.2),
        "other": process_output(BETTER, milliseconds=50),
    }
    assert compare(tmp_path, outputs) == 0
    out = capsys.readouterr().out
    assert "4.0 s" in out and "elapsed time" in out and "its last loss" in out
    assert table(out)["other"] == ["4.8000", "(-0.2000)", "4.8000", "(-0.2000)*", "-", "0.50"]


def test_a_resumed_run_counts_each_step_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after step 30, resumed from 20: its last word on a step counts, and 40 steps do."""
    first = process_output({20: 6.0}, processor=0.4, stop=30)
    rest = process_output({30: 5.5, 40: 5.0}, processor=0.2, start=20)
    outputs = {"stock": process_output(LOSSES, processor=0.2), "resumed": first + rest}
    assert compare(tmp_path, outputs) == 0
    row = table(capsys.readouterr().out)["resumed"]
    # Known are steps 11 to 30 at 0.4 s (30 is the slow first line of the second process, which
    # is left out) and 31 to 40 at 0.2 s.
    assert row[0] == "5.0000" and row[-2] == f"{(20 * 0.4 + 10 * 0.2) / 30 / 0.2:.2f}"


def test_runs_of_different_length_are_compared_where_the_shortest_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples where no output says how long they are."""
    outputs = {
        "stock": process_output(LOSSES, length=None),
        "short": process_output({20: 5.8}, stop=20, length=None),
    }
    assert compare(tmp_path, outputs) == 0
    out = capsys.readouterr().out
    assert "0.00M samples" in out
    assert table(out)["stock"][0] == "6.0000"
    assert table(out)["short"][:2] == ["5.8000", "(-0.2000)"]


def test_a_run_that_diverged_is_shown_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {
        "stock": process_output(LOSSES),
        "lost": process_output({20: 6.0, 40: math.nan}),
    }
    assert compare(tmp_path, outputs, "--plot", str(tmp_path / "a.png")) == 0
    assert table(capsys.readouterr().out)["lost"][:2] == ["nan", "(+nan)"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(tmp_path: Path, ending: str) -> None:
    """Both curves and the domains are there, by name and with units."""
    pytest.importorskip("matplotlib")
    run = write_log(tmp_path / "run", 0.5)
    picture = tmp_path / f"report.{ending}"
    outputs = {"stock": process_output(LOSSES), "learned": process_output(BETTER)}
    assert compare(tmp_path, outputs, "--run", str(run), "--plot", str(picture)) == 0
    if ending == "png":
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return
    text = picture.read_text()
    for words in ("stock", "learned", "corrupt", "books", "tokens read (millions)", "(s)"):
        assert f"<!-- {words}" in text or words in text, words
    assert "validation loss (nats per token)" in text and "iteration (steps)" in text


def test_domain_weights_over_the_run_are_means_over_samples() -> None:
    from megatron_dwm.logs.plot import domain_weights_over_run

    log = [
        {"iteration": i, "domain_weight": {"a": w}, "domain_samples": {"a": n}}
        for i, w, n in ((1, 1.0, 4), (2, 2.0, 12), (3, 0.5, 1), (4, 0.5, 1))
    ]
    assert domain_weights_over_run(log, parts=2) == {"a": ([1.0, 3.0], [1.75, 0.5])}


def test_names_at_line_ends_are_kept_apart_and_in_order() -> None:
    from megatron_dwm.logs.plot import spread

    heights = [0.5, 0.1, 0.51, 0.5]
    found = spread(heights, 0.1)
    assert sorted(range(4), key=found.__getitem__) == [1, 0, 3, 2]
    assert min(b - a for a, b in zip(sorted(found), sorted(found)[1:], strict=False)) > 0.0999
    assert abs(sum(found) - sum(heights)) < 1e-9


def test_without_matplotlib_the_error_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    outputs = {"stock": process_output(LOSSES)}
    assert compare(tmp_path, outputs, "--plot", str(tmp_path / "a.png")) == 2
    error = capsys.readouterr().err
    assert "--plot needs matplotlib" in error and "pip install 'megatron-dwm[report]'" in error
    assert len(error.splitlines()) == 1
    # What needs no plot needs no matplotlib.
    assert compare(tmp_path, outputs) == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "give --run RUN, or --compare NAME=LOG"),
        (["--compare", "stock"], "--compare stock: give NAME=LOG"),
        (["--compare", "=x.log"], "--compare =x.log: give NAME=LOG"),
        (["--compare", "a="], "--compare a=: give NAME=LOG"),
        (["--compare", "a=GOOD", "--compare", "a=GOOD"], "already a run named a"),
        (["--compare", "a=missing.log"], "missing.log"),
        (["--compare", "a=EMPTY"], "no line 'validation loss at"),
        (["--compare", "a=SHORT"], "no line 'iteration"),
        (["--compare", "a=GOOD", "--plot", "x.docx"], "--plot x.docx: the name must end in"),
        (["--compare", "a=GOOD", "--plot", "x"], "--plot x: the name must end in"),
        (["--compare", "a=GOOD", "--plot", "no/folder/x.png"], "no/folder/x.png"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    pytest.importorskip("matplotlib")
    files = {
        "GOOD": process_output(LOSSES),
        "EMPTY": "nothing\n",
        "SHORT": " validation loss at iteration 20 | lm loss value: 5.0E+00 | x\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        words = [word.replace(name, str(tmp_path / name)) for word in words]
    assert report.main(words) == 2
    error = capsys.readouterr().err
    assert named in error and error.startswith("megatron-dwm report: error: ")
    assert len(error.splitlines()) == 1
