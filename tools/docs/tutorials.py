#!/usr/bin/env python
"""Runs the tutorials and keeps their output and pictures, for the site.

    python tools/docs/tutorials.py [--out build/tutorials] [NAME ...]

A tutorial is a script in docs/tutorials: its docstring and its cells `# %% [markdown]` are text,
its cells `# %%` are code. Here the code runs cell by cell, so that the site shows what each has
printed. Each tutorial runs in a process that is forked from this one, which imports the trainer
once for all of them, and in a folder of its own; it draws one picture, `NAME.png`. A tutorial that
has not changed is not run again. Standard library only, as the site builder imports this too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "tutorials"
OUT = ROOT / "build" / "tutorials"
_CELL = re.compile(r"^# %%(?P<kind>.*)$\n?", re.MULTILINE)


@dataclass(frozen=True)
class Tutorial:
    """A script that is read and run."""

    path: Path

    @property
    def name(self) -> str:
        """The script's name without `.py`."""
        return self.path.stem

    def cells(self) -> list[tuple[str, str]]:
        """Returns its cells in order: `text` or `code`, and what is in it."""
        source = self.path.read_text()
        text = ast.get_docstring(ast.parse(source))
        assert text is not None
        cells = [("text", text)]
        parts = _CELL.split(source)[1:]
        for kind, body in zip(parts[::2], parts[1::2], strict=True):
            if "markdown" in kind:
                lines = [line.removeprefix("#").removeprefix(" ") for line in body.splitlines()]
                cells.append(("text", "\n".join(lines).strip()))
            elif body.strip():
                cells.append(("code", body.strip("\n")))
        return cells

    def digest(self) -> str:
        """Returns what changes when the script or what it imports beside it does."""
        files = [self.path, *sorted(FOLDER.glob("_*.py"))]
        return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def found() -> list[Tutorial]:
    """Returns all tutorials, in the order in which they are read."""
    return [Tutorial(path) for path in sorted(FOLDER.glob("[!_]*.py"))]


def picture_of(tutorial: Tutorial, out: Path = OUT) -> Path:
    """Returns where a tutorial's picture lies once it has run."""
    return out / f"{tutorial.name}.png"


def page(tutorial: Tutorial, out: Path = OUT) -> str:
    """Returns the tutorial as Markdown, with what its cells have printed where it was run."""
    record = _record(tutorial, out)
    printed = iter(record.get("printed", []))
    number = 10 * (1 + [t.name for t in found()].index(tutorial.name))
    parts = [f"<!-- nav: Tutorials {number} -->"]
    for kind, text in tutorial.cells():
        if kind == "text":
            parts.append(text)
            continue
        code = re.sub(r"  # noqa.*$", "", text, flags=re.MULTILINE)
        parts.append(f"```python\n{code}\n```")
        lines = next(printed, "").rstrip()
        if lines:
            parts.append(f"```{{.text .output}}\n{lines}\n```")
    if picture_of(tutorial, out).is_file():
        parts.append(f"![What it draws]({tutorial.name}.png)")
    if "seconds" in record:
        parts.append(f"It took {record['seconds']:.0f} s of a processor's time.")
    return "\n\n".join(parts) + "\n"


def _record(tutorial: Tutorial, out: Path) -> dict[str, Any]:
    path = out / f"{tutorial.name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def run(tutorial: Tutorial, out: Path) -> int:
    """Runs a tutorial in a child of this process; returns its exit code."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        with tempfile.TemporaryDirectory(prefix=f"{tutorial.name}_") as folder:
            code = _run_cells(tutorial, out, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_cells(tutorial: Tutorial, out: Path, folder: str) -> int:
    os.chdir(folder)
    sys.path.insert(0, str(FOLDER))
    scope: dict[str, Any] = {"__name__": "__main__", "__file__": str(tutorial.path)}
    printed, source = [], tutorial.path.read_text()
    for kind, text in tutorial.cells():
        if kind == "code":
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                # As far down as in the script, for the lines that an error names.
                above = "\n" * source[: source.index(text)].count("\n")
                exec(compile(above + text, str(tutorial.path), "exec"), scope)
            printed.append(stdout.getvalue())
    pictures = sorted(Path(folder).glob("*.png"))
    assert [p.name for p in pictures] == [f"{tutorial.name}.png"], pictures
    out.mkdir(parents=True, exist_ok=True)
    picture_of(tutorial, out).write_bytes(pictures[0].read_bytes())
    # Of the processor, as other work on the machine has no part in that.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + children.ru_utime + children.ru_stime
    record = {"digest": tutorial.digest(), "printed": printed, "seconds": seconds}
    (out / f"{tutorial.name}.json").write_text(json.dumps(record, indent=1))
    return 0


def main() -> int:
    """Runs those that have changed; returns 1 where one has failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, default=OUT, help="gets pictures and output")
    args = parser.parse_args()
    names = args.names or [t.name for t in found()]
    out = args.out.resolve()
    due = [
        t
        for t in found()
        if t.name in names
        and not (_record(t, out).get("digest") == t.digest() and picture_of(t, out).is_file())
    ]
    if due:
        sys.path.insert(0, str(ROOT))
        # What all of them import, and what takes longest.
        from megatron_dwm.hosts import cpu

        cpu.install()
        import matplotlib.pyplot  # noqa: F401
        import megatron.training  # noqa: F401
    failed = []
    for tutorial in due:
        print(f"{tutorial.name} ...", flush=True)
        if run(tutorial, out):
            failed.append(tutorial.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
