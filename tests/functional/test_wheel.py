"""The installed program: a wheel in a fresh environment, used from a fresh folder.

Chain that is proved: sources -> wheel, built by pip in an isolated environment -> installed into a
new virtual environment that sees the third-party packages of the running one, and not the checkout
-> `megatron-dwm` there: help of every command, text to tokens, a short training with the default
weighting, a report on its log.

What this does NOT exercise: the compiler, which takes longer than all the rest. The data engine
that the environment was set up with is put where the build finds it done; `make setup` builds it by
the same setup.py. Set MEGATRON_DWM_TEST_COMPILE=1 to compile it here too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_dwm.cli.table import COMMANDS
from tests.functional.harness import TINY, host_flags

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "*.so", "*.egg-info", "__pycache__", "_version.py", "build", "dist", "*_out", "tests"
)


@dataclass
class Installed:
    """A fresh environment with the program, and a fresh folder to work in."""

    environment: Path
    folder: Path

    def run(self, *words: str, program: str = "megatron-dwm") -> subprocess.CompletedProcess:
        bin_folder = self.environment / "bin"
        kept = ("HOME", "TMPDIR", "LD_LIBRARY_PATH", "MEGATRON_DWM_HOST")
        variables = {name: os.environ[name] for name in kept if name in os.environ}
        return subprocess.run(
            [str(bin_folder / program), *words],
            cwd=self.folder,
            env={
                **variables,
                "PATH": f"{bin_folder}:/usr/bin:/bin",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def succeeds(self, *words: str, program: str = "megatron-dwm") -> str:
        """Runs it; returns what it printed on standard output."""
        done = self.run(*words, program=program)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


def pip(*words: str) -> subprocess.CompletedProcess:
    quiet = ["--disable-pip-version-check", "--no-input", "-q"]
    return subprocess.run(
        [sys.executable, "-m", "pip", *words, *quiet],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = tmp_path_factory.mktemp("sources") / "megatron-dwm"
    shutil.copytree(ROOT, sources, ignore=NOT_SOURCES, symlinks=True)
    engines = list((ROOT / "megatron_dwm").glob("_data_engine.*.so"))
    if engines and os.environ.get("MEGATRON_DWM_TEST_COMPILE") != "1":
        place = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        built = sources / "build" / place / "megatron_dwm"
        built.mkdir(parents=True)
        # Newer than its sources, so that the build takes it for done.
        shutil.copyfile(engines[0], built / engines[0].name)
    out = sources.parent / "out"
    words = ["wheel", str(sources), "--no-deps", "-w", str(out)]
    done = pip(*words)
    if done.returncode and "No matching distribution found for setuptools" in done.stderr:
        warnings.warn("no package index in reach: built with the packages here", stacklevel=1)
        done = pip(*words, "--no-build-isolation")
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = str(environment / "bin" / "python")
    done = pip("--python", python, "install", "--no-deps", "--no-index", str(wheel))
    assert done.returncode == 0, done.stderr[-4000:]
    (packages,) = environment.glob("lib/python3*/site-packages")
    # A folder that is named in a .pth file is searched, and its own .pth files (the checkout's,
    # of an editable installation) are not read.
    (packages / "third_party.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Installed(environment, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def data(installed: Installed) -> Path:
    """Real text (the licence's paragraphs), tokenized: a training and a meta set."""
    paragraphs = [p for p in (ROOT / "LICENSE").read_text().split("\n\n") if p.strip()]
    pairs = zip(paragraphs[::2], paragraphs[1::2], strict=False)
    lines = [json.dumps({"train": one, "meta": other}) + "\n" for one, other in pairs]
    (installed.folder / "text.jsonl").write_text("".join(lines * 8))
    words = ["--input", "text.jsonl", "--json-key", "train", "--vocab-size", "400"]
    installed.succeeds("tokenizer", *words, "--out", "tokenizer")
    out = installed.succeeds(
        *("preprocess", "--input", "text.jsonl", "--json-keys", "train", "meta"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "tokenizer.model"),
        *("--append-eod", "--workers", "1", "--output-prefix", "text"),
    )
    assert "Wrote text_train_document" in out and "Wrote text_meta_document" in out
    return installed.folder


def test_modules_are_the_wheels(installed: Installed) -> None:
    """The package, the engine and the version are those that were installed."""
    code = (
        "import importlib.metadata, megatron_dwm, megatron_dwm._data_engine\n"
        "print(megatron_dwm.__file__, megatron_dwm._data_engine.__file__)\n"
        "assert megatron_dwm.__version__ == importlib.metadata.version('megatron-dwm')\n"
    )
    for path in installed.succeeds("-c", code, program="python").split():
        assert Path(path).is_relative_to(installed.environment), path
    (package,) = installed.environment.glob("lib/python3*/site-packages/megatron_dwm")
    assert (package / "py.typed").is_file()
    assert not (package.parent / "tests").exists() and not (package.parent / "tools").exists()


def test_help(installed: Installed) -> None:
    """Of the program and of every command; a command that is none is code 2."""
    assert "preprocess" in installed.succeeds("--help")
    assert installed.succeeds("--version").startswith("megatron-dwm ")
    for command in COMMANDS:
        assert f"megatron-dwm {command.name}" in installed.succeeds(command.name, "--help")
    assert installed.run("trains").returncode == 2


def test_data_set_is_whole(installed: Installed, data: Path) -> None:
    found = json.loads(installed.succeeds("inspect", "text_train_document", "--json"))
    assert found["documents"] > 100 and found["tokens"] > 10_000 and found["unused_bytes"] == 0
    (data / "cut.idx").write_bytes((data / "text_train_document.idx").read_bytes()[:-8])
    done = installed.run("inspect", "cut")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_trains_and_reports(installed: Installed, data: Path) -> None:
    """The example script, copied beside the data, with the default weighting for three steps."""
    shutil.copyfile(ROOT / "examples" / "pretrain_dwm.py", data / "pretrain_dwm.py")
    at = TINY.index("--tokenizer-type")
    model = [*TINY[:at], *TINY[at + 4 :]]
    words = [*host_flags(), *model, "--split", "90,5,5", "--train-iters", "3", "--eval-iters", "0"]
    out = installed.succeeds(
        *("train", "pretrain_dwm.py", *words, "--save", "run", "--save-interval", "3"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "tokenizer.model"),
        *("--ckpt-format", "torch_dist", "--data-path", "text_train_document"),
        *("--dwm", "--dwm-meta-data-path", "text_meta_document"),
    )
    assert len([line for line in out.splitlines() if "dwm iteration" in line]) == 3
    assert "mean weight" in installed.succeeds("report", "--run", "run")
    figures = json.loads(installed.succeeds("report", "--run", "run", "--json"))
    weights = [w for stage in figures["mean_weight_by_stage"].values() for w in stage.values()]
    assert weights and all(0 < weight < 3 for weight in weights)
    assert (data / "run" / "iter_0000003").is_dir()
