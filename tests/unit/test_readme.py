"""The README says what the code does: its flag table and its file names."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from megatron_dwm.config import DWMConfig, flag

ROOT = Path(__file__).resolve().parents[2]
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
