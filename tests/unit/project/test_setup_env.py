"""tools/setup_env.sh: the search for an interpreter, and what it says when there is none.

Interpreters are stand-ins on a temporary PATH that answer the script's one question. What this
file does NOT exercise: the installation itself, which `make setup` on a fresh clone does.
"""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

# What the script calls besides interpreters and compilers.
BASIC_COMMANDS = ("bash", "env", "cat", "dirname", "uname", "df", "awk", "sed", "sha256sum", "cut")


class Machine:
    """A machine of which the PATH, the home folder and nothing else is known to the script."""

    def __init__(self, folder: Path, script: Path):
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.include = folder / "include"
        self.script = script
        self.clone = script.parent.parent
        for path in (self.bin, self.home, self.include):
            path.mkdir()
        (self.include / "Python.h").touch()
        for name in BASIC_COMMANDS:
            found = shutil.which(name)
            assert found, f"{name} is needed on the PATH of this test"
            # Not a link: a test that replaces one would write through it, into the real command.
            self.add(name, f'exec {found} "$@"')

    def add(self, path: str, body: str) -> Path:
        """Adds an executable; relative paths go into the PATH's folder."""
        target = self.bin / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        target.chmod(target.stat().st_mode | stat.S_IXUSR)
        return target

    def add_python(self, path: str, version: str, missing: str = "", include=None) -> Path:
        include = self.include if include is None else include
        return self.add(path, f"cat >/dev/null; echo '{version}|/prefix|{include}|{missing}'")

    def add_compiler(self, name: str = "g++") -> Path:
        return self.add(name, "cat >/dev/null")

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.bin / "bash"), str(self.script), *args],
            env={"PATH": str(self.bin), "HOME": str(self.home), "TMPDIR": "/tmp"} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def found(self, **environment: str) -> str:
        done = self.run("--print-python", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path, repo_root) -> Machine:
    # A copy, so that the script judges a clone without an environment.
    clone = tmp_path / "a clone" / "tools"
    clone.mkdir(parents=True)
    script = clone / "setup_env.sh"
    shutil.copy(repo_root / "tools" / "setup_env.sh", script)
    # Interpreters at fixed places of the machine that runs the test must not be found.
    text = script.read_text()
    for fixed in ("/usr/local/bin", "/opt/conda"):
        assert fixed in text
        text = text.replace(fixed, str(tmp_path / "no such folder"))
    script.write_text(text)
    for name in ("constraints.txt", "pyproject.toml", "setup.py", "csrc/engine.cpp"):
        path = clone.parent / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return Machine(tmp_path, script)


def test_takes_the_first_that_fits(machine):
    machine.add_python("python3", "3.12.3")
    assert machine.found() == str(machine.bin / "python3")
    machine.add_python("python3.12", "3.12.9")
    assert machine.found() == str(machine.bin / "python3.12")


def test_skips_a_shim_that_does_not_run(machine):
    machine.add("python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    machine.add_python("python3", "3.11.7")
    wanted = machine.add_python(str(machine.home / ".pyenv/versions/3.12.1/bin/python"), "3.12.1")
    assert machine.found() == str(wanted)


def test_a_later_path_entry_is_tried_too(machine, tmp_path):
    machine.add("python3.12", "exit 1")
    wanted = machine.add_python(str(tmp_path / "second/python3.12"), "3.12.4")
    assert machine.found(PATH=f"{machine.bin}:{wanted.parent}") == str(wanted)


def test_prefers_312_wherever_it_lies(machine, tmp_path):
    machine.add_python("python3.13", "3.13.0")
    assert machine.found() == str(machine.bin / "python3.13")
    wanted = machine.add_python(str(tmp_path / "pyenv/versions/3.12.1/bin/python"), "3.12.1")
    assert machine.found(PYENV_ROOT=str(tmp_path / "pyenv")) == str(wanted)


def test_conda_is_searched(machine):
    wanted = machine.add_python(str(machine.home / "miniforge3/envs/py312/bin/python"), "3.12.1")
    assert machine.found() == str(wanted)


def test_an_unfit_312_gives_way_to_a_complete_one(machine, tmp_path):
    machine.add_python("python3.12", "3.12.3", missing="ensurepip")
    machine.add_python("python3", "3.12.3", include=tmp_path / "no headers")
    wanted = machine.add_python("python3.13", "3.13.1")
    assert machine.found() == str(wanted)


@pytest.mark.parametrize("version", ["3.9.18", "3.11.7", "3.14.0", "2.7.18"])
def test_other_versions_are_refused(machine, version):
    machine.add_python("python3", version)
    done = machine.run("--print-python")
    assert done.returncode == 1
    assert f"python3 is Python {version}; 3.12 or 3.13 is needed" in done.stderr


def test_none_found_says_what_to_install(machine):
    done = machine.run("--print-python")
    assert done.returncode == 1
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("setup: error: no Python 3.12 or 3.13 was found")
    text = "\n".join(rest)
    for word in ("apt install", "dnf install", "conda create", "pyenv install 3.12", "PYTHON="):
        assert word in text


def test_every_rejected_interpreter_is_listed_once(machine, tmp_path):
    machine.add_python("python3.12", "3.12.3", missing="venv ensurepip")
    machine.add_python("python3.13", "3.13.3", include=tmp_path / "none")
    machine.add("python3", "exit 1")
    done = machine.run("--check-only")
    assert done.returncode == 1
    assert done.stderr.count("looked at: ") == 3
    assert "without the standard module(s) venv ensurepip" in done.stderr
    assert "apt install python3.12-venv" in done.stderr
    assert f"without the header Python.h in {tmp_path / 'none'}" in done.stderr
    assert "apt install python3.13-dev; Fedora: dnf install python3.13-devel" in done.stderr
    assert "python3 does not run" in done.stderr


def test_a_named_interpreter_is_used_or_refused(machine):
    machine.add_python("python3.12", "3.12.3")
    other = machine.add_python("mine", "3.13.2")
    assert machine.found(PYTHON=str(other)) == str(other)
    assert machine.found(PYTHON="mine") == "mine"
    old = machine.add_python("old", "3.10.1")
    for python, reason in [(str(old), "is Python 3.10.1"), ("/no/such/python", "does not run")]:
        done = machine.run("--print-python", PYTHON=python)
        assert done.returncode == 1
        assert f"PYTHON={python} {reason}" in done.stderr
        assert "unset it" in done.stderr


def test_no_compiler(machine):
    machine.add_python("python3.12", "3.12.3")
    done = machine.run("--check-only")
    assert done.returncode == 1
    assert "no C++17 compiler was found (tried c++, g++, clang++)" in done.stderr
    for word in ("build-essential", "gcc-c++", "cxx-compiler"):
        assert word in done.stderr
    machine.add_compiler("clang++")
    assert machine.run("--check-only", SETUP_MIN_FREE_GB="0").returncode == 0
    done = machine.run("--check-only", CXX="/no/such/compiler")
    assert done.returncode == 1
    assert "tried /no/such/compiler" in done.stderr


def test_check_only_changes_nothing(machine):
    machine.add_python("python3.12", "3.12.3")
    machine.add_compiler()
    done = machine.run("--check-only", SETUP_MIN_FREE_GB="0")
    assert done.returncode == 0, done.stderr
    assert "this machine has what is needed" in done.stdout
    assert not [path for path in machine.clone.iterdir() if path.name.startswith(".venv")]


def test_disk_space_is_checked_before_anything_is_made(machine):
    machine.add_python("python3.12", "3.12.3")
    machine.add_compiler()
    machine.add("df", "echo header; echo '/dev/disk 99999999 1 7340032 1% /'")
    for mode in (["--check-only"], []):
        done = machine.run(*mode)
        assert done.returncode == 1
        assert "too little disk space: about 12 GB are needed" in done.stderr
        assert "7 GB are free" in done.stderr
        assert "SETUP_MIN_FREE_GB" in done.stderr
    assert not (machine.clone / ".venv").exists()
    assert machine.run("--check-only", SETUP_MIN_FREE_GB="7").returncode == 0
    assert machine.run("--check-only", SETUP_MIN_FREE_GB="8").returncode == 1
    done = machine.run("--check-only", SETUP_MIN_FREE_GB="much")
    assert "SETUP_MIN_FREE_GB=much is not a whole number" in done.stderr


def test_other_systems_are_refused(machine):
    machine.add("uname", "case $1 in -s) echo Darwin;; *) echo arm64;; esac")
    machine.add_python("python3.12", "3.12.3")
    done = machine.run("--check-only")
    assert done.returncode == 1
    assert "Darwin on arm64" in done.stderr


def test_unknown_option(machine):
    done = machine.run("--chek-only")
    assert done.returncode == 1
    assert "unknown option --chek-only" in done.stderr
    assert "Usage:" in done.stderr
    assert machine.run("--help").stdout.startswith("Usage:")


def test_the_real_question_is_answered_by_a_real_interpreter(machine):
    """The stand-ins above speak for an interpreter; this one is real."""
    done = machine.run("--print-python", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sys.executable
