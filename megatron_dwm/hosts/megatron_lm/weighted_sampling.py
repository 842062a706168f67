"""Documents drawn by weight (`--dwm-sampling weights`): what the run adds to the data sets.

Which weights hold from which sample on is the run's history, a list of stages for each training
data set. It is in the checkpoint, and the weight files that it names are kept in the run's folder
(`SAVE/dwm_weights`), so that a resumed run plans what this one did whatever became of the files
beside the data.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.training import training
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_dwm.config import DWMConfig
from megatron_dwm.core.agreement import on_each_rank, on_first_rank
from megatron_dwm.core.weighted_dataset import (
    DocumentWeights,
    SamplingSettings,
    Stage,
    WeightedSampling,
    lengths_digest,
    weighted,
)
from megatron_dwm.data.document_weights import distinct_domains
from megatron_dwm.data.epoch_plan import PLAN_VERSION
from megatron_dwm.data.index import IndexSummary, read_index
from megatron_dwm.data.weight_file import WeightFile, document_chunks, read_weights, weights_path
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts.megatron_lm.checks import training_prefixes
from megatron_dwm.hosts.megatron_lm.rebind import rebound

FOLDER = "dwm_weights"


@dataclass(frozen=True)
class _Described:
    """What rank 0 says of a weight file that it has read and checked.

    Attributes:
        path: of the file.
        header: of the file; with it another rank knows the file without reading all of it.
        distinct: see `DocumentWeights`.
    """

    path: str
    header: bytes
    distinct: numpy.ndarray | None


class Sampling:
    """Weighted sampling of one run; made on all ranks at once.

    Rank 0 alone reads files in full; the others hear from it what it found, and open the same.

    Args:
        config: settings.
        run: Megatron's arguments.
        printer: prints one line, on one rank.

    Attributes:
        domain_names: of the numbers in the batches' `domain_id`; grows when a new weight file
            names new domains.
    """

    def __init__(self, config: DWMConfig, run: Any, printer: Callable[[str], None]) -> None:
        self.run, self.printer = run, printer
        self.prefixes = training_prefixes(run)
        self.settings = SamplingSettings(
            weights=self._weights,
            lengths={},
            stages={},
            method="independent" if config.sampling_draws == "independent" else "systematic",
            max_repeats=config.sampling_max_repeats,
        )
        self.domain_names: list[str] = []
        self._domain_numbers: dict[str, int] = {}
        self._opened: dict[tuple[str, str], DocumentWeights] = {}
        self._indices: dict[str, IndexSummary] = {}
        self._verified: dict[tuple[str, str], WeightFile] = {}  # on rank 0
        self._train_sets: list[Any] = []
        self._in_force: dict[str, str] = {}
        self._resumed = False
        self._open_indices()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Returns the history and all else that the plan follows from, as plain values."""
        return {
            "stages": {
                path: [(stage.start, stage.digest) for stage in stages]
                for path, stages in self.settings.stages.items()
            },
            "rules": self._rules,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the history of a checkpoint.

        Raises:
            DWMError: the run has other data or other rules of drawing, under which the samples
                read so far could not be told from those to come.
        """
        saved, rules = state["rules"], self._rules
        different = [
            f"{name} was {saved.get(name)} and is {value}"
            for name, value in rules.items()
            if saved.get(name) != value
        ]
        if different:
            raise DWMError(
                f"--dwm-sampling weights: the run in {self.run.load} drew otherwise: "
                f"{'; '.join(different)}. Give the same, or start anew with --finetune"
            )
        self._resumed = True
        self.settings.stages = {
            path: [Stage(int(start), digest) for start, digest in stages]
            for path, stages in state["stages"].items()
        }

    @cached_property
    def _rules(self) -> dict[str, Any]:
        """What must stay the same for a plan to be followed, named as a user knows it."""
        blend, per_split = get_blend_and_blend_per_split(self.run)
        shares = (blend or per_split[0])[1]
        return {
            "the version of the plan": PLAN_VERSION,
            "the training data": self.prefixes,
            "its shares": None if shares is None else [float(share) for share in shares],
            "its documents": [self.settings.lengths[prefix] for prefix in self.prefixes],
            "--split": self.run.split if blend is not None else None,
            "--seed": self.run.seed,
            "--seq-length": self.run.seq_length,
            "--dwm-sampling-draws": self.settings.method,
            "--dwm-sampling-max-repeats": self.settings.max_repeats,
        }

    # ------------------------------------------------------------------ building and changing

    def build_data_iterators(self, stock: Any, provider: Any) -> Any:
        """Builds the trainer's data iterators with documents drawn by weight."""
        digests = self._in_force = on_first_rank(self._current_digests)
        # If not, only some ranks call it.
        is_distributed = getattr(provider, "is_distributed", False)
        failures: list[DWMError] = []

        def with_weights(*args: Any, **kwargs: Any) -> Any:
            try:
                datasets = provider(*args, **kwargs)
                # Of several chunks of a virtual pipeline the first one brings the history up to
                # date.
                changed = self._take_over(datasets[0], digests, is_distributed)
            except DWMError as error:
                if is_distributed:
                    raise
                # The others do not come here, and are told when they are through.
                failures.append(error)
                return None, None, None
            self.settings.stages.update(changed)
            self._train_sets.append(datasets[0])
            return datasets

        def finish() -> None:
            for error in failures:
                raise error

        with_weights.is_distributed = is_distributed  # type: ignore[attr-defined]
        if not self._resumed:
            self.settings.stages = {path: [Stage(0, digests[path])] for path in self.prefixes}
        self._open(
            [
                (path, digest)
                for path, stages in self.settings.stages.items()
                for digest in [*(stage.digest for stage in stages), digests[path]]
            ]
        )
        with rebound(
            BlendedMegatronDatasetBuilder,
            "__init__",
            ("self", "cls", "sizes", "is_built_on_rank", "config"),
            self._make_builder,
        ):
            iterators = stock(with_weights)
        on_each_rank(finish)
        # Rank 0 reads data, and has begun what all go on from.
        self.settings.stages = on_first_rank(lambda: self.settings.stages)
        return iterators

    def at_stage(self, data_iterator: Any) -> None:
        """Looks for new weight files; where there are, the rest of the run is planned by them.

        Args:
            data_iterator: the trainer's, which goes on with the samples of the new plan.
        """
        self._resumed = True
        try:
            digests = on_first_rank(self._current_digests)
            if digests == self._in_force:
                return
            self._open(digests.items())
        except DWMError as error:
            # The weights in force are safe in the run's folder, and so is the training.
            self.printer(f"WARNING: DWM: documents are drawn as before, as {error}")
            return
        self._in_force = digests
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        # A provider without `is_distributed` is called on the ranks that read data only.
        datasets = self._train_sets or [None] * len(iterators)
        changed: dict[str, list[Stage]] = {}
        for dataset, iterator in zip(datasets, iterators, strict=True):
            # Each chunk of a virtual pipeline has data sets of its own, with the same history.
            changed.update(self._take_over(dataset, digests, everywhere=True))
            if iterator is not None:
                consumed = self.run.consumed_train_samples
                loader = training.build_pretraining_data_loader(dataset, consumed)
                iterator.iterable = iter(loader)
                iterator.advance()
        self.settings.stages.update(changed)

    def _make_builder(
        self, stock: Any, builder: Any, cls: Any, sizes: Any, is_built_on_rank: Any, config: Any
    ) -> None:
        if isinstance(cls, type) and issubclass(cls, GPTDataset):
            if not issubclass(cls, MockGPTDataset):
                _check_class(cls)
                config.dwm_sampling = self.settings
                cls = weighted(cls)
        stock(builder, cls, sizes, is_built_on_rank, config)

    def _take_over(
        self, dataset: Any, digests: dict[str, str], everywhere: bool
    ) -> dict[str, list[Stage]]:
        """Begins a new stage in every data set whose weight file is not the one in force.

        Args:
            dataset: the training data: a blend, one data set, or None on ranks without.
            digests: of the current weight files.
            everywhere: whether all ranks call this; then rank 0 plans, and the others find the
                plan in the cache.

        Returns:
            The history of the data sets that have begun one.

        Raises:
            DWMError: a rank cannot plan by the new weights; with `everywhere` on every rank.
        """
        begin = partial(self._begin_stages, dataset, digests)
        if not everywhere:
            return begin()
        planned = on_first_rank(begin)
        first = torch.distributed.get_rank() == 0
        # A rank of another pipeline stage may have data where rank 0 has none.
        return {**planned, **on_each_rank(lambda: planned if first else begin())}

    def _begin_stages(self, dataset: Any, digests: dict[str, str]) -> dict[str, list[Stage]]:
        """Does so on this rank; samples of a run that did not draw by weight count as not seen."""
        changed = {}
        for part, position in parts_of(dataset, self.run.consumed_train_samples):
            if not isinstance(part, WeightedSampling):
                raise DWMError(
                    f"--dwm-sampling weights needs Megatron's GPTDataset (or a class derived from "
                    f"it), but the script's training data is {type(part).__name__}"
                )
            path = part.dataset_path
            stages, digest = self.settings.stages[path], digests[path]
            if self._resumed and stages[-1].digest != digest:
                changed[path] = [*stages, Stage(position, digest)]
            elif not self._resumed and position > 0 and stages[-1].start != position:
                changed[path] = [Stage(position, digest)]
            else:
                continue
            self.printer(
                f"DWM: {path} is drawn by new weights from its sample {position} on "
                f"(weight file {digest[:12]})"
            )
            try:
                part.use_stages(changed[path])
            except OSError as error:
                raise DWMError(
                    f"--dwm-sampling weights: the plan of {path} cannot be kept in the cache of "
                    f"data sets ({error}); free its place, or give another --data-cache-path"
                ) from error
        return changed

    # ------------------------------------------------------------------ files

    def _open_indices(self) -> None:
        """Opens the indices on every rank; rank 0, which has checked them, hashes the lengths."""

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
        self.settings.lengths.update(zip(self.prefixes, (d for d, _ in found), strict=True))
        outlines = dict(zip(self.prefixes, (outline for _, outline in found), strict=True))
        self._indices = on_each_rank(
            lambda: {prefix: open_like(prefix, outline) for prefix, outline in outlines.items()}
        )

    def _current_digests(self) -> dict[str, str]:
        """Returns the digest of each data set's weight file; to be called on rank 0.

        Rank 0 reads them, and keeps a copy in the run's folder, which the others then open: a
        file that is replaced meanwhile cannot make ranks differ.
        """
        files = [read_weights(weights_path(p), self._indices[p]) for p in self.prefixes]
        for prefix, file in zip(self.prefixes, files, strict=True):
            self._verified[prefix, file.digest] = self._keep(file)
        return {p: file.digest for p, file in zip(self.prefixes, files, strict=True)}

    def _open(self, files: Iterable[tuple[str, str]]) -> None:
        """Opens weight files on every rank, and numbers their domains, the same on each.

        Args:
            files: path of the data set and digest of the weight file of each.

        Raises:
            DWMError: on every rank, when one does not find a file.
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
        """Finds a weight file, on rank 0, and keeps a copy of it."""
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
            f"{prefix} was drawn by a weight file {digest[:12]}... that is none of "
            f"{', '.join(places)}; put it back, or start anew with --finetune"
        )

    def _reopen(self, prefix: str, digest: str, described: _Described) -> WeightFile:
        """Opens the file that rank 0 has found, or the same in another place."""
        places = dict.fromkeys([described.path, *self._places(prefix, digest)])
        for path in filter(os.path.exists, places):
            file = read_weights(path, verify=False)
            if file.header == described.header:
                return file
        raise DWMError(
            f"{described.path} is not what rank 0 has read: it was changed meanwhile, or this "
            "rank does not see the same files; try again"
        )

    def _places(self, prefix: str, digest: str) -> list[str]:
        folders = [os.path.join(f, FOLDER) for f in (self.run.save, self.run.load) if f]
        return [os.path.join(f, f"{digest}.weights") for f in folders] + [weights_path(prefix)]

    def _keep(self, file: WeightFile) -> WeightFile:
        """Copies a weight file to the run's folder, if it has one; returns the file to use."""
        if not self.run.save:
            return file
        path = os.path.join(self.run.save, FOLDER, f"{file.digest}.weights")
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
                f"--save {self.run.save}: {file.path} cannot be kept there, from where a resumed "
                f"run reads it ({error}); free its place, or give another --save"
            ) from error
        return read_weights(path, verify=False)

    def _weights(self, prefix: str, digest: str) -> DocumentWeights:
        """Returns the weights of a data set, by the digest of a file that `_open` has opened."""
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


def _check_class(cls: type) -> None:
    """Refuses a data set class that finds its samples in a way of its own."""
    for name in (
        "_build_document_sample_shuffle_indices",
        "_query_document_sample_shuffle_indices",
    ):
        if getattr(cls, name) not in (
            getattr(GPTDataset, name),
            getattr(WeightedSampling, name),
        ):
            raise DWMError(
                f"--dwm-sampling weights would replace {cls.__name__}.{name}, which finds samples "
                "in a way of its own (as --fim-data does); leave one of them out"
            )


def parts_of(dataset: Any, consumed: int) -> list[tuple[Any, int]]:
    """Returns the data sets of a blend, each with how many of its samples have been read.

    Args:
        dataset: a `BlendedDataset`, one data set, or None.
        consumed: samples that have been read of the whole.
    """
    if dataset is None:
        return []
    if not hasattr(dataset, "dataset_index"):
        return [(dataset, consumed)]
    counts = numpy.bincount(dataset.dataset_index[:consumed], minlength=len(dataset.datasets))
    return [(part, int(n)) for part, n in zip(dataset.datasets, counts, strict=True)]
