"""Which tests may run at the same time (`make test` runs two at a time).

Tests that spawn ranks go one after the other: ranks of two runs on the same cores keep waiting for
those of their own run that are not on a core. Beside them the tests of one process run, file by
file, as the tests of a file share fixtures.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SPAWN_RANKS = {"distributed", "functional"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups the tests for pytest-xdist's `--dist loadgroup`."""
    for item in items:
        path = Path(item.path)
        group = "ranks" if path.parent.name in SPAWN_RANKS else path.stem
        item.add_marker(pytest.mark.xdist_group(group))
