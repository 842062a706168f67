"""Checks that an index is consistent in itself and with its `.bin`: in C++, else in NumPy.

Both name the first wrong entry, with the same message.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from megatron_dwm.data.engine import engine
from megatron_dwm.errors import DWMError

_CHUNK = 1 << 20


def check_index(
    lengths: np.ndarray,
    pointers: np.ndarray,
    document_indices: np.ndarray,
    itemsize: int,
    bin_bytes: int,
) -> None:
    """Checks an index.

    Args:
        lengths: `[S]` int32, tokens per sequence.
        pointers: `[S]` int64, first byte of each sequence in the `.bin`.
        document_indices: `[D + 1]` int64, first sequence of each document, then S.
        itemsize: bytes per token.
        bin_bytes: size of the `.bin`.

    Raises:
        ValueError: names the first bad entry.
    """
    try:
        compiled = engine()
    except DWMError:
        if importlib.util.find_spec("megatron_dwm._data_engine") is not None:
            raise  # it exists but cannot be loaded
        check_in_numpy(lengths, pointers, document_indices, itemsize, bin_bytes)
        return
    compiled.check_index(lengths, pointers, document_indices, itemsize, bin_bytes)


def check_in_numpy(
    lengths: np.ndarray,
    pointers: np.ndarray,
    document_indices: np.ndarray,
    itemsize: int,
    bin_bytes: int,
) -> None:
    """Like `check_index`, in NumPy."""
    before = 0
    for first in range(0, len(lengths), _CHUNK):
        part = slice(first, first + _CHUNK)
        length, pointer = lengths[part].astype(np.int64), pointers[part]
        previous = np.concatenate([[before], pointer[:-1]])
        bad = (length < 0) | (pointer < 0) | (pointer < previous)
        bad |= pointer > bin_bytes - length * itemsize
        if bad.any():
            k = int(bad.argmax())
            raise ValueError(
                _of_sequence(first + k, length[k], pointer[k], previous[k], itemsize, bin_bytes)
            )
        before = int(pointer[-1])
    _check_documents(document_indices, len(lengths))


def _of_sequence(
    i: int, length: int, pointer: int, previous: int, itemsize: int, bin_bytes: int
) -> str:
    if length < 0:
        return f"sequence_lengths[{i}]: {length} is negative"
    if pointer < 0:
        return f"sequence_pointers[{i}]: {pointer} is negative"
    if pointer < previous:
        return f"sequence_pointers[{i}]: {pointer} is less than the entry before it, {previous}"
    return (
        f"sequence_pointers[{i}]: the sequence's {length * itemsize} bytes from byte {pointer} on "
        f"lie outside the .bin's {bin_bytes} bytes"
    )


def _check_documents(indices: np.ndarray, sequences: int) -> None:
    if not len(indices):
        raise ValueError(
            "document_indices: expected at least one entry (number of documents + 1), found none"
        )
    if indices[0] != 0:
        raise ValueError(f"document_indices[0]: expected 0, found {indices[0]}")
    for first in range(1, len(indices), _CHUNK):
        part, before = indices[first : first + _CHUNK], indices[first - 1 : first - 1 + _CHUNK]
        falls = part < before[: len(part)]
        bad = falls | (part > sequences)
        if bad.any():
            k = int(bad.argmax())
            what = f"document_indices[{first + k}]: {part[k]} is "
            if falls[k]:
                raise ValueError(f"{what}less than the entry before it, {before[k]}")
            raise ValueError(f"{what}beyond the {sequences} sequences")
    if indices[-1] != sequences:
        raise ValueError(
            f"document_indices[{len(indices) - 1}]: the last entry is {indices[-1]}, expected the "
            f"number of sequences, {sequences}"
        )
