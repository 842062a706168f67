"""Megatron's `GPTDataset` with documents drawn by weight.

It is a drop-in replacement: the same batch fields, blends, splits and index cache. The training
split draws documents by the weights beside its `.idx` (`epoch_plan`); the other splits are
Megatron's own. Two fields are added:

    document_ids    [s] int64, the document of each token (-1: padding)
    domain_id       [] int64, the domain with most of the sample's tokens

Set `config.dwm_sampling` (a `SamplingSettings`) on the config that the builder is given.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split

from megatron_dwm.core.provenance import Provenance
from megatron_dwm.data.document_weights import weights_by_sequence
from megatron_dwm.data.epoch_plan import PLAN_VERSION, Corpus, Segment, first_segment, next_segment
from megatron_dwm.data.segment_cache import load_segment, save_segment


@dataclass(frozen=True)
class DocumentWeights:
    """The weights of a data set, by document; arrays of the corpus' size are memory-mapped.

    Attributes:
        weights: `[D]` float32.
        domains: `[D]` int32 domain of each document, -1: none; None without domains.
        domain_numbers: `[K + 1]` int64, the log's number of each of the K domains, and last that of
            documents without a domain.
        distinct: `[K]` the domains that occur, ascending; None: those from 0 to K - 1.
    """

    weights: numpy.ndarray
    domains: numpy.ndarray | None
    domain_numbers: numpy.ndarray
    distinct: numpy.ndarray | None = None

    def numbers_of(self, documents: numpy.ndarray) -> numpy.ndarray:
        """Returns `[n]` int64, the log's numbers of the domains of `[n]` documents."""
        if self.domains is None:
            return numpy.repeat(self.domain_numbers[-1:], len(documents))
        domains = self.domains[documents]
        if self.distinct is not None:
            domains = numpy.where(domains < 0, -1, numpy.searchsorted(self.distinct, domains))
        return self.domain_numbers[domains]


@dataclass(frozen=True)
class Stage:
    """The weights by which a data set is planned, and the sample from which they apply.

    Attributes:
        start: number of the data set's first sample in the stage.
        digest: digest of the weight file.
    """

    start: int
    digest: str


@dataclass
class SamplingSettings:
    """Sampling settings that all data sets of a run share.

    Attributes:
        weights: returns the weights of a data set, given its path and a digest.
        lengths: digest of the sequence lengths of each data set by its path, see `lengths_digest`.
        stages: the stages of each data set by its path, the last one being current. At least one.
        method: see `Corpus`.
        max_repeats: see `Corpus`.
    """

    weights: Callable[[str, str], DocumentWeights]
    lengths: dict[str, str]
    stages: dict[str, list[Stage]]
    method: Literal["systematic", "independent"] = "systematic"
    max_repeats: int | None = None


def lengths_digest(sequence_lengths: numpy.ndarray) -> str:
    """Returns a hash of the documents' lengths, which tells two data sets apart."""
    lengths = numpy.ascontiguousarray(sequence_lengths, dtype="<i4")
    return hashlib.sha256(lengths).hexdigest()


def weighted(cls: type) -> type:
    """Returns a class like `cls`, a `GPTDataset`, that draws its training documents by weight."""
    if issubclass(cls, WeightedSampling):
        return cls
    return type("WeightedGPTDataset", (WeightedSampling, cls), {"__doc__": __doc__})


class WeightedSampling(Provenance):
    """The part of `WeightedGPTDataset` that differs from `GPTDataset`."""

    # Attributes of GPTDataset and its base classes.
    indices: numpy.ndarray
    num_samples: int | None
    unique_description: str
    _pad_token_id: int

    _is_padding = False

    @property
    def draws_by_weight(self) -> bool:
        """Whether this split draws by weight."""
        return self.index_split == Split.train

    def _build_document_sample_shuffle_indices(self) -> Any:
        if not self.draws_by_weight:
            return super()._build_document_sample_shuffle_indices()  # type: ignore[misc]
        settings: SamplingSettings = self.config.dwm_sampling
        self.use_stages(settings.stages[self.dataset_path])
        return self.segment.documents, self.segment.sample_index, None

    def use_stages(self, stages: list[Stage]) -> None:
        """Plans the samples from the start of the last stage; earlier ones cannot be read.

        Args:
            stages: the history of the data set; each stage starts where weights changed.
        """
        self.stages = list(stages)
        self.segment = self._segment(self.stages, self.num_samples)
        self.in_force = self._weights(self.stages[-1])
        # GPTDataset's names for them.
        self.document_index = self.segment.documents
        self.sample_index = self.segment.sample_index

    def _segment(self, stages: list[Stage], num_samples: int | None) -> Segment:
        """Returns the plan of the last stage, from the cache if it is there."""
        settings: SamplingSettings = self.config.dwm_sampling
        lengths = self.dataset.sequence_lengths
        corpus = Corpus(
            name=self.dataset_path,
            sequence_lengths=lengths,
            first_document=int(self.indices[0]) if len(self.indices) else 0,
            num_documents=len(self.indices),
            sequence_length=self.config.sequence_length,
            add_extra_token=bool(self.config.add_extra_token_to_sequence),
            seed=self.config.random_seed,
            method=settings.method,
            max_repeats=settings.max_repeats,
        )
        path = self._cache_path(stages, num_samples)
        found = load_segment(path, corpus)
        if found is not None:
            return found
        *earlier, stage = stages
        first = corpus.first_document
        weights = weights_by_sequence(
            self._weights(stage).weights,
            self.dataset.document_indices,
            first,
            first + corpus.num_documents,
        )
        if earlier:
            # Only as far as it was followed; what it planned beyond that does not matter.
            before = self._segment(earlier, stage.start + 1)
            segment = next_segment(before, weights, num_samples, stage.start)
        else:
            segment = first_segment(corpus, weights, num_samples, stage.start)
        save_segment(path, segment)
        # Memory-mapped, as for every process that finds it in the cache.
        return load_segment(path, corpus) or segment

    def _weights(self, stage: Stage) -> DocumentWeights:
        settings: SamplingSettings = self.config.dwm_sampling
        return settings.weights(self.dataset_path, stage.digest)

    def _cache_path(self, stages: list[Stage], num_samples: int | None) -> str:
        """Returns the path of a cached plan without its ending."""
        settings: SamplingSettings = self.config.dwm_sampling
        folder = self.config.path_to_cache or os.path.join(
            self.dataset.path_prefix, "cache", "WeightedGPTDataset_indices"
        )
        key = [
            PLAN_VERSION,
            self.unique_description,
            settings.lengths[self.dataset_path],
            num_samples,
            [(s.start, s.digest) for s in stages],
            settings.method,
            settings.max_repeats,
            bool(self.config.add_extra_token_to_sequence),
        ]
        name = hashlib.md5(json.dumps(key).encode(), usedforsecurity=False).hexdigest()
        return os.path.join(folder, f"{name}-WeightedGPTDataset-{self.index_split.name}")

    def __len__(self) -> int:
        if not self.draws_by_weight:
            return super().__len__()  # type: ignore[misc]
        return self.segment.end

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        if not self.draws_by_weight:
            return super().__getitem__(idx)  # type: ignore[misc]
        self._is_padding = idx is None
        sample = super().__getitem__(idx)
        ids = sample["document_ids"].numpy()
        domains = self.in_force.numbers_of(ids[ids >= 0])
        numbers, size = numpy.unique(domains, return_counts=True)
        sample["domain_id"] = torch.tensor(int(numbers[size.argmax()]))
        return sample

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        if not self.draws_by_weight:
            return super()._query_document_sample_shuffle_indices(idx)
        # A sample that pads a batch is fully masked: any will do.
        position = self.segment.start if self._is_padding else int(idx)
        parts = self.segment.parts(self.segment.row(position))
        texts = [self.dataset.get(d, offset=start, length=count) for d, start, count in parts]
        sequences = numpy.array([part[0] for part in parts], dtype=numpy.int64)
        counts = [part[2] for part in parts]
        self._provenance = (sequences, counts)
        return numpy.concatenate(texts, dtype=numpy.int64), sequences, list(counts)


class WeightedGPTDataset(WeightedSampling, GPTDataset):
    """`GPTDataset` that draws its training documents by weight; see the module."""
