"""Adds to samples of Megatron's `GPTDataset` their documents, and numbers of those."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from megatron.core.datasets.utils import Split

from megatron_dwm.core.batches import document_field
from megatron_dwm.data.index import documents_of

# Attribute of the data sets' config: by setting and data set path, a function from documents to
# numbers.
DOCUMENT_NUMBERS = "dwm_document_numbers"


def with_provenance(cls: type) -> type:
    """Returns a class like `cls`, a `GPTDataset`, whose samples also name their documents."""
    if issubclass(cls, Provenance):
        return cls
    return type(f"{cls.__name__}WithProvenance", (Provenance, cls), {"__doc__": cls.__doc__})


class Provenance:
    """Adds to each training sample of a `GPTDataset` its documents and their numbers.

    document_ids    [s] int64, the document of each token (-1: padding)
    dwm_<setting>   [] float64, the mean over tokens of the documents' numbers, for each setting
                    in `config.dwm_document_numbers`: by data set's path a function from documents
                    `[k]` int64 to their numbers `[k]`
    """

    # Attributes of GPTDataset and its base classes.
    config: Any
    dataset: Any
    dataset_path: str
    index_split: Split

    _provenance: tuple[numpy.ndarray, list[int]]

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)  # type: ignore[misc]
        if self.index_split != Split.train:
            return sample
        sequences, counts = self._provenance
        length = self.config.sequence_length
        documents = documents_of(self.dataset.document_indices, sequences)
        per_token = numpy.repeat(documents, counts)[:length]
        ids = numpy.full(length, -1, dtype=numpy.int64)
        ids[: len(per_token)] = per_token
        sample["document_ids"] = torch.from_numpy(ids)
        for setting, numbers in getattr(self.config, DOCUMENT_NUMBERS, {}).items():
            of_documents = numpy.asarray(numbers[self.dataset_path](documents), numpy.float64)
            of_tokens = numpy.repeat(of_documents, counts)[:length]
            mean = of_tokens.mean() if len(of_tokens) else 0.0
            sample[document_field(setting)] = torch.tensor(mean, dtype=torch.float64)
        return sample

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        found = super()._query_document_sample_shuffle_indices(idx)  # type: ignore[misc]
        # GPTDataset changes the list of counts that it is given.
        self._provenance = (found[1], list(found[2]))
        return found
