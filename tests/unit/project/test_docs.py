"""The pages say what the code does: their tables, links, commands and messages.

README.md, CONTRIBUTING.md and docs/ are read as files. What the pages' marks mean is in
tools/docs/pages.py. Not exercised: whether what a page says in words is right, and the builder of
the site (`make docs`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import posixpath
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_dwm.config import DWMConfig, flag
from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.hosts.megatron_lm.checks import refusals  # noqa: E402
from megatron_dwm.logs.names import NAMES  # noqa: E402
from tests.processor_time import processor_time_of_children  # noqa: E402
from tests.unit.logs import made_up_runs as made_up  # noqa: E402
from tools.docs import pages  # noqa: E402

ROOT = pages.ROOT
PAGES = pages.pages()
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "benchmarks/quality.md"]
BLOCKS = [block for page in PAGES for block in pages.blocks(page)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------- tables


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_tables_that_are_written_by_a_script_are_up_to_date() -> None:
    script = ROOT / "tools/docs/tables.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    marks = [re.findall("<!-- generated: (\\w+) -->", page.read_text()) for page in PAGES]
    assert sorted(sum(marks, [])) == ["commands", "flags", "refusals"]
    # And the script leaves none out.
    flags = (ROOT / "docs/reference/flags.md").read_text()
    assert all(f"| `{flag(spec.name)}` |" in flags for spec in dataclasses.fields(DWMConfig))
    limits = (ROOT / "docs/limits.md").read_text()
    assert all(f"| `{name.partition(' ')[0]}`" in limits for name, _, _ in refusals())


def test_every_figure_of_the_log_is_explained() -> None:
    page = (ROOT / "docs/reading_the_log.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_tables_are_tables_for_a_reader(page: Path) -> None:
    """Every row of a table follows a header and a rule of as many columns."""
    lines = page.read_text().split("\n")
    inside = False
    columns = 0
    for k, line in enumerate(lines):
        if line.startswith("```"):
            inside = not inside
        if inside or not line.startswith("|"):
            columns = 0
            continue
        count = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
        if not columns:
            columns = count
            assert re.fullmatch(r"\|( ?-+ ?\|)+", lines[k + 1]), f"line {k + 1} has no rule below"
        assert count == columns, f"line {k + 1}: {count} bars, the header has {columns}"


# -------------------------------------------------------------------------------------- links


def test_named_files_exist() -> None:
    """Every path of a top-level folder that a page names is in the tree."""
    named: set[str] = set()
    for page in LINKED:
        # Addresses name files of others.
        text = re.sub(r"https?://[^\s)]+", "", page.read_text())
        named |= set(re.findall(r"\b(?:tools|examples|benchmarks|tests|csrc)/[\w./]+\w", text))
        named |= set(re.findall(r"\bmegatron_dwm/[\w./]+\.py\b", text))
    history = {"tools/convert"}  # in the change log, by their former names
    assert len(named) > 50
    for name in named - history:
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name


def links(text: str) -> list[str]:
    """Returns the targets of a page's links and pictures, code left out."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """Returns what a link to a page may name: its headings, and what the reference describes."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    described = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    return frozenset([*(heading.strip().replace(" ", "-") for heading in plain), *described])


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        there = page if not target else Path(posixpath.normpath(page.parent / target))
        assert there.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(there), f"{link}: no such heading"


@pytest.mark.parametrize("link", ["none.md", "page.md#no-heading", "page.md#in-a-block"])
def test_the_check_of_links_notices(tmp_path: Path, link: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A heading\n\n```\n# In a block\n```\n\n[good](#a-heading), [bad]({link})\n")
    with pytest.raises(AssertionError, match="no such"):
        test_links_lead_somewhere(page)


def test_every_page_is_reached_from_the_readme() -> None:
    """By links, from page to page; and each says where it belongs on the site."""
    seen, due = set(), [ROOT / "README.md"]
    while due:
        page = due.pop()
        seen.add(page)
        for link in links(page.read_text()):
            there = Path(posixpath.normpath(page.parent / link.partition("#")[0]))
            if there.suffix == ".md" and there.exists() and there not in seen:
                due.append(there)
    for page in PAGES:
        in_docs = page.is_relative_to(ROOT / "docs")
        if in_docs:
            place = pages.place(page.read_text())
            assert place is not None, f"{name_of(page)}: no <!-- nav: SECTION NUMBER -->"
            assert place[0] in pages.SECTIONS, f"{name_of(page)}: {place[0]} is no section"
    unreached = {name_of(page) for page in set(PAGES) - seen}
    assert unreached == {"docs/index.md", "docs/reference/api.md"} - {
        name_of(page) for page in seen
    }


# ----------------------------------------------------------------------------------- commands


def test_every_command_is_run_by_a_test_or_says_that_it_is_not() -> None:
    """Maps each command of the pages to what runs it."""
    by_command: dict[str, str] = {}
    for block in BLOCKS:
        where = f"{block.page}, line {block.line}"
        assert block.mark is not None, (
            f"{where}: a block of commands without a mark (tools/docs/pages.py): {block.commands}"
        )
        assert block.commands, where
        by_command.update(dict.fromkeys(block.commands, block.mark))
    runs = [mark for mark in by_command.values() if not mark.startswith("not run: ")]
    assert len(by_command) > 35
    assert len(runs) > 0.75 * len(by_command)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark], ids=lambda b: f"{b.page}:{b.line}")
def test_the_test_that_is_named_is_there(block: pages.Block) -> None:
    kind, _, rest = block.mark.partition(": ")
    if kind == "not run":
        assert len(rest.split()) > 3, "give the reason"
    if kind != "test":
        return
    for name in rest.split():
        file, _, function = name.partition("::")
        path = ROOT / file
        assert path.is_file(), name
        if not function:
            # What CI runs is itself a list of commands.
            assert all(c.split(" #")[0] in path.read_text() for c in block.commands), name
            continue
        tree = ast.parse(path.read_text())
        functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert function in functions, name


def test_no_shell_command_stands_outside_a_block() -> None:
    """Blocks in other languages hold none, so that none goes unmarked."""
    for page in PAGES:
        for language, text in re.findall(
            r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE
        ):
            if language in pages.SHELL or language == "python":
                continue
            assert not re.search(r"^(megatron-dwm|torchrun|make|pip) ", text, re.MULTILINE), text


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the pages read, and the program on its PATH."""
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path_factory.mktemp("commands")
    (folder / "bin").mkdir()
    for name, words in (("megatron-dwm", "-m megatron_dwm"), ("python", "")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.chmod(0o755)
    made_up.whole_run(folder / "runs/dwm")
    made_up.write_log(folder / "runs/uniform", made_up.log_lines(kind="uniform"))
    for name, loss in (("stock", 4.5), ("dwm", 4.4)):
        (folder / f"{name}.log").write_text(trainer_output(loss))
    (folder / "data").mkdir()
    texts = made_up.texts()[:-1]
    made_up.write_bytes(folder / "data/web_text_document", texts)
    rows = "".join(f"{1 + k % 3},{10 + k}\n" for k in range(len(texts)))
    (folder / "quality.csv").write_text("weight,perplexity\n" + rows)
    (folder / "text").mkdir()
    for number, part in enumerate((texts[:20], texts[20:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        packed = zstandard.ZstdCompressor().compress(lines.encode())
        (folder / f"text/{number}.jsonl.zst").write_bytes(packed)
    (folder / "target.jsonl").write_text(json.dumps({"text": "a word of the target " * 20}) + "\n")
    return folder


def trainer_output(loss: float) -> str:
    lines = ["----- arguments -----\n", "  seq_length ................ 128\n"]
    for step in (10, 20, 30, 40):
        lines.append(
            f" [2026-01-01 00:00:00.000000] iteration {step:8d}/{40:8d} | consumed samples: "
            f"{16 * step:12d} | elapsed time per iteration (ms): 100.0 | lm loss: 5.0E+00 |\n"
        )
        lines.append(f" validation loss at iteration {step} | lm loss value: {loss:E} | x |\n")
    return "".join(lines)


def test_commands_that_are_run_here(sandbox: Path) -> None:
    """As they stand on the pages, in the order of the pages, each once; in half a minute."""
    environment = {
        **os.environ,
        "HOME": str(sandbox),
        "PATH": f"{sandbox / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    here = [block for block in BLOCKS if block.mark == "run here"]
    commands = dict.fromkeys(command for block in here for command in block.commands)
    assert len(commands) > 10
    before = processor_time_of_children()
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(commands)],
        cwd=sandbox,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert processor_time_of_children() - before < 30
    for name in ("report.png", "report.html", "web.csv", "data/web_text_document.weights"):
        assert (sandbox / name).stat().st_size > 100, name


# ----------------------------------------------------------------------------------- messages


@functools.cache
def texts_of_the_code() -> tuple[str, ...]:
    """Returns every text of the package, with a zero byte for each value that is put in."""
    found = []
    for path in (ROOT / "megatron_dwm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


MESSAGES = re.findall(
    r"^- (`[^`]+`(?:, `[^`]+`)*)$", (ROOT / "docs/messages.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("message", [m for line in MESSAGES for m in re.findall("`([^`]+)`", line)])
def test_messages_are_those_of_the_code(message: str) -> None:
    """A message's fixed parts are found, in their order, in one text of the package."""
    parts = [part.strip() for part in message.split("...") if part.strip(" ;:(")]
    assert sum(map(len, parts)) > 8, "too little to know it by"
    pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
    assert any(map(pattern.search, texts_of_the_code()))


@pytest.mark.parametrize(
    "message", ["add --dwm, or remove them ... given without --dwm", "a message that is not there"]
)
def test_the_check_of_messages_notices(message: str) -> None:
    with pytest.raises(AssertionError):
        test_messages_are_those_of_the_code(message)


def test_there_are_messages_of_every_kind() -> None:
    assert len(MESSAGES) > 50
    text = (ROOT / "docs/messages.md").read_text()
    assert text.count("\n## ") >= 9


# ------------------------------------------------------------------------------------ the site


def test_a_page_is_found_without_saying_where_it_belongs() -> None:
    assert pages.place("# A page") is None
    assert pages.place("<!-- nav: Guide 45 -->\n# A page") == ("Guide", 45)


def test_marks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(
        textwrap.dedent("""\
            <!-- not run: it takes a week -->
            ```bash
            make world \\
                --fast   # all of it
            # a comment
            ```

            ```
            what it prints
            ```

            ```bash
            NAME=1 make more
            ```
            """)
    )
    first, second = pages.blocks(tmp_path / "page.md")
    assert (first.mark, first.line) == ("not run: it takes a week", 3)
    assert first.commands == ["make world --fast"]
    assert second.mark is None and second.commands == ["NAME=1 make more"]
    noted = pages.with_notes((tmp_path / "page.md").read_text())
    assert "```\n\nNot run by the tests: it takes a week\n{ .mark }" in noted
