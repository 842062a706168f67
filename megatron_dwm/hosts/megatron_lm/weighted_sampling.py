"""Draws documents by weight (`--dwm-sampling weights`): what the run adds to the data sets.

The run's history says which weights apply from which sample on: a list of stages for each training
data set. It is stored in the checkpoint, and the weight files that it names are kept in the run's
folder (`SAVE/dwm_weights`), so that a resumed run makes the same plan even if the files beside the
data have changed.
"""

from __future__ import annotations

from collections.abc import Callable
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
    SamplingSettings,
    Stage,
    WeightedSampling,
    weighted,
)
from megatron_dwm.data.epoch_plan import PLAN_VERSION
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts.megatron_lm.checks import training_prefixes
from megatron_dwm.hosts.megatron_lm.weight_files import WeightFiles
from megatron_dwm.hosts.rebind import rebound


class Sampling:
    """Weighted sampling of one run; made on all ranks together.

    Args:
        config: settings.
        run: Megatron's arguments.
        printer: prints one line, on one rank.
    """

    def __init__(self, config: DWMConfig, run: Any, printer: Callable[[str], None]) -> None:
        self.run, self.printer = run, printer
        self.prefixes = training_prefixes(run)
        self.files = WeightFiles(self.prefixes, run.save, run.load)
        self.settings = SamplingSettings(
            weights=self.files.weights,
            lengths=self.files.lengths,
            stages={},
            method="independent" if config.sampling_draws == "independent" else "systematic",
            max_repeats=config.sampling_max_repeats,
        )
        self._train_sets: list[Any] = []
        self._in_force: dict[str, str] = {}
        self._resumed = False

    @property
    def domain_names(self) -> list[str]:
        """Names of the batches' `domain_id` numbers; grows when a new file names new domains."""
        return self.files.domain_names

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Returns the history and everything else that determines the plan, as plain values."""
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
            DWMError: the run has other data or other drawing rules, so that the samples read so far
                could not be told apart from those to come.
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
                f"{'; '.join(different)}. Give the same, or start over with --finetune"
            )
        self._resumed = True
        self.settings.stages = {
            path: [Stage(int(start), digest) for start, digest in stages]
            for path, stages in state["stages"].items()
        }

    @cached_property
    def _rules(self) -> dict[str, Any]:
        """Returns what must stay the same to follow a plan, under names that a user knows."""
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
        digests = self._in_force = on_first_rank(self.files.current)
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
        self.files.open(
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
        # Rank 0 reads data, and has begun the history that all ranks continue.
        self.settings.stages = on_first_rank(lambda: self.settings.stages)
        return iterators

    def at_stage(self, data_iterator: Any) -> None:
        """Looks for new weight files; if there are any, plans the rest of the run with them.

        Args:
            data_iterator: the trainer's, which continues with the samples of the new plan.
        """
        self._resumed = True
        try:
            digests = on_first_rank(self.files.current)
            if digests == self._in_force:
                return
            self.files.open(digests.items())
        except DWMError as error:
            # The current weights are safe in the run's folder, so training can continue.
            self.printer(f"WARNING: DWM: documents are drawn as before, because {error}")
            return
        self._in_force = digests
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        # A provider without `is_distributed` is called only on the ranks that read data.
        datasets = self._train_sets or [None] * len(iterators)
        changed: dict[str, list[Stage]] = {}
        for dataset, iterator in zip(datasets, iterators, strict=True):
            # Each chunk of a virtual pipeline has its own data sets, with the same history.
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
        """Begins a new stage in every data set whose weight file is not the current one.

        Args:
            dataset: the training data: a blend, one data set, or None on ranks without.
            digests: digests of the new weight files.
            everywhere: whether all ranks call this; then rank 0 plans, and the others find the
                plan in the cache.

        Returns:
            The history of the data sets that have begun a new stage.

        Raises:
            DWMError: a rank cannot plan with the new weights; with `everywhere`, on every rank.
        """
        begin = partial(self._begin_stages, dataset, digests)
        if not everywhere:
            return begin()
        planned = on_first_rank(begin)
        first = torch.distributed.get_rank() == 0
        # A rank of another pipeline stage may have data where rank 0 has none.
        return {**planned, **on_each_rank(lambda: planned if first else begin())}

    def _begin_stages(self, dataset: Any, digests: dict[str, str]) -> dict[str, list[Stage]]:
        """Does so on this rank; samples of a run that did not draw by weight count as unseen."""
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
                    f"--dwm-sampling weights: the plan of {path} cannot be written to the data set "
                    f"cache ({error}); make room, or give another --data-cache-path"
                ) from error
        return changed


def _check_class(cls: type) -> None:
    """Refuses a data set class that finds its samples in its own way."""
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
                "in its own way (as --fim-data does); leave one of them out"
            )


def parts_of(dataset: Any, consumed: int) -> list[tuple[Any, int]]:
    """Returns the data sets of a blend, each with the number of its samples that have been read.

    Args:
        dataset: a `BlendedDataset`, one data set, or None.
        consumed: number of samples read from the whole.
    """
    if dataset is None:
        return []
    if not hasattr(dataset, "dataset_index"):
        return [(dataset, consumed)]
    counts = numpy.bincount(dataset.dataset_index[:consumed], minlength=len(dataset.datasets))
    return [(part, int(n)) for part, n in zip(dataset.datasets, counts, strict=True)]
