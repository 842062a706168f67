"""The README says what the code does: its flag table and its file names."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from megatron_dwm.config import DWMConfig, flag
from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.hosts.megatron_lm.checks import refusals  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()


def test_flag_table_is_the_config() -> None:
    """Every flag stands there once, with its default and its help; no other flag does."""
    rows = dict(re.findall(r"^\| `(--dwm[a-z0-9-]*)` \| (.*) \|$", README, flags=re.MULTILINE))
    expected = {}
    for spec in dataclasses.fields(DWMConfig):
        default = f"`{spec.default}`"
        if spec.default is None or spec.default is False:
            default = "" if spec.default is None else "off"
        expected[flag(spec.name)] = f"{default} | {spec.metadata['help']}"
    assert rows == expected


def test_named_files_exist() -> None:
    """Every path of a top-level folder that the README names is in the tree."""
    named = set(re.findall(r"(?:tools|examples|benchmarks|tests)/[\w./]+\w", README))
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name


def test_list_of_refusals_is_the_codes() -> None:
    """Every flag that is refused by name stands there, with the reason and the way out."""
    table = README.split("| refused | why | what to do |\n|---|---|---|\n")[1].split("\n\n")[0]
    expected = []
    for flag_name, why, way_out in refusals():
        name, _, rest = flag_name.partition(" ")
        expected.append(f"| `{name}`{' ' + rest if rest else ''} | {why} | {way_out} |")
    assert table.split("\n") == expected


def test_tables_are_tables_for_a_reader() -> None:
    """Every row of a table follows a header and a rule of as many columns."""
    lines = README.split("\n")
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
            assert re.fullmatch(r"\|(-+\|)+", lines[k + 1]), f"line {k + 1} has no rule below"
        assert count == columns, f"line {k + 1}: {count} bars, the header has {columns}"
