"""Adds to the batches the numbers of documents that policies weigh by.

A setting such as `--dwm-static-weights NAME` names a weight file beside each training data set, or
the documents' length. Each training sample then carries the mean over its tokens, see
`core.provenance.Provenance`; samples and their order stay as they are. Files are memory-mapped and
numbers looked up per sample: only rank 0 reads all documents, and only if their ranks are used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_dwm.config import DWMConfig, flag
from megatron_dwm.config.choices import RANKED
from megatron_dwm.core.agreement import on_each_rank, on_first_rank
from megatron_dwm.core.provenance import DOCUMENT_NUMBERS, Provenance, with_provenance
from megatron_dwm.data.document_weights import Ranks, ranks_of
from megatron_dwm.data.index import IndexSummary, read_index
from megatron_dwm.data.weight_file import document_chunks, read_weights
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts.rebind import rebound

LENGTH = "length"
# From documents `[k]` int64 to their numbers `[k]`.
Numbers = Callable[[numpy.ndarray], numpy.ndarray]
_ROWS = 65_536  # rows of the table from which documents' ranks are computed


def file_of(prefix: str, name: str) -> str:
    """Returns the path of the weight file that a setting names, beside a data set."""
    return f"{prefix}.weights" if name == "weights" else f"{prefix}.{name}.weights"


def check_documents(config: DWMConfig, prefixes: list[str], indices: dict[str, Any]) -> None:
    """Opens every file that the policy's settings name.

    Args:
        config: settings.
        prefixes: prefixes of the training data sets.
        indices: what `read_index` returned for each.

    Raises:
        DWMError: a data set has no such file, or it is damaged or belongs to another data set.
    """
    for setting in config.needs.documents:
        name = getattr(config, setting)
        for prefix in prefixes if name != LENGTH else ():
            path = file_of(prefix, name)
            if not os.path.exists(path):
                raise DWMError(
                    f"{flag(setting)} {name}: {path}: no such file; make it with megatron-dwm "
                    f"weights make {prefix} --output {path} ..., or name another"
                )
            try:
                read_weights(path, indices[prefix])
            except DWMError as error:
                raise DWMError(f"{flag(setting)} {name}: {error}") from None


class DocumentNumbers:
    """The document numbers that one run's batches carry; constructed on all ranks together.

    Args:
        config: settings.
        prefixes: prefixes of the training data sets.
    """

    def __init__(self, config: DWMConfig, prefixes: list[str]) -> None:
        self.settings = {name: getattr(config, name) for name in config.needs.documents}
        found = on_first_rank(lambda: {p: _digests(self.settings, p) for p in prefixes})
        opened = on_each_rank(lambda: {p: _opened(self.settings, p, found[p]) for p in prefixes})
        self.numbers: dict[str, dict[str, Numbers]] = {
            name: {p: numbers[name] for p, numbers in opened.items()} for name in self.settings
        }
        self.first_flag = flag(next(iter(self.settings), "document_weights"))
        for name in RANKED:
            if name in self.numbers:
                raw = self.numbers[name]
                ranks = on_first_rank(partial(_ranks, raw))
                self.numbers[name] = {p: partial(_ranked, ranks, raw[p]) for p in raw}

    @contextlib.contextmanager
    def in_batches(self) -> Iterator[None]:
        """A context in which the trainer's data sets are built so that they add the numbers."""
        with rebound(
            BlendedMegatronDatasetBuilder,
            "__init__",
            ("self", "cls", "sizes", "is_built_on_rank", "config"),
            self._make_builder,
        ):
            yield

    def _make_builder(
        self, stock: Any, builder: Any, cls: Any, sizes: Any, is_built_on_rank: Any, config: Any
    ) -> None:
        if isinstance(cls, type) and issubclass(cls, GPTDataset):
            _check_class(cls, self.first_flag)
            setattr(config, DOCUMENT_NUMBERS, self.numbers)
            cls = with_provenance(cls)
        stock(builder, cls, sizes, is_built_on_rank, config)


def _ranks(numbers: dict[str, Numbers]) -> Ranks:
    """Returns the ranks of the documents' numbers among those of all data sets, by prefix."""
    values, tokens = [], []
    for prefix, of_prefix in numbers.items():
        index = read_index(prefix, verify=False)
        for chunk in document_chunks(index.documents):
            values.append(of_prefix(numpy.arange(chunk.start, chunk.stop)))
            tokens.append(index.document_tokens(chunk.start, chunk.stop))
    return ranks_of(values, tokens, _ROWS)


def _ranked(ranks: Ranks, numbers: Numbers, documents: numpy.ndarray) -> numpy.ndarray:
    return ranks(numbers(documents))


def _digests(settings: dict[str, str], prefix: str) -> dict[str, bytes]:
    """Returns the header of each file, by which another rank knows that it has the same file."""
    index = read_index(prefix, verify=False)
    names = {name: value for name, value in settings.items() if value != LENGTH}
    return {
        n: read_weights(file_of(prefix, value), index, verify=False).header
        for n, value in names.items()
    }


def _opened(settings: dict[str, str], prefix: str, headers: dict[str, bytes]) -> dict[str, Numbers]:
    """Returns the functions that give documents their numbers, by setting."""
    found: dict[str, Numbers] = {}
    for setting, name in settings.items():
        if name == LENGTH:
            found[setting] = partial(_lengths, read_index(prefix, verify=False))
            continue
        file = read_weights(file_of(prefix, name), verify=False)
        if file.header != headers[setting]:
            raise DWMError(
                f"{flag(setting)} {name}: {file.path} is not what rank 0 has read; give all ranks "
                "the same files"
            )
        found[setting] = file.weights.__getitem__
    return found


def _lengths(index: IndexSummary, documents: numpy.ndarray) -> numpy.ndarray:
    """Returns `[k]` int64 lengths of documents `[k]`, over all their sequences."""
    bounds, lengths = index.document_indices, index.sequence_lengths
    first, last = bounds[documents], bounds[documents + 1]
    if (last == first + 1).all():
        return lengths[first].astype(numpy.int64)
    return numpy.array([lengths[a:b].sum() for a, b in zip(first, last, strict=True)])


def _check_class(cls: type, asking: str) -> None:
    """Refuses a data set class that finds its samples in its own way.

    Args:
        cls: the class.
        asking: flag of the setting that needs the documents.
    """
    name = "_query_document_sample_shuffle_indices"
    known = [GPTDataset, Provenance, *Provenance.__subclasses__()]
    if getattr(cls, name) not in [getattr(one, name) for one in known]:
        raise DWMError(
            f"{asking} needs the documents of a sample, but {cls.__name__}.{name} finds samples in "
            "its own way (as --fim-data does); leave one of them out"
        )
