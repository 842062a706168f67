"""The marks in the pages' Markdown, for both the site and the tests.

    <!-- nav: SECTION NUMBER -->    a page's place in the navigation: a section, and its order in it
    <!-- test: FILE::NAME -->       before a block of commands: the test that runs it; several
                                    with spaces between them
    <!-- run here -->               the block is run as it stands by tests/unit/project/test_docs.py
    <!-- not run: WHY -->           nothing runs the block; the site says so below it
    <!-- generated: NAME -->        the text up to <!-- end --> is written by tables.py

They are comments, so that a page reads the same when Markdown is shown without the site. Standard
library only: the tests do not need the site's packages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Pages outside docs/ that are also on the site, and what they need.
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/quality.md", "benchmarks/quality.png")
SECTIONS = ("Start", "Guide", "Tutorials", "Background", "Reference", "Project")
# Fenced blocks in these languages hold commands for a shell.
SHELL = ("", "bash", "sh", "shell", "console")

_NAV = re.compile(r"<!-- nav: (\w+) (\d+) -->")
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>test: .+?|run here|not run: .+?) -->\n+)?"
    r"^(?P<fence>```)(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# Beginnings of lines that make a block one of commands; blocks without such a line show output,
# formulas or files.
_PROGRAMS = ("bash", "docker", "make", "megatron-dwm", "pip", "python", "torchrun")
_COMMAND = re.compile(rf"(?:[A-Z_]+=\S* )*({'|'.join(_PROGRAMS)})\b")


@dataclass(frozen=True)
class Block:
    """A block of shell commands.

    Attributes:
        page: its page, relative to the root of the repository.
        line: line of its first command.
        text: its text.
        mark: its mark, which says what runs it; None without one.
    """

    page: str
    line: int
    text: str
    mark: str | None

    @property
    def commands(self) -> list[str]:
        """Its commands, each in one line and without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = (line.split(" #")[0] for line in lines)
        return [" ".join(line.split()) for line in words if line.strip() and line[0] != "#"]


def pages() -> list[Path]:
    """Returns README.md, CONTRIBUTING.md and every page of docs/."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *found]


def place(text: str) -> tuple[str, int] | None:
    """Returns the section of a page and its number there; None if the page does not say."""
    found = _NAV.search(text)
    return None if found is None else (found[1], int(found[2]))


def without_place(text: str) -> str:
    """Returns a page without the comment that says where it belongs."""
    return _NAV.sub("", text, count=1).lstrip()


def blocks(path: Path) -> list[Block]:
    """Returns a page's blocks of shell commands."""
    text, found = path.read_text(), []
    for match in _FENCE.finditer(text):
        if match["language"] not in SHELL:
            continue
        first = next((line for line in match["text"].splitlines() if line.strip()), "")
        if not _COMMAND.match(first) and match["mark"] is None:
            continue
        line = text[: match.start("text")].count("\n") + 1
        page = str(path.relative_to(ROOT))
        found.append(Block(page, line, match["text"], match["mark"]))
    return found


def with_notes(text: str) -> str:
    """Returns a page with a note below each block that nothing runs, for the reader."""

    def noted(match: re.Match[str]) -> str:
        mark = match["mark"]
        block = match[0][match.start("fence") - match.start() :]
        if mark is None or not mark.startswith("not run: "):
            return block
        return f"{block}\n\nNot run by the tests: {mark.removeprefix('not run: ')}\n{{ .mark }}\n"

    return _FENCE.sub(noted, text)
