"""Combines weight files: of the same data set, or of concatenated data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dwm.data.index import DatasetError, IndexSummary, read_index
from megatron_dwm.data.weight_file import (
    WeightFile,
    document_chunks,
    read_weights,
    weights_path,
    write_weights,
)
from megatron_dwm.progress import bar

# Each turns the weights of the files, float64 [files, chunk], into one row.
COMBINE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "product": lambda rows: rows.prod(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "min": lambda rows: rows.min(axis=0),
}


def merge(output: str, paths: Sequence[str], how: str, normalise: bool) -> WeightFile:
    """Combines the weights of files of the same dataset document by document.

    Args:
        output: Path of the file to write.
        paths: Paths of weight files.
        how: Key of COMBINE.
        normalise: Whether to scale each file to mean 1 first.

    Raises:
        DatasetError: A file is damaged or belongs to another dataset than the first, the files give
            a document different domains, or the result cannot be written.
    """
    files = [read_weights(path) for path in paths]
    first = files[0]
    for file in files[1:]:
        for what in ("documents", "sequences", "tokens"):
            if getattr(file, what) != getattr(first, what):
                raise DatasetError(
                    f"{file.path}: made for {getattr(file, what)} {what}, but {first.path} for "
                    f"{getattr(first, what)}: merge joins weights of the same dataset; for "
                    f"datasets put one after another use concat"
                )
    scales = np.array([[_scale(file) if normalise else 1.0] for file in files])
    weights = np.empty(first.documents, np.float32)
    with bar(first.documents, " documents", "merge") as shown:
        for chunk in document_chunks(first.documents):
            rows = np.stack([file.weights[chunk].astype(np.float64) for file in files])
            # Values too large for float32 become infinite, which the writer reports.
            with np.errstate(over="ignore", under="ignore"):
                weights[chunk] = COMBINE[how](rows * scales)
            shown.update(rows.shape[1])
    domains, names = _merge_domains(files)
    return write_weights(output, weights, first, domains, names)


def concat(output: str, prefix: str, parts: Sequence[str], normalise: bool) -> WeightFile:
    """Concatenates the weights of datasets, for a dataset that was concatenated in the same way.

    Args:
        output: Path of the file to write.
        prefix: Prefix of the dataset that has all the documents.
        parts: Prefixes of its parts in order, each with a weight file; an `.idx` beside it is
            compared with its part of the whole.
        normalise: Whether to scale each part to mean 1 first.

    Raises:
        DatasetError: A file is missing or damaged, the parts do not match the whole, or the result
            cannot be written.
    """
    index = read_index(prefix)
    files = []
    sequences = 0
    for part in parts:
        part_index = read_index(part) if os.path.exists(f"{part}.idx") else None
        files.append(read_weights(weights_path(part), part_index))
        if part_index is not None:
            _check_part(part_index, index, sequences)
        sequences += files[-1].sequences
    for what in ("documents", "sequences", "tokens"):
        found, expected = sum(getattr(file, what) for file in files), getattr(index, what)
        if found != expected:
            raise DatasetError(
                f"{prefix}.idx: {expected} {what}, but the parts have {found} together; name all "
                f"parts in the order in which they were put together"
            )
    table = _DomainTable.of(files)
    weights = np.empty(index.documents, np.float32)
    domains = np.empty(index.documents, np.int32)
    start = 0
    with bar(index.documents, " documents", "concat") as shown:
        for number, file in enumerate(files):
            scale = _scale(file) if normalise else 1.0
            for chunk in document_chunks(file.documents):
                target = slice(start + chunk.start, start + chunk.stop)
                with np.errstate(over="ignore", under="ignore"):
                    weights[target] = file.weights[chunk].astype(np.float64) * scale
                domains[target] = table.domains(number, chunk)
                shown.update(chunk.stop - chunk.start)
            start += file.documents
    if all(file.domains is None for file in files):
        return write_weights(output, weights, index)
    return write_weights(output, weights, index, domains, table.names)


def _scale(file: WeightFile) -> float:
    chunks = document_chunks(file.documents)
    return file.documents / sum(float(file.weights[c].sum(dtype=np.float64)) for c in chunks)


def _check_part(part: IndexSummary, whole: IndexSummary, first: int) -> None:
    share = whole.sequence_lengths[first : first + part.sequences]
    if not np.array_equal(share, part.sequence_lengths):
        raise DatasetError(
            f"{part.prefix}.idx: its sequences are not the sequences {first} to "
            f"{first + part.sequences - 1} of {whole.prefix}.idx; name the parts in the order in "
            f"which they were put together"
        )


@dataclass(frozen=True)
class _DomainTable:
    """The domains of several files under common numbers.

    Attributes:
        files: The files.
        names: Common names; empty if all domains are bare numbers, which are then kept.
        numbers: For each file, the bare numbers it uses in ascending order, or None when it has
            names.
        targets: For each file, the common number of each of its names or bare numbers.
    """

    files: Sequence[WeightFile]
    names: tuple[str, ...]
    numbers: list[np.ndarray | None]
    targets: list[np.ndarray]

    @classmethod
    def of(cls, files: Sequence[WeightFile]) -> _DomainTable:
        """Merges the domains of files by name; a bare number's name is the number as text."""
        if not any(file.domain_names for file in files):
            return cls(files, (), [], [])
        union: dict[str, int] = {}
        numbers: list[np.ndarray | None] = []
        targets = []
        for file in files:
            names: Sequence[str] = file.domain_names
            found = None
            if not names and file.domains is not None:
                found = np.unique(file.domains)
                found = found[found >= 0]
                names = [str(number) for number in found.tolist()]
            numbers.append(found)
            common = [union.setdefault(name, len(union)) for name in names]
            # The last entry is the one that -1 indexes.
            targets.append(np.array([*common, -1], np.int32))
        return cls(files, tuple(union), numbers, targets)

    def domains(self, number: int, chunk: slice) -> np.ndarray:
        """Returns the common domain numbers of documents of a file."""
        file = self.files[number]
        if file.domains is None:
            return np.full(len(file.weights[chunk]), -1, np.int32)
        values = file.domains[chunk]
        if not self.names:
            return values
        found = self.numbers[number]
        if found is not None:
            values = np.where(values < 0, -1, np.searchsorted(found, values))
        return self.targets[number][values]


def _merge_domains(files: Sequence[WeightFile]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Takes the domain of each document from the files that give it one."""
    files = [file for file in files if file.domains is not None]
    if not files:
        return None, ()
    table = _DomainTable.of(files)
    domains = np.empty(files[0].documents, np.int32)
    for chunk in document_chunks(len(domains)):
        joined = table.domains(0, chunk).copy()
        for number, file in enumerate(files[1:], 1):
            others = table.domains(number, chunk)
            differ = (joined != others) & (joined >= 0) & (others >= 0)
            if differ.any():
                raise DatasetError(
                    f"{file.path}: document {chunk.start + int(np.argmax(differ))} has another "
                    f"domain than in the files before it; merge files that agree, or of which "
                    f"only one has domains"
                )
            joined = np.where(joined < 0, others, joined)
        domains[chunk] = joined
    return domains, table.names
