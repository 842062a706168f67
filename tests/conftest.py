"""Shared by all tests. Imports neither torch nor Megatron: the quick tests stay quick."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent
SPAWN_RANKS = (
    "tests/distributed/",
    "tests/functional/",
    "tests/recipes/test_runs.py",
    "tests/cases/test_checkpoint_formats.py",
    "tests/cases/test_ranks_that_act_alone.py",
    "tests/contract/test_ghost_transformer_engine.py",
    "tests/contract/test_bridge_contract.py",
)
pytest_plugins = ["tests.transformer_engine_cpu.fixtures"]

# tools/ and examples/ are not installed with the package, yet tests import from them.
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))


def pytest_configure(config: pytest.Config) -> None:
    """Gives the session a folder of its own for extensions that torch compiles as they are needed.

    A process that was killed while compiling leaves its lock in that folder, and whoever needs the
    extension next waits for it without end.
    """
    if not hasattr(config, "workerinput") and "TORCH_EXTENSIONS_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="torch_extensions_")
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by its folder; skips those that need a GPU, or time, if not asked for."""
    for item in items:
        folder = item.path.relative_to(REPO_ROOT / "tests").parts[0]
        item.add_marker(folder)
        if item.nodeid.startswith(SPAWN_RANKS):
            item.add_marker("ranks")
    missing = {}
    if os.environ.get("MEGATRON_DWM_TEST_GPU") != "1":
        missing["gpu"] = "needs a GPU: run `make test-gpu` on a machine that has one"
    if os.environ.get("MEGATRON_DWM_TEST_EXTENDED") != "1":
        missing["extended"] = "takes long: run `make test-extended`"
    for item in items:
        for mark, reason in missing.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deals the tests to the workers of pytest-xdist (`make test` has two).

    Ranks of two runs on the same cores keep waiting for those of their own run that are not on a
    core, so all tests that spawn ranks go to one worker. Beside it the tests of one process run,
    file by file, as the tests of a file share fixtures.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RanksOneAfterTheOther(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if nodeid.startswith(SPAWN_RANKS) else nodeid.split("::")[0]

    return RanksOneAfterTheOther(config, log)
