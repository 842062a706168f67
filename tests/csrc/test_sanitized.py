"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

What this file does NOT exercise: data races (`tests/csrc/run_sanitized.sh thread` does) and the
bindings, which need Python.
"""

import os
import shutil
import subprocess

import pytest

COMPILER = os.environ.get("CXX", "g++")

SANITIZED = ["-std=c++17", "-fsanitize=address,undefined", "-x", "c++", "-", "-o"]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler: {COMPILER} was not found")
    program = tmp_path_factory.mktemp("probe") / "probe"
    built = subprocess.run(
        [COMPILER, *SANITIZED, str(program)],
        input="int main() {}",
        capture_output=True,
        text=True,
        timeout=120,
    )
    if built.returncode != 0 or subprocess.run([program], timeout=60).returncode != 0:
        pytest.skip(f"{COMPILER} has no working -fsanitize=address,undefined: {built.stderr[:200]}")


@pytest.mark.usefixtures("compiler")
def test_no_memory_error_and_no_undefined_behaviour(repo_root):
    done = subprocess.run(
        [repo_root / "tests" / "csrc" / "run_sanitized.sh"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all kernels passed\n"
