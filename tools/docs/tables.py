#!/usr/bin/env python
"""Writes the tables of the pages that are generated from the code.

    python tools/docs/tables.py            write them into the pages
    python tools/docs/tables.py --check    change nothing; 1 where a page is out of date

A table is between `<!-- generated: NAME -->` and `<!-- end -->`, on any page of docs/.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
_PART = re.compile(r"(<!-- generated: (\w+) -->\n\n).*?(?=\n<!-- end -->)", re.DOTALL)


def flags() -> str:
    """Returns the flags of `DWMConfig`, their defaults and their help."""
    from megatron_dwm.config import DWMConfig, flag

    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for spec in dataclasses.fields(DWMConfig):
        default = f"`{spec.default}`"
        if spec.default is None or spec.default is False:
            default = "" if spec.default is None else "off"
        rows.append(f"| `{flag(spec.name)}` | {default} | {spec.metadata['help']} |")
    return "\n".join(rows)


def refusals() -> str:
    """Returns the flags of the trainer that are refused by name, why, and what to do."""
    from megatron_dwm.hosts.unsupported import refusals

    rows = ["| refused | why | what to do |", "|---|---|---|"]
    for name, why, way_out in refusals():
        flag, _, rest = name.partition(" ")
        rows.append(f"| `{flag}`{' ' + rest if rest else ''} | {why} | {way_out} |")
    return "\n".join(rows)


def commands() -> str:
    """Returns the subcommands of `megatron-dwm`."""
    from megatron_dwm.cli.table import COMMANDS

    rows = ["| command | does |", "|---|---|"]
    rows += [f"| `{command.name}` | {command.about} |" for command in COMMANDS]
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    "flags": flags,
    "refusals": refusals,
    "commands": commands,
}


def renewed(text: str) -> str:
    """Returns a page with its tables regenerated from the code."""
    return _PART.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n", text)


def main() -> int:
    """Writes or compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    stale = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        new = renewed(text)
        if new == text:
            continue
        stale.append(str(page.relative_to(ROOT)))
        if not args.check:
            page.write_text(new)
    if args.check and stale:
        print(f"out of date: {', '.join(stale)}; run python tools/docs/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
