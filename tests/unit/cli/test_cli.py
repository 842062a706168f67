"""The program `megatron-dwm`: its table of commands, help, completion, exit codes, JSON.

What the commands do is tested where their work is; tests/functional/test_wheel.py runs them as an
installed program.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import megatron_dwm
from megatron_dwm import progress
from megatron_dwm.cli import command, completion, train
from megatron_dwm.cli.convert import dtypes, import_model
from megatron_dwm.cli.main import main, overview
from megatron_dwm.cli.table import COMMANDS
from megatron_dwm.errors import DWMError
from tools.docs import pages

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {"torch", "megatron", "numpy", "sentencepiece", "transformers", "matplotlib", "tqdm"}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """All commands and subcommands, by what one types."""
    found = {}

    def walk(name: str, parser: argparse.ArgumentParser) -> None:
        found[name] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, child in action.choices.items():
                    walk(f"{name} {word}", child)

    walk("megatron-dwm", completion.whole_parser())
    del found["megatron-dwm"]
    return found


PARSERS = parsers()


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARSERS)
def test_every_command_explains_itself(name: str) -> None:
    """What it does in a line, an example that one can type, and a word on every flag."""
    parser = PARSERS[name]
    lines = (parser.description or "").splitlines()
    assert lines and lines[0].endswith("."), name
    typed = name.replace("weights inspect", "weights show")
    examples = [line for line in lines if line.startswith("    ")]
    assert any(line.startswith(f"    {typed}") for line in examples), name
    for action in parser._actions:
        assert action.help, (name, action.dest)


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_exit_codes_are_in_the_help(entry: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([entry.name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: megatron-dwm {entry.name}")
    if entry.name != "completion":
        assert "xit code" in out


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for entry in COMMANDS:
        assert re.search(rf"^  {entry.name} +\S", out, re.MULTILINE)
    assert out.strip() == overview().strip()
    assert max(map(len, out.splitlines())) <= 100


def test_help_and_completion_are_light() -> None:
    """Neither torch nor anything else that takes its time is imported for them."""
    code = (
        "import contextlib, io, sys\n"
        "from megatron_dwm.cli.main import main\n"
        "from megatron_dwm.cli.table import COMMANDS\n"
        "words = [['--help'], ['--version'], ['completion', 'bash']]\n"
        "words += [[entry.name, '--help'] for entry in COMMANDS]\n"
        "for each in words:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        assert main(each) == 0, each\n"
        f"found = {HEAVY!r} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_names_known_without_the_libraries() -> None:
    """Choices that the help lists before torch or NumPy is imported are those of the code."""
    from megatron_dwm.cli.weights import COMBINATIONS
    from megatron_dwm.conversion.export import DTYPES
    from megatron_dwm.conversion.families.rope import BUILT_IN_ROPE_FACTOR
    from megatron_dwm.data.weight_combine import COMBINE

    assert dtypes.DTYPES == tuple(sorted(DTYPES))
    assert import_model.BUILT_IN_ROPE_FACTOR == BUILT_IN_ROPE_FACTOR
    assert COMBINATIONS == tuple(COMBINE)


def test_commands_in_the_pages_can_be_typed() -> None:
    """Every command of a code block exists, with every flag that is given to it."""
    blocks = [block for page in pages.pages() for block in pages.blocks(page)]
    ours = re.compile(r"megatron-dwm |torchrun .*-m megatron_dwm ")
    commands = [command for block in blocks for command in block.commands]
    typed = [command.split() for command in commands if ours.match(command)]
    assert len(typed) > 30
    for words in typed:
        at = words.index("megatron-dwm" if "megatron-dwm" in words else "megatron_dwm") + 1
        name = "megatron-dwm"
        while at < len(words) and f"{name} {words[at]}" in PARSERS:
            name, at = f"{name} {words[at]}", at + 1
        assert name in PARSERS, words
        known = {flag for action in PARSERS[name]._actions for flag in action.option_strings}
        given = {word for word in words[at:] if word.startswith("--")}
        assert name == "megatron-dwm train" or given <= known, words


# --- exit codes ---------------------------------------------------------------------------------


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trains"]) == 2
    error = capsys.readouterr().err
    assert error == "megatron-dwm: error: trains: no such command; did you mean train?\n"
    assert main(["xyz"]) == 2
    assert "choose from tokenizer, preprocess" in capsys.readouterr().err


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("usage: megatron-dwm")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preprocess", "--input", "{}/none", "--output-prefix", "x"], "--tokenizer-type"),
        (["tokenizer", "--input", "{}/none.jsonl", "--out", "{}/t"], "none.jsonl: no such file"),
        (["inspect", "{}/none"], "none.idx"),
        (["inspect", "{}"], "megatron-dwm convert inspect"),
        (["report"], "give --run RUN"),
        (["report", "--run", "{}"], "dwm_log.jsonl: no such file"),
        (["report", "{}", "--html", "{}/r.html"], "dwm_log.jsonl: no such file"),
        (["report", "one", "two"], "2 runs (one, two); give --html FILE.html"),
        (["report", "--compare", "a=b", "--html", "r.html"], "there is no run to show; give RUN"),
        (["report", "one", "--run", "./one", "--html", "r.html"], "a run is named twice"),
        (["report", *"123456789", "--html", "r.html"], "--html: 9 runs, but more than 8 lines"),
        (["report", "one", "--html", "r.png"], "--html r.png: the name must end in .html"),
        (["report", "one", "--html", "{}/no/r.html"], "there is no folder {}/no; make it first"),
        (["report", "one", "--html", "r.html", "--documents", "0"], "--documents 0: expected"),
        (["report", "one", "--png", "charts"], "--png is for the page; give --html FILE.html"),
        (["report", "one", "--data", "x"], "--data is for the page; give --html FILE.html"),
        (["weights", "show", "{}/none"], "none.weights: no such file"),
        (["weights", "make", "{}/none", "--equal"], "none.idx"),
        (["convert", "inspect", "{}/none"], "is not a folder"),
        (["convert", "inspect"], "RUN is missing"),
        (["convert", "export", "--megatron-path", "{}/none", "--hf-path", "{}/o"], "none"),
        (["probe", "--checkpoint", "{}/none"], "--checkpoint {}/none: no such folder"),
        (["probe", "--checkpoint", "{}", "--samples", "2"], "--samples 2"),
    ],
)
def test_bad_input_is_code_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [word.format(tmp_path) for word in words]
    try:
        code = main(words)
    except SystemExit as end:  # argparse, which prints the usage first
        code = end.code
    out, error = capsys.readouterr()
    assert code == 2 and out == ""
    last = error.splitlines()[-1]
    assert last.startswith(f"megatron-dwm {words[0]}") and ": error: " in last
    assert message.format(tmp_path) in last


def test_train_needs_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--"], ["--lr", "1"]):
        with pytest.raises(SystemExit) as end:
            train.main(words)
        assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        train.main([str(tmp_path / "none.py")])
    assert end.value.code == 2
    assert "none.py' does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_errors_become_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> int:
        def work() -> None:
            raise error

        return command.completed("x", work, ", nothing was written")

    assert command.completed("x", lambda: None) == 0
    assert command.completed("x", lambda: 1) == 1
    assert fails(DWMError("--flag 1: must be 2")) == 2
    assert fails(OSError("disk full")) == 2
    assert fails(ModuleNotFoundError(name="transformers.models")) == 2
    assert fails(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.splitlines() == [
        "megatron-dwm x: error: --flag 1: must be 2",
        "megatron-dwm x: error: disk full",
        "megatron-dwm x: error: needs the package transformers.models, which is not installed; "
        "pip install 'megatron-dwm[convert]'",
        "megatron-dwm x: interrupted, nothing was written",
    ]
    with pytest.raises(ModuleNotFoundError):
        fails(ModuleNotFoundError(name="megatron_dwm.gone"))


@pytest.mark.parametrize("words", [["completion", "bash"], ["inspect", "{}", "--json"]])
def test_a_pipe_that_nobody_reads(tmp_path: Path, words: list[str]) -> None:
    """No message, and the code that a shell gives."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/data.bin")
    builder.finalize(f"{tmp_path}/data.idx")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_dwm", *(w.format(tmp_path / "data") for w in words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# --- JSON, completion, version ------------------------------------------------------------------


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    command.print_json({"a": float("nan"), "b": [1.5, float("inf")], 3: {"c": "é"}})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": [1.5, None], "3": {"c": "é"}}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_flags_and_choices(shell: str) -> None:
    script = completion.script(shell)
    for word in ("preprocess", "export-dwm", "--sequence-length", "--max-shard-size", "fp16"):
        assert word in script, word


def test_bash_completes() -> None:
    """The script is taken by bash, and offers what begins as typed."""
    ask = (
        "\nCOMP_WORDS=(megatron-dwm convert ex); COMP_CWORD=2; COMP_LINE='megatron-dwm convert ex'"
        "\n$(complete -p megatron-dwm | sed 's/.*-F \\([^ ]*\\).*/\\1/') megatron-dwm ex convert"
        '\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", completion.script("bash") + ask],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= {"export", "export-dwm"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """One that pip can compare, whether the tree was built or not."""
    from packaging.version import Version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-dwm {megatron_dwm.__version__}\n"
    Version(megatron_dwm.__version__)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("tools/preprocess_data.py", "preprocess"),
        ("tools/train_tokenizer.py", "tokenizer"),
        ("tools/inspect_index.py", "inspect"),
        ("tools/report.py", "report"),
        ("tools/weights.py", "weights"),
        ("tools/score_corpus.py", "score"),
        ("tools/convert", "convert"),
    ],
)
def test_old_paths_are_the_commands(tmp_path: Path, path: str, name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / path), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: megatron-dwm {name}")


# --- progress -----------------------------------------------------------------------------------


def test_no_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(10, "B", "reading") as shown:
        shown.update(10)
    with progress.working("training"):
        pass
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal() -> None:
    """Of work that takes over a second; one that is done at once shows nothing."""
    code = (
        "import sys, time\n"
        "from megatron_dwm import progress\n"
        "with progress.bar(4, 'B', 'short') as shown: shown.update(4)\n"
        "with progress.bar(4, 'B', 'long', mininterval=0) as shown:\n"
        "    for _ in range(4):\n"
        "        time.sleep(0.4); shown.update(1)\n"
        "with progress.working('silent'): time.sleep(2.2)\n"
    )
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=terminal, env=environment, timeout=60, check=False
    )
    os.close(terminal)
    assert done.returncode == 0
    text = ""
    with contextlib.suppress(OSError):  # how the end of a terminal shows
        while piece := os.read(reader, 1 << 16):
            text += piece.decode()
    os.close(reader)
    assert "long: 100%" in text and "silent: 00:0" in text and "short" not in text
