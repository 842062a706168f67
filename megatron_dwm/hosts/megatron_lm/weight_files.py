"""Finds, checks, keeps and opens the weight files of a run that draws documents by weight.

Only rank 0 reads files in full; it tells the other ranks what it found, and they open the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

import numpy

from megatron_dwm.core.agreement import on_each_rank, on_first_rank
from megatron_dwm.core.weighted_dataset import DocumentWeights, lengths_digest
from megatron_dwm.data.document_weights import distinct_domains
from megatron_dwm.data.index import IndexSummary, read_index
from megatron_dwm.data.weight_file import WeightFile, document_chunks, read_weights, weights_path
from megatron_dwm.errors import DWMError

FOLDER = "dwm_weights"


@dataclass(frozen=True)
class _Described:
    """What rank 0 tells the others about a weight file that it has read and checked.

    Attributes:
        path: path of the file.
        header: header of the file, by which another rank recognises it without reading all of it.
        distinct: see `DocumentWeights`.
    """

    path: str
    header: bytes
    distinct: numpy.ndarray | None


class WeightFiles:
    """The weight files of the training data and of the run's past; made on all ranks together.

    Args:
        prefixes: prefixes of the training data sets.
        save: folder that the run saves to, or None.
        load: folder that it was loaded from, or None.

    Attributes:
        lengths: digest of each data set's document lengths, by its prefix.
        domain_names: names of the domain numbers in `DocumentWeights`; grows when a new file names
            new domains.
    """

    def __init__(self, prefixes: list[str], save: str | None, load: str | None) -> None:
        self.prefixes, self.save, self.load = prefixes, save, load
        self.lengths: dict[str, str] = {}
        self.domain_names: list[str] = []
        self._domain_numbers: dict[str, int] = {}
        self._opened: dict[tuple[str, str], DocumentWeights] = {}
        self._indices: dict[str, IndexSummary] = {}
        self._verified: dict[tuple[str, str], WeightFile] = {}  # on rank 0
        self._open_indices()

    def _open_indices(self) -> None:
        """Opens the indexes on every rank; rank 0, which has checked them, hashes the lengths."""

        def describe(prefix: str) -> tuple[str, tuple]:
            index = read_index(prefix, verify=False)
            return lengths_digest(index.sequence_lengths), _outline(index)

        def open_like(prefix: str, outline: tuple) -> IndexSummary:
            index = read_index(prefix, verify=False)
            if _outline(index) != outline:
                raise DWMError(
                    f"{prefix}.idx: documents, sequences, token type and bytes of the .bin are "
                    f"{_outline(index)} here and {outline} on rank 0; give all ranks the same files"
                )
            return index

        found = on_first_rank(lambda: [describe(prefix) for prefix in self.prefixes])
        self.lengths.update(zip(self.prefixes, (d for d, _ in found), strict=True))
        outlines = dict(zip(self.prefixes, (outline for _, outline in found), strict=True))
        self._indices = on_each_rank(
            lambda: {prefix: open_like(prefix, outline) for prefix, outline in outlines.items()}
        )

    def current(self) -> dict[str, str]:
        """Returns the digest of each data set's weight file; to be called on rank 0.

        Rank 0 reads them and keeps a copy in the run's folder, which the others then open, so that
        a file that is replaced in the meantime cannot make ranks differ.
        """
        files = [read_weights(weights_path(p), self._indices[p]) for p in self.prefixes]
        for prefix, file in zip(self.prefixes, files, strict=True):
            self._verified[prefix, file.digest] = self._keep(file)
        return {p: file.digest for p, file in zip(self.prefixes, files, strict=True)}

    def open(self, files: Iterable[tuple[str, str]]) -> None:
        """Opens weight files on every rank, and numbers their domains, identically on each.

        Args:
            files: path of the data set and digest of the weight file of each.

        Raises:
            DWMError: on every rank, if one does not find a file.
        """
        new = [key for key in dict.fromkeys(files) if key not in self._opened]
        found = on_first_rank(lambda: [self._describe(*key) for key in new])
        opened = on_each_rank(
            lambda: [self._reopen(*key, d) for key, d in zip(new, found, strict=True)]
        )
        for (prefix, digest), described, file in zip(new, found, opened, strict=True):
            names = list(file.domain_names)
            if described.distinct is not None:
                names = [str(number) for number in described.distinct.tolist()]
            # A document without a domain belongs to its data set.
            numbers = [self._number_of(name) for name in [*names, os.path.basename(prefix)]]
            self._opened[prefix, digest] = DocumentWeights(
                file.weights, file.domains, numpy.array(numbers), described.distinct
            )

    def _describe(self, prefix: str, digest: str) -> _Described:
        """Finds a weight file on rank 0 and keeps a copy of it."""
        file = self._verified.get((prefix, digest))
        if file is None:
            file = self._verified[prefix, digest] = self._keep(self._find(prefix, digest))
        distinct = None
        if file.domains is not None and not file.domain_names:
            distinct = distinct_domains(_domains_of_sequences(file.domains, self._indices[prefix]))
        return _Described(file.path, file.header, distinct)

    def _find(self, prefix: str, digest: str) -> WeightFile:
        places = self._places(prefix, digest)
        for path in places:
            if os.path.exists(path):
                file = read_weights(path, self._indices[prefix])
                if file.digest == digest:
                    return file
        raise DWMError(
            f"{prefix} was drawn by a weight file {digest[:12]}... that is not one of "
            f"{', '.join(places)}; put it back, or start over with --finetune"
        )

    def _reopen(self, prefix: str, digest: str, described: _Described) -> WeightFile:
        """Opens the file that rank 0 found, or the same file in another place."""
        places = dict.fromkeys([described.path, *self._places(prefix, digest)])
        for path in filter(os.path.exists, places):
            file = read_weights(path, verify=False)
            if file.header == described.header:
                return file
        raise DWMError(
            f"{described.path} is not what rank 0 has read: it was changed in the meantime, or "
            "this rank does not see the same files; try again"
        )

    def _places(self, prefix: str, digest: str) -> list[str]:
        folders = [os.path.join(f, FOLDER) for f in (self.save, self.load) if f]
        return [os.path.join(f, f"{digest}.weights") for f in folders] + [weights_path(prefix)]

    def _keep(self, file: WeightFile) -> WeightFile:
        """Copies a weight file to the run's folder, if it has one; returns the file to use."""
        if not self.save:
            return file
        path = os.path.join(self.save, FOLDER, f"{file.digest}.weights")
        if file.path == path:
            return file
        try:
            if os.path.exists(path):
                copy = read_weights(path)
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                shutil.copyfile(file.path, f"{path}.tmp")
                copy = read_weights(f"{path}.tmp")
            if copy.digest != file.digest:
                raise DWMError(
                    f"{copy.path} is not a copy of {file.path}; delete it, and try again"
                )
            os.replace(copy.path, path)
        except OSError as error:
            raise DWMError(
                f"--save {self.save}: {file.path} cannot be copied there, where a resumed run "
                f"would read it ({error}); make room, or give another --save"
            ) from error
        return read_weights(path, verify=False)

    def weights(self, prefix: str, digest: str) -> DocumentWeights:
        """Returns the weights of a data set, by the digest of a file that `open` has opened."""
        return self._opened[prefix, digest]

    def _number_of(self, domain: str) -> int:
        if domain not in self._domain_numbers:
            self._domain_numbers[domain] = len(self.domain_names)
            self.domain_names.append(domain)
        return self._domain_numbers[domain]


def _outline(index: IndexSummary) -> tuple[int, int, str, int]:
    return index.documents, index.sequences, index.dtype.name, index.bin_bytes


def _domains_of_sequences(domains: numpy.ndarray, index: IndexSummary) -> Iterable[numpy.ndarray]:
    """Yields the domains of documents that have sequences, part by part."""
    for chunk in document_chunks(index.documents):
        found = domains[chunk]
        if index.sequences != index.documents:
            bounds = index.document_indices[chunk.start : chunk.stop + 1]
            found = found[numpy.diff(bounds) > 0]
        yield found
