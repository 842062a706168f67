"""What holds without the C++ data engine: weighting, and the check of an index in NumPy."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.data import index_check  # noqa: E402
from megatron_dwm.data.engine import engine  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from tests.functional.corpus import write_dataset  # noqa: E402

WITHOUT = """
import sys
sys.modules["megatron_dwm._data_engine"] = None  # what an import then says: there is none
from megatron_dwm.hosts import cpu
cpu.install()
from megatron_dwm.hosts.megatron_lm import session
from megatron_dwm.data import read_index
print(read_index(sys.argv[1]).tokens)
try:
    from megatron_dwm.data import draw_counts
except Exception as error:
    print(type(error).__name__, error)
"""


def test_the_trainer_and_an_index_need_no_engine(tmp_path):
    prefix = write_dataset(tmp_path / "data", 1)
    command = [sys.executable, "-c", WITHOUT, prefix]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, error = found.stdout.splitlines()[-2:]
    assert int(tokens) == engine_tokens(prefix)
    assert error.startswith("DWMError the data engine, which draws documents by weight, cannot be")


def engine_tokens(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)  # to be kept: it owns the file that its arrays are views of
    return int(dataset.sequence_lengths.sum())


def valid():
    lengths = np.array([3, 0, 5, 2, 7], np.int32)
    pointers = np.array([0, 6, 6, 16, 20], np.int64)
    return [lengths, pointers, np.array([0, 1, 1, 4, 5], np.int64), 2, 34]


def verdict(check, arguments):
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return None


def test_a_valid_index_passes_both():
    assert verdict(engine().check_index, valid()) is None
    assert verdict(index_check.check_in_numpy, valid()) is None


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2),
    st.integers(0, 4),
    st.sampled_from([-(2**31), -1, 0, 1, 4, 5, 6, 17, 34, 35, 2**31 - 1]),
    st.sampled_from([0, 33, 34, 35]),
)
def test_numpy_finds_what_the_engine_finds_in_the_same_words(chunk, which, at, value, size):
    arguments = [*valid()[:4], size]
    arguments[which] = arguments[which].copy()
    arguments[which][at] = value
    kept, index_check._CHUNK = index_check._CHUNK, chunk
    try:
        found = verdict(index_check.check_in_numpy, arguments)
    finally:
        index_check._CHUNK = kept
    assert found == verdict(engine().check_index, arguments)


def test_no_engine_is_said_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_dwm._data_engine", None)
    engine.cache_clear()
    try:
        with pytest.raises(DWMError, match="make setup"):
            engine()
    finally:
        engine.cache_clear()
