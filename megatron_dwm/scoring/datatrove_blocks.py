"""Blocks for datatrove pipelines: `megatron-dwm score --hf`, split over tasks.

The unit of work is a chunk of the data set, as on the ranks of `megatron-dwm score`: the batches do
not depend on the number of tasks, so neither do the last bits of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datatrove.pipeline.base import PipelineStep

from megatron_dwm.data.token_reader import TokenReader
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts import cpu
from megatron_dwm.scoring.huggingface import HuggingFaceScorer, usable_device
from megatron_dwm.scoring.run import (
    Corpus,
    key_and_bounds,
    plan,
    take_chunk,
    window_length,
    work_folder,
    write,
)
from megatron_dwm.scoring.work_folder import WorkFolder


class _Scoring(PipelineStep):
    """What scoring and merging share: model, data set and work folder."""

    def __init__(
        self,
        prefix: str,
        hf: str,
        seq_length: int | None = None,
        micro_batch_size: int = 8,
        chunk_tokens: int = 1 << 20,
        output: str | None = None,
        domain: str | None = None,
        force: bool = False,
    ) -> None:
        super().__init__()
        self.prefix, self.hf, self.seq_length = str(prefix), str(hf), seq_length
        self.micro_batch_size, self.chunk_tokens = micro_batch_size, chunk_tokens
        self.output, self.domain, self.force = output, domain, force

    def _begin(self, first: bool) -> tuple[Corpus, HuggingFaceScorer, WorkFolder]:
        """Reads the index, loads the model and opens the work folder.

        Args:
            first: whether to read all of the files to check them; one task is enough.

        Raises:
            DWMError: as `megatron-dwm score` raises them.
        """
        outputs = None if self.output is None else [self.output]
        domains = None if self.domain is None else [self.domain]
        (corpus,) = plan([self.prefix], outputs, domains, self.force, False, first)
        if cpu.wanted():
            # More threads would change the order of sums, and with it the last bits of the scores.
            torch.set_num_threads(1)
        scorer = HuggingFaceScorer(self.hf, usable_device())
        self.length = window_length(scorer, self.seq_length)
        key, bounds = key_and_bounds(
            corpus.index, scorer.identity(), self.length, self.micro_batch_size, self.chunk_tokens
        )
        return corpus, scorer, work_folder(corpus.output, key, bounds)


class ScoreParts(_Scoring):
    """Scores a task's share of the chunks of a data set; finished chunks are not scored again.

    Args:
        prefix: As `--data` of `megatron-dwm score`, one prefix; the other arguments match its
            flags, too.
        hf: As `--hf`.
        seq_length: As `--seq-length`.
        micro_batch_size: As `--micro-batch-size`.
        chunk_tokens: As `--chunk-tokens`; a killed task loses at most this much work.
        output: As `--output`.
        domain: As `--domain`.
        force: As `--force`.
    """

    name = "DWM scores"
    type = "STATS"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Scores.

        Raises:
            DWMError: As `megatron-dwm score` raises them.
        """
        corpus, scorer, folder = self._begin(rank == 0)
        folder.scan()
        reader = TokenReader(corpus.index, scorer.vocab_size)
        for chunk in range(rank, len(folder.done), world_size):
            if not folder.done[chunk]:
                take_chunk(folder, chunk, scorer, reader, self.length, self.micro_batch_size)
                self.stat_update("documents", value=int(np.diff(folder.bounds)[chunk]))
        folder.close()


class MergeScores(_Scoring):
    """Writes the weight file from the scores of `ScoreParts`, in one task.

    Args:
        prefix: This and the other arguments are those of `ScoreParts`.
        temperature: As `--temperature`.
        top_fraction: As `--top-fraction`.
    """

    name = "DWM weights"
    type = "WRITER"

    def __init__(
        self,
        prefix: str,
        hf: str,
        temperature: float | None = None,
        top_fraction: float | None = None,
        **scoring: Any,
    ) -> None:
        super().__init__(prefix, hf, **scoring)
        self.temperature, self.top_fraction = temperature, top_fraction

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the weights and removes the scores.

        Raises:
            DWMError: A task has not finished, or as `megatron-dwm score` raises them.
        """
        if world_size > 1:
            raise DWMError(f"{self.name}: run it in an executor with tasks=1, not {world_size}")
        corpus, scorer, folder = self._begin(True)
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if scorer.temperature is None else scorer.temperature
        write([corpus], [folder], temperature, self.top_fraction, keep_scores=False)
