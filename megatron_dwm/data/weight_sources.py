"""Reads weights and domains of documents from .npy, CSV and JSON Lines files, in batches."""

from __future__ import annotations

import csv
import io
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_dwm.data.index import IndexSummary
from megatron_dwm.errors import InputError
from megatron_dwm.files.json_files import JsonError, json_type, parse_json, repeated_keys
from megatron_dwm.files.text_files import COMPRESSED_SUFFIXES, TextFile, read_blocks
from megatron_dwm.progress import bar

DOCUMENT = "document"
_BATCH_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 20
_CELL_ERRORS = (ValueError, TypeError, OverflowError)
# What NumPy raises for a file that is not an array.
_NPY_ERRORS = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)


@dataclass
class Columns:
    """What to read from each row.

    Attributes:
        weight: Column or key of the number, or None to read no numbers.
        domain: Column or key of the domain, or None.
    """

    weight: str | None
    domain: str | None


@dataclass
class Values:
    """What a file says about the documents of a dataset.

    Attributes:
        numbers: `[D]` float64, or None if none were requested.
        domains: `[D]` int32, -1 for none, or None if none were requested.
        names: Names of the domains, in order of first appearance.
    """

    numbers: np.ndarray | None
    domains: np.ndarray | None
    names: list[str]


@dataclass
class _Batch:
    lines: Sequence[int]
    documents: np.ndarray | None
    numbers: np.ndarray | None
    domains: Sequence[str | None]


def read_values(path: Path, index: IndexSummary, columns: Columns, default: float | None) -> Values:
    """Reads one number or domain, or both, for every document of a dataset.

    Args:
        path: .npy, .csv, .jsonl, .json or .ndjson; the text formats may be compressed.
        index: Index of the dataset.
        columns: What to read.
        default: Number for documents that the file leaves out, or None if it must not leave out
            any.

    Raises:
        InputError: The file cannot be read or is malformed, or does not give every document
            exactly one row.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if path.is_dir() or not path.exists():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; check --from")
    if kind == ".npy":
        return _read_npy(path, index, columns)
    if kind == ".csv":
        return _collect(path, index, columns, default, _csv_batches(path, columns))
    if kind in (".jsonl", ".json", ".ndjson"):
        return _collect(path, index, columns, default, _jsonl_batches(path, columns))
    raise InputError(
        f"{path}: the name does not tell the format; use .npy, .csv or .jsonl (.csv and .jsonl "
        f"also with {' '.join(COMPRESSED_SUFFIXES)})"
    )


def _read_npy(path: Path, index: IndexSummary, columns: Columns) -> Values:
    if columns.domain is not None or columns.weight is None:
        raise InputError(f"{path}: an .npy file has no domains; give them in .csv or .jsonl")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _NPY_ERRORS as error:
        raise InputError(f"{path}: not an .npy file that can be read ({error})") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an archive of arrays; save the one array with numpy.save")
    if array.shape != (index.documents,) or array.dtype.kind not in "iuf":
        raise InputError(
            f"{path}: expected one number for each of the {index.documents} documents of "
            f"{index.prefix}.idx, found {array.dtype} of shape {array.shape}"
        )
    return Values(array, None, [])


def _collect(
    path: Path,
    index: IndexSummary,
    columns: Columns,
    default: float | None,
    batches: Iterator[_Batch],
) -> Values:
    total = index.documents
    numbers = None if columns.weight is None else np.full(total, default or 0.0)
    domains = None if columns.domain is None else np.full(total, -1, np.int32)
    names: dict[str, int] = {}
    seen = np.zeros(total, bool)
    rows = 0
    for batch in batches:
        documents = batch.documents
        if documents is None:
            documents = np.arange(rows, rows + len(batch.lines))
        _check_documents(path, index, batch, documents, seen)
        seen[documents] = True
        rows += len(documents)
        if numbers is not None:
            numbers[documents] = batch.numbers
        if domains is not None:
            domains[documents] = [
                -1 if name is None else names.setdefault(name, len(names)) for name in batch.domains
            ]
    if default is None and rows < total:
        first = int(np.argmin(seen))
        raise InputError(
            f"{path}: no row for document {first} ({total - rows} of the {total} documents of "
            f"{index.prefix}.idx have none); add them or give --default"
        )
    return Values(numbers, domains, list(names))


def _check_documents(
    path: Path, index: IndexSummary, batch: _Batch, documents: np.ndarray, seen: np.ndarray
) -> None:
    outside = (documents < 0) | (documents >= index.documents)
    if outside.any():
        bad = int(np.argmax(outside))
        raise InputError(
            f"{path}, line {batch.lines[bad]}: a row for document {documents[bad]}, but "
            f"{index.prefix}.idx has {index.documents} documents, numbered from 0"
        )
    if not seen[documents].any() and len(np.unique(documents)) == len(documents):
        return
    before: set[int] = set()
    for line, document in zip(batch.lines, documents.tolist(), strict=True):
        if seen[document] or document in before:
            raise InputError(
                f"{path}, line {line}: a second row for document {document}; every document "
                f"needs exactly one"
            )
        before.add(document)


def _csv_batches(path: Path, columns: Columns) -> Iterator[_Batch]:
    with TextFile(path) as file:
        reader = csv.reader(
            (line for _, text in _texts(file) for line in io.StringIO(text, newline="")),
            strict=True,
        )
        try:
            header = next(reader, [])
            places = {
                name: _place(path, header, name)
                for name in (columns.weight, columns.domain)
                if name is not None
            }
            if DOCUMENT in header:
                places[DOCUMENT] = _place(path, header, DOCUMENT)
            filled = ((reader.line_num, row) for row in reader if row)
            while block := list(islice(filled, _BATCH_ROWS)):
                for line, row in block:
                    if len(row) != len(header):
                        raise InputError(
                            f"{path}, line {line}: {len(row)} values, but the header has "
                            f"{len(header)} columns"
                        )
                cells = {name: [row[place] for _, row in block] for name, place in places.items()}
                lines = [line for line, _ in block]
                yield _batch(path, columns, lines, cells, (float, int, str))
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _place(path: Path, header: list[str], name: str) -> int:
    if header.count(name) != 1:
        found = "twice" if name in header else "not"
        raise InputError(
            f"{path}: the column {name!r} is {found} in the header: {', '.join(header[:8]) or '-'};"
            f" name the columns with --column and --domain-column"
        )
    return header.index(name)


def _jsonl_batches(path: Path, columns: Columns) -> Iterator[_Batch]:
    keys = [name for name in (columns.weight, columns.domain) if name is not None]
    names = [*keys, DOCUMENT]
    with_documents: bool | None = None
    with TextFile(path) as file:
        for first_line, text in _texts(file):
            lines, records = [], []
            for line, content in enumerate(text.split("\n"), first_line):
                if content and not content.isspace():
                    lines.append(line)
                    records.append(_record(path, line, content, names))
            if not records:
                continue
            if with_documents is None:
                with_documents = DOCUMENT in records[0]
                if with_documents:
                    keys.append(DOCUMENT)
            _check_keys(path, lines, records, keys, with_documents)
            cells = {key: [record[key] for record in records] for key in keys}
            yield _batch(path, columns, lines, cells, (_json_number, _json_integer, _json_domain))


def _check_keys(
    path: Path, lines: list[int], records: list[dict], keys: list[str], with_documents: bool
) -> None:
    wanted = set(keys)
    for line, record in zip(lines, records, strict=True):
        if not record.keys() >= wanted:
            missing = next(key for key in keys if key not in record)
            raise InputError(
                f"{path}, line {line}: no key {missing!r} (keys found: "
                f"{', '.join(list(record)[:8]) or '-'}); name the keys with --column and "
                f"--domain-column"
            )
        if not with_documents and DOCUMENT in record:
            raise InputError(
                f"{path}, line {line}: a key {DOCUMENT!r}, which the first line lacks; give it in "
                "all lines or in none"
            )


def _record(path: Path, line: int, content: str, names: Sequence[str]) -> dict:
    try:
        record = parse_json(content)
    except JsonError as error:
        raise InputError(f"{path}, line {line}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(
            f"{path}, line {line}: a JSON {json_type(record)}, expected an object such as "
            f'{{"weight": 1.5}}'
        )
    # Checked only if the text can contain any, because it costs another pass.
    if "\\" in content or any(content.count(f'"{name}"') > 1 for name in names):
        twice = sorted(repeated_keys(content) & set(names))
        if twice:
            raise InputError(
                f"{path}, line {line}: the key {twice[0]!r} occurs twice; give it once"
            )
    return record


def _texts(file: TextFile) -> Iterator[tuple[int, str]]:
    """Yields blocks of whole lines, each with the number of its first line."""
    with bar(file.size, "B", f"reading {file.path.name}") as shown:
        for first_line, block in read_blocks(file, _BLOCK_BYTES):
            shown.update(file.tell() - shown.n)
            try:
                # Spreadsheets put a byte order mark before the first line.
                yield first_line, block.decode("utf-8-sig" if first_line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                line = first_line + block.count(b"\n", 0, error.start)
                raise InputError(
                    f"{file.path}, line {line}: not UTF-8; convert the file"
                ) from error


def _batch(
    path: Path,
    columns: Columns,
    lines: list[int],
    cells: dict[str, list],
    converters: tuple[Callable, Callable, Callable],
) -> _Batch:
    to_number, to_integer, to_domain = converters

    def convert(name: str, function: Callable, dtype: type, what: str) -> np.ndarray:
        try:
            return np.array([function(cell) for cell in cells[name]], dtype)
        except _CELL_ERRORS:
            for line, cell in zip(lines, cells[name], strict=True):
                _convert_one(path, line, name, cell, lambda c: np.array(function(c), dtype), what)
            raise

    documents = numbers = None
    domains: Sequence[str | None] = ()
    if DOCUMENT in cells:
        documents = convert(DOCUMENT, to_integer, np.int64, "a document number")
    if columns.weight is not None:
        numbers = convert(columns.weight, to_number, np.float64, "a number")
    if columns.domain is not None:
        # An empty name means none.
        names = convert(columns.domain, to_domain, object, "a string or integer")
        domains = [name or None for name in names.tolist()]
    return _Batch(lines, documents, numbers, domains)


def _convert_one(
    path: Path, line: int, name: str, cell: object, function: Callable, what: str
) -> None:
    try:
        function(cell)
    except _CELL_ERRORS as error:
        raise InputError(f"{path}, line {line}: {name!r} is {cell!r}, expected {what}") from error


def _json_number(value: object) -> float:
    # JSON's true equals 1 in Python.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return float(value)


def _json_integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _json_domain(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(_json_integer(value))
