"""Megatron's `.idx`/`.bin` pairs: read and check an index, and count packed samples.

It needs neither torch nor Megatron, so that tools start quickly.

Layout of an `.idx` (little-endian): 9 bytes magic, uint64 version, uint8 token type code,
uint64 S, uint64 D + 1, then int32 `[S]` sequence lengths in tokens, int64 `[S]` byte offsets
into the `.bin`, int64 `[D + 1]` first sequence of each document, and for multimodal data
int8 `[S]` modes. Shapes: S sequences, D documents, P visited documents, N samples.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_dwm.data.engine import engine
from megatron_dwm.data.index_check import check_index
from megatron_dwm.errors import DWMError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floating point: valid in the format, but not token ids.
_TOKEN_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_REBUILD = "rebuild the pair with megatron-dwm preprocess"


class DatasetError(DWMError):
    """A data file that is missing, damaged or does not match its counterpart."""


@dataclass(frozen=True, eq=False)
class IndexSummary:
    """An index's description of its corpus. The arrays are memory-mapped and read-only.

    Nothing that grows with the corpus is kept in memory.

    Attributes:
        prefix: Path of the pair without `.idx` and `.bin`.
        documents: Number of documents D.
        sequences: Number of sequences S; a document has one, several or none.
        dtype: Type of a token in the `.bin`.
        bin_bytes: Size of the `.bin`.
        sequence_lengths: `[S]` int32, tokens per sequence.
        sequence_pointers: `[S]` int64, first byte of each sequence in the `.bin`.
        document_indices: `[D + 1]` int64, first sequence of each document, then S.
    """

    prefix: str
    documents: int
    sequences: int
    dtype: np.dtype
    bin_bytes: int
    sequence_lengths: np.ndarray
    sequence_pointers: np.ndarray
    document_indices: np.ndarray

    @cached_property
    def tokens(self) -> int:
        """Number of tokens; reads the lengths of all sequences on first use."""
        return int(self.sequence_lengths.sum(dtype=np.int64))

    def document_tokens(self, first: int, last: int) -> np.ndarray:
        """Return the number of tokens of each document from `first` up to `last`.

        It needs memory for these documents: process a corpus in chunks.

        Returns:
            `[last - first]` int64.
        """
        bounds = self.document_indices[first : last + 1]
        lengths = self.sequence_lengths[bounds[0] : bounds[-1]]
        sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return np.diff(sums[bounds - bounds[0]])


@dataclass(frozen=True, eq=False)
class SampleDocuments:
    """Where the tokens of packed samples come from.

    Positions count along `document_order`; without one they are document numbers.

    Attributes:
        first: `[N]` int64, position of the document with the sample's first token.
        last: `[N]` int64, position of the document with its last token.
        offset: `[N]` int64, offset in tokens of the first token in its document.
        document_order: `[P]` int64, or None.
    """

    first: np.ndarray
    last: np.ndarray
    offset: np.ndarray
    document_order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.first)

    def documents(self, sample: int) -> np.ndarray:
        """Return the numbers of the documents that a sample touches, in order.

        Documents without tokens between its first and last one are included.
        """
        positions = np.arange(self.first[sample], self.last[sample] + 1)
        return positions if self.document_order is None else self.document_order[positions]


def read_index(prefix: str | os.PathLike[str], verify: bool = True) -> IndexSummary:
    """Read and check the index of a Megatron dataset.

    Args:
        prefix: Path of the pair without `.idx` and `.bin`, as in `--data-path`.
        verify: Whether to read all of the index to check that every token that it refers to is
            inside the `.bin`. Without it only the header and the size of the index are checked.

    Raises:
        DatasetError: A file is missing or damaged, or the two do not belong together.
    """
    prefix = os.fspath(prefix)
    idx_path, bin_path = f"{prefix}.idx", f"{prefix}.bin"
    idx_bytes = _file_size(idx_path, prefix)
    if idx_bytes < _HEADER.size:
        raise DatasetError(
            f"{idx_path}: expected at least {_HEADER.size} bytes, found {idx_bytes}: "
            f"the file is truncated; {_REBUILD}"
        )
    try:
        raw = np.memmap(idx_path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise _unreadable(idx_path, error) from error

    magic, version, code, sequences, index_entries = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    dtype = _check_header(idx_path, magic, version, code)
    _check_size(idx_path, len(raw), sequences, index_entries)

    offset = _HEADER.size
    lengths = raw[offset : offset + 4 * sequences].view("<i4")
    offset += 4 * sequences
    pointers = raw[offset : offset + 8 * sequences].view("<i8")
    offset += 8 * sequences
    document_indices = raw[offset : offset + 8 * index_entries].view("<i8")

    bin_bytes = _file_size(bin_path, prefix)
    if verify:
        try:
            check_index(lengths, pointers, document_indices, dtype.itemsize, bin_bytes)
        except ValueError as error:
            raise DatasetError(
                f"{idx_path}: {error}; the file is damaged or does not belong to {bin_path} "
                f"({bin_bytes} bytes): {_REBUILD}"
            ) from error
    return IndexSummary(
        prefix=prefix,
        documents=index_entries - 1,
        sequences=sequences,
        dtype=dtype,
        bin_bytes=bin_bytes,
        sequence_lengths=lengths,
        sequence_pointers=pointers,
        document_indices=document_indices,
    )


def documents_of(document_indices: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Return the documents that sequences belong to.

    Args:
        document_indices: `[D + 1]`, see `IndexSummary`; only a few entries are read.
        sequences: `[n]` sequence numbers; few, such as those of a sample.

    Returns:
        `[n]` int64.
    """
    found = [_document_of(document_indices, sequence) for sequence in sequences.tolist()]
    return np.array(found, dtype=np.int64)


def _document_of(document_indices: np.ndarray, sequence: int) -> int:
    # If every document is one sequence, two entries are enough.
    if document_indices[sequence : sequence + 2].tolist() == [sequence, sequence + 1]:
        return sequence
    # Not np.searchsorted, which copies unaligned arrays, and no array of an .idx is aligned. Of
    # documents that begin with the same sequence, the last one is not empty.
    return bisect_right(document_indices, sequence) - 1


def num_packed_samples(tokens: int, sequence_length: int, *, add_extra_token: bool = True) -> int:
    """Return how many packed samples one pass over a corpus makes.

    Args:
        tokens: Tokens of the corpus.
        sequence_length: Tokens per sample.
        add_extra_token: Whether the last sample needs one more token, for its last label.

    Raises:
        ValueError: `sequence_length` is below 1 or `tokens` below 0.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length: expected at least 1, found {sequence_length}")
    if tokens < 0:
        raise ValueError(f"tokens: expected at least 0, found {tokens}")
    return max(tokens - int(add_extra_token), 0) // sequence_length


def sample_documents(
    prefix_sums: np.ndarray,
    sequence_length: int,
    num_samples: int | None = None,
    *,
    add_extra_token: bool = True,
    document_order: np.ndarray | None = None,
) -> SampleDocuments:
    """Find the documents that each packed sample takes its tokens from.

    Sample k covers the tokens `[k * sequence_length, (k + 1) * sequence_length + extra)` of the
    documents' concatenation, where extra is 1 with `add_extra_token`.

    Args:
        prefix_sums: `[D + 1]` integers, tokens before each document, then all tokens.
        sequence_length: Tokens per sample.
        num_samples: Number of samples N; None for all that fit.
        add_extra_token: Whether a sample needs one more token than it advances by.
        document_order: `[P]` integers, the documents in the order of their concatenation; may
            leave out and repeat documents. None for 0 to D - 1.

    Raises:
        ValueError: An argument is malformed, or there are too few tokens for `num_samples`.
    """
    order = None if document_order is None else _as_int64(document_order, "document_order")
    first, last, offset = engine().sample_to_document(
        _as_int64(prefix_sums, "prefix_sums"), sequence_length, num_samples, add_extra_token, order
    )
    return SampleDocuments(first=first, last=last, offset=offset, document_order=order)


def _as_int64(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    # An empty list is an array of floats.
    if array.size and not np.can_cast(array.dtype, np.int64, "safe"):
        raise ValueError(f"{name}: expected integers that fit in 64 bits, found {array.dtype}")
    return array.astype(np.int64, copy=False)


def _file_size(path: str, prefix: str) -> int:
    try:
        if os.path.isfile(path):
            return os.path.getsize(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if os.path.isdir(path):
        raise DatasetError(f"{path}: expected a file, found a folder; {_REBUILD}")
    stem = Path(prefix)
    if path.endswith(".idx") and stem.suffix in (".idx", ".bin") and os.path.isfile(stem):
        hint = f"pass the prefix without the ending: {stem.with_suffix('')}"
    elif path.endswith(".idx") and os.path.isdir(stem):
        hint = "the prefix is a folder: pass the path of a pair in it, without .idx and .bin"
    else:
        hint = "check the path, or make the pair with megatron-dwm preprocess"
    raise DatasetError(f"{path}: no such file; {hint}")


def _unreadable(path: str, error: Exception) -> DatasetError:
    reason = getattr(error, "strerror", None) or str(error)
    return DatasetError(f"{path!r}: cannot be read ({reason}); check the path and its permissions")


def _check_header(path: str, magic: bytes, version: int, code: int) -> np.dtype:
    if magic != _MAGIC:
        raise DatasetError(
            f"{path}: expected Megatron's index header {_MAGIC!r}, found {magic!r}: "
            f"not a Megatron index; {_REBUILD}"
        )
    if version != _VERSION:
        raise DatasetError(
            f"{path}: expected index version {_VERSION}, found {version}; {_REBUILD}"
        )
    if code not in _TOKEN_DTYPES:
        allowed = ", ".join(f"{k} ({np.dtype(v).name})" for k, v in _TOKEN_DTYPES.items())
        raise DatasetError(
            f"{path}: token type code {code} is not one of the integer types {allowed}; {_REBUILD}"
        )
    return np.dtype(_TOKEN_DTYPES[code])


def _check_size(path: str, found: int, sequences: int, index_entries: int) -> None:
    # Python integers do not overflow, so counts of any size can be compared before use.
    expected = _HEADER.size + 12 * sequences + 8 * index_entries
    with_modes = expected + sequences
    if found not in (expected, with_modes):
        state = "truncated" if found < expected else "longer than its header says"
        raise DatasetError(
            f"{path}: expected {expected} bytes for {sequences} sequences and {index_entries} "
            f"document indices, found {found}: the file is {state}; {_REBUILD}"
        )
