"""Shared by all tests. Imports neither torch nor Megatron: the quick tests stay quick."""

import os
import sys
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent

# tools/ and examples/ are not installed with the package, yet tests import from them.
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("MEGATRON_DWM_TEST_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="needs a GPU: run `make test-gpu` on a machine that has one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
