"""Shared by all tests. Imports neither torch nor Megatron: the quick tests stay quick."""

import os
import sys
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent
SPAWN_RANKS = {"distributed", "functional"}

# tools/ and examples/ are not installed with the package, yet tests import from them.
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the GPU tests where none was asked for, and groups all for `--dist loadgroup`.

    Ranks of two runs on the same cores keep waiting for those of their own run that are not on a
    core, so tests that spawn ranks go one after the other. Beside them the tests of one process
    run, file by file, as the tests of a file share fixtures.
    """
    skip = pytest.mark.skip(reason="needs a GPU: run `make test-gpu` on a machine that has one")
    for item in items:
        if "gpu" in item.keywords and os.environ.get("MEGATRON_DWM_TEST_GPU") != "1":
            item.add_marker(skip)
        group = "ranks" if item.path.parent.name in SPAWN_RANKS else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
