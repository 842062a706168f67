"""The weight file `PREFIX.weights`: one weight, and optionally one domain, for every document.

It is kept beside Megatron's `PREFIX.idx` and `PREFIX.bin`. This module needs neither torch nor
Megatron.

Layout (little-endian): a header of 64 bytes, then float32 `[D]` weights, then with bit 0 of the
flags int32 `[D]` domains (-1: none) and a UTF-8 JSON list of domain names (empty: domains are
bare numbers). The header: 8 bytes magic, uint32 version, uint32 flags, uint64 documents, uint64
sequences and uint64 tokens of the index, uint64 bytes of the names, uint32 CRC-32 of all that
follows the header, uint32 CRC-32 of the header before this number, 8 zero bytes.
Shapes: D documents.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_dwm.data.index import DatasetError, IndexSummary
from megatron_dwm.files.json_files import JsonError, parse_json

_MAGIC = b"DWMWGT\x00\x00"
_VERSION = 1
_FIELDS = struct.Struct("<8sIIQQQQI")
_CRC = struct.Struct("<I")
_HEADER_BYTES = 64
_PADDING = bytes(_HEADER_BYTES - _FIELDS.size - _CRC.size)
_HAS_DOMAINS = 1
_REMAKE = "make it again with megatron-dwm weights make"

# Large enough for NumPy to be fast, small enough for temporaries to fit in the cache.
CHUNK_DOCUMENTS = 1 << 18


@dataclass(frozen=True, eq=False)
class WeightFile:
    """A weight file. The arrays are memory-mapped and read-only.

    Attributes:
        path: Path of the file.
        documents: Number of documents D.
        sequences: Number of sequences of the index that the file was made for.
        tokens: Number of tokens of that index.
        weights: `[D]` float32, each at least 0, one or more above 0; their sum has no meaning.
        domains: `[D]` int32, -1 for a document without a domain, or None.
        domain_names: Name of each domain; empty when domains are bare numbers.
    """

    path: str
    documents: int
    sequences: int
    tokens: int
    weights: np.ndarray
    domains: np.ndarray | None
    domain_names: tuple[str, ...]
    _raw: np.ndarray = field(repr=False)

    @property
    def header(self) -> bytes:
        """The 64 bytes before the weights; they hold a checksum of everything that follows."""
        return self._raw[:_HEADER_BYTES].tobytes()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole file in hexadecimal; reads the file on first use."""
        return hashlib.sha256(self._raw).hexdigest()


def weights_path(prefix: str | os.PathLike[str]) -> str:
    """Return the path of the weight file of a Megatron dataset."""
    return f"{os.fspath(prefix)}.weights"


def document_chunks(last: int, first: int = 0) -> Iterator[slice]:
    """Yield slices of at most CHUNK_DOCUMENTS that cover `range(first, last)` in order."""
    for start in range(first, last, CHUNK_DOCUMENTS):
        yield slice(start, min(start + CHUNK_DOCUMENTS, last))


def read_weights(
    path: str | os.PathLike[str], index: IndexSummary | None = None, verify: bool = True
) -> WeightFile:
    """Read and check a weight file.

    Args:
        path: Path of the file, see `weights_path`.
        index: The index that the weights are for; None to allow any.
        verify: Whether to read all of the file to check its checksum, weights and domains.
            Without it only the header, the sizes and the domain names are checked.

    Raises:
        DatasetError: The file is missing, damaged, or was made for another index.
    """
    path = os.fspath(path)
    raw = _map(path)
    header = _read_header(path, raw)
    if index is not None:
        _check_index(path, header, index)

    weights_end = _HEADER_BYTES + 4 * header.documents
    weights = raw[_HEADER_BYTES:weights_end].view("<f4")
    domains = None
    if header.flags & _HAS_DOMAINS:
        domains = raw[weights_end : weights_end + 4 * header.documents].view("<i4")
    if verify and (found := zlib.crc32(raw[_HEADER_BYTES:])) != header.payload_crc:
        raise DatasetError(
            f"{path}: checksum {found:#010x} instead of {header.payload_crc:#010x}: the file is "
            f"damaged; {_REMAKE}"
        )
    names: tuple[str, ...] = ()
    if domains is not None:
        names = _read_names(path, raw[len(raw) - header.name_bytes :].tobytes())
    if verify:
        _check_weights(path, weights)
        if domains is not None:
            _check_domains(path, domains, names)
    return WeightFile(
        path=path,
        documents=header.documents,
        sequences=header.sequences,
        tokens=header.tokens,
        weights=weights,
        domains=domains,
        domain_names=names,
        _raw=raw,
    )


def write_weights(
    path: str | os.PathLike[str],
    weights: np.ndarray,
    index: IndexSummary | WeightFile,
    domains: np.ndarray | None = None,
    domain_names: Sequence[str] = (),
) -> WeightFile:
    """Check weights and write them; the file appears complete or not at all.

    Args:
        path: Path of the file, see `weights_path`; an existing file is replaced.
        weights: `[D]` numbers, stored as float32.
        index: The index of the dataset, or another weight file of the same dataset.
        domains: `[D]` integers, -1 for a document without a domain, or None.
        domain_names: Name of each domain; empty when domains are bare numbers.

    Returns:
        The file as `read_weights` would return it.

    Raises:
        DatasetError: A weight is NaN, infinite or negative, all are zero, the arrays are no
            match for the index, a domain has no name, or the file cannot be written.
    """
    path = os.fspath(path)
    names = tuple(domain_names)
    weights = np.asarray(weights)
    _check_array(path, "weights", weights, index, "iuf")
    _check_weights(path, weights)
    encoded_names = b""
    if domains is not None:
        domains = np.asarray(domains)
        _check_array(path, "domains", domains, index, "iu")
        _check_domains(path, domains, names)
        encoded_names = _encode_names(path, names)
    elif names:
        raise DatasetError(f"{path}: {len(names)} domain names, but no domains")

    partial = f"{path}.partial-{os.getpid()}"
    try:
        try:
            with open(partial, "wb") as file:
                file.write(bytes(_HEADER_BYTES))
                payload_crc = 0
                for part in _payload(weights, domains, encoded_names):
                    payload_crc = zlib.crc32(part, payload_crc)
                    file.write(part)
                fields = _FIELDS.pack(
                    _MAGIC,
                    _VERSION,
                    0 if domains is None else _HAS_DOMAINS,
                    index.documents,
                    index.sequences,
                    index.tokens,
                    len(encoded_names),
                    payload_crc,
                )
                file.seek(0)
                file.write(fields + _CRC.pack(zlib.crc32(fields)) + _PADDING)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
        _sync_folder(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DatasetError(
            f"{path!r}: cannot be written ({reason}); check the folder, its permissions and the "
            f"space on the disk"
        ) from error
    return read_weights(path, verify=False)


@dataclass(frozen=True)
class _Header:
    flags: int
    documents: int
    sequences: int
    tokens: int
    name_bytes: int
    payload_crc: int


def _map(path: str) -> np.ndarray:
    try:
        if os.path.isfile(path) and os.path.getsize(path) >= _HEADER_BYTES:
            return np.memmap(path, dtype=np.uint8, mode="r")
        is_folder, exists = os.path.isdir(path), os.path.isfile(path)
        size = os.path.getsize(path) if exists else 0
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DatasetError(
            f"{path!r}: cannot be read ({reason}); check the path and its permissions"
        ) from error
    if is_folder:
        raise DatasetError(f"{path}: expected a weight file, found a folder")
    if not exists:
        raise DatasetError(
            f"{path}: no such file; check the path, or make it with megatron-dwm weights make"
        )
    raise DatasetError(
        f"{path}: expected at least {_HEADER_BYTES} bytes, found {size}: the file is truncated; "
        f"{_REMAKE}"
    )


def _read_header(path: str, raw: np.ndarray) -> _Header:
    header = raw[:_HEADER_BYTES].tobytes()
    magic, version, *fields = _FIELDS.unpack_from(header)
    if magic != _MAGIC:
        raise DatasetError(f"{path}: expected {_MAGIC!r}, found {magic!r}: not a weight file")
    if version != _VERSION:
        raise DatasetError(
            f"{path}: expected version {_VERSION} of the weight file, found {version}; {_REMAKE}"
        )
    (crc,) = _CRC.unpack_from(header, _FIELDS.size)
    if crc != zlib.crc32(header[: _FIELDS.size]) or not header.endswith(_PADDING):
        raise DatasetError(f"{path}: wrong checksum of the header: the file is damaged; {_REMAKE}")
    parsed = _Header(*fields)
    if parsed.flags & ~_HAS_DOMAINS:
        raise DatasetError(f"{path}: unknown flags {parsed.flags:#x}; {_REMAKE}")
    # Python integers do not overflow, so counts of any size are compared before they are used.
    arrays = 2 if parsed.flags & _HAS_DOMAINS else 1
    expected = _HEADER_BYTES + 4 * arrays * parsed.documents + parsed.name_bytes
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "longer than its header says"
        raise DatasetError(
            f"{path}: expected {expected} bytes for {parsed.documents} documents, found "
            f"{len(raw)}: the file is {state}; {_REMAKE}"
        )
    if parsed.name_bytes and not parsed.flags & _HAS_DOMAINS:
        raise DatasetError(f"{path}: domain names without domains; {_REMAKE}")
    return parsed


def _check_index(path: str, header: _Header, index: IndexSummary) -> None:
    for what in ("documents", "sequences", "tokens"):
        found, expected = getattr(header, what), getattr(index, what)
        if found != expected:
            raise DatasetError(
                f"{path}: made for {found} {what}, but {index.prefix}.idx has {expected}: the "
                f"weights are those of another dataset; {_REMAKE}"
            )


def _check_array(
    path: str, what: str, array: np.ndarray, index: IndexSummary | WeightFile, kinds: str
) -> None:
    if array.shape != (index.documents,) or array.dtype.kind not in kinds:
        owner = index.path if isinstance(index, WeightFile) else f"{index.prefix}.idx"
        raise DatasetError(
            f"{path}: {what}: expected one number for each of the {index.documents} documents of "
            f"{owner}, found {array.dtype} of shape {array.shape}"
        )


def _check_weights(path: str, weights: np.ndarray) -> None:
    largest = 0.0
    for chunk in document_chunks(len(weights)):
        values = _as_float32(weights[chunk])
        # A NaN is neither at least 0 nor finite, and min() and max() propagate it.
        if not (values.min() >= 0 and values.max() < np.inf):
            bad = int(np.argmin((values >= 0) & (values < np.inf)))
            raise DatasetError(
                f"{path}: document {chunk.start + bad} has the weight "
                f"{weights[chunk.start + bad]}; weights are finite in float32 and at least 0"
            )
        largest = max(largest, float(values.max()))
    if largest == 0:
        raise DatasetError(
            f"{path}: all {len(weights)} weights are zero in float32; at least one document "
            f"needs a weight above 0"
        )


def _check_domains(path: str, domains: np.ndarray, names: Sequence[str]) -> None:
    limit = len(names) or 1 << 31
    for chunk in document_chunks(len(domains)):
        values = domains[chunk]
        if values.min() < -1 or values.max() >= limit:
            bad = chunk.start + int(np.argmax((values < -1) | (values >= limit)))
            allowed = f"the {limit} domains with a name" if names else "domains below 2^31"
            raise DatasetError(
                f"{path}: document {bad} has the domain {domains[bad]}, which is neither one of "
                f"{allowed} nor -1 for none"
            )


def _read_names(path: str, encoded: bytes) -> tuple[str, ...]:
    try:
        names = parse_json(encoded)
    except JsonError as error:
        raise DatasetError(
            f"{path}: the domain names are not a JSON list ({error}): the file is damaged; "
            f"{_REMAKE}"
        ) from error
    if not isinstance(names, list):
        raise DatasetError(
            f"{path}: the domain names are a JSON {type(names).__name__}, not a list; {_REMAKE}"
        )
    _encode_names(path, names)
    return tuple(names)


def _encode_names(path: str, names: Sequence[str]) -> bytes:
    seen: set[str] = set()
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise DatasetError(f"{path}: the name of domain {number} is {name!r}, not a string")
        if name in seen:
            raise DatasetError(f"{path}: two domains have the name {name!r}; names are unique")
        seen.add(name)
    try:
        return json.dumps(list(names), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DatasetError(f"{path}: a domain name is not valid Unicode ({error})") from error


def _payload(
    weights: np.ndarray, domains: np.ndarray | None, encoded_names: bytes
) -> Iterator[bytes]:
    for chunk in document_chunks(len(weights)):
        yield _as_float32(weights[chunk]).tobytes()
    if domains is not None:
        for chunk in document_chunks(len(domains)):
            yield domains[chunk].astype("<i4").tobytes()
        yield encoded_names


def _as_float32(values: np.ndarray) -> np.ndarray:
    # Values that are too large become infinite, which the check of the weights reports.
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype="<f4")


def _sync_folder(path: str) -> None:
    # The rename is durable only once the folder is synced.
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
