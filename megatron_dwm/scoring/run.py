"""Scores corpora on all ranks: plan, loop over chunks, write weight files.

Ranks exchange only the plan; scores are passed through the work folders. A chunk's scores are the
same on any rank, so the result does not depend on the number of ranks or on kills.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_dwm.data.index import IndexSummary, read_index
from megatron_dwm.data.token_reader import TokenReader
from megatron_dwm.data.weight_file import WeightFile, read_weights, weights_path, write_weights
from megatron_dwm.errors import DWMError
from megatron_dwm.progress import bar
from megatron_dwm.scoring.documents import chunk_bounds
from megatron_dwm.scoring.identity import corpus_digest
from megatron_dwm.scoring.score_chunk import WindowScorer, score_chunk
from megatron_dwm.scoring.weighing import summary, weights_of
from megatron_dwm.scoring.work_folder import WorkFolder, work_key


@dataclass(frozen=True)
class Corpus:
    """One corpus to score.

    Attributes:
        index: its index.
        output: weight file to write.
        domains: `[D]` int32 domains for the weight file, or None; on the rank that writes it.
        domain_names: their names.
    """

    index: IndexSummary
    output: str
    domains: np.ndarray | None
    domain_names: tuple[str, ...]


def scores_path(output: str) -> str:
    """Returns the path where `--keep-scores` writes the scores of a weight file."""
    return f"{output.removesuffix('.weights')}.scores.npy"


def plan(
    prefixes: Sequence[str],
    outputs: Sequence[str] | None,
    domains: Sequence[str] | None,
    force: bool,
    keep_scores: bool,
    verify: bool = True,
) -> list[Corpus]:
    """Reads the indexes and checks everything that can be checked before a model is loaded.

    Args:
        prefixes: `--data`.
        outputs: `--output`, one for each prefix; None for `PREFIX.weights`.
        domains: `--domain`, one name for each prefix; None keeps the domains of the replaced weight
            file, or of `PREFIX.weights`.
        force: whether existing files are replaced.
        keep_scores: whether `.scores.npy` is written too.
        verify: whether to read all of the files to check them; one rank is enough.

    Raises:
        DWMError: names the flag or the file, and what to do.
    """
    for name, values in (("--output", outputs), ("--domain", domains)):
        if values is not None and len(values) != len(prefixes):
            raise DWMError(
                f"{name} has {len(values)} values and --data {len(prefixes)}; give one for each "
                "prefix, in the same order, or leave it out"
            )
    outputs = [weights_path(prefix) for prefix in prefixes] if outputs is None else outputs
    if len({os.path.realpath(output) for output in outputs}) < len(outputs):
        raise DWMError("two of the --data or --output paths are the same; give each once")
    corpora = []
    for number, (prefix, output) in enumerate(zip(prefixes, outputs, strict=True)):
        index = read_index(prefix, verify)
        if not index.documents:
            raise DWMError(f"{prefix}.idx has no documents; leave it out of --data")
        for path in (output, scores_path(output)) if keep_scores else (output,):
            if os.path.isdir(path) or (os.path.exists(path) and not force):
                raise DWMError(f"{path} is there already; give another --output, or --force")
        parent = os.path.dirname(output) or "."
        if not os.access(parent, os.W_OK | os.X_OK):
            raise DWMError(f"{output}: the folder {parent} is missing or not writable")
        corpora.append(Corpus(index, output, None, ()))
        if verify:
            found, names = _domains(index, output, None if domains is None else domains[number])
            corpora[-1] = Corpus(index, output, found, names)
    return corpora


def _domains(
    index: IndexSummary, output: str, name: str | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if name is not None:
        return np.zeros(index.documents, np.int32), (name,)
    for path in (output, weights_path(index.prefix)):
        if os.path.exists(path):
            file = read_weights(path, index)
            return file.domains, file.domain_names
    return None, ()


def window_length(scorer: WindowScorer, wanted: int | None) -> int:
    """Returns the length of windows: the flag's, or the model's own.

    Raises:
        DWMError: the model does not support that length, or has no length of its own.
    """
    length = scorer.default_length if wanted is None else wanted
    if length is None:
        raise DWMError(
            f"{scorer.where} does not say what sequence length it was trained with; give "
            "--seq-length"
        )
    if scorer.max_length is not None and length > scorer.max_length:
        raise DWMError(
            f"--seq-length {length} is longer than the {scorer.max_length} positions that the "
            f"weighting model in {scorer.where} has; give at most {scorer.max_length}"
        )
    return length


def score(
    corpora: Sequence[Corpus],
    scorer: WindowScorer,
    seq_length: int,
    micro_batch_size: int,
    chunk_tokens: int,
) -> list[WorkFolder]:
    """Scores what is not scored yet; returns once all ranks are done.

    Args:
        corpora: as `plan` returns them.
        scorer: the weighting model.
        seq_length: longest window.
        micro_batch_size: windows of `seq_length` in a batch.
        chunk_tokens: tokens of a chunk.

    Returns:
        The work folder of each corpus.

    Raises:
        DWMError: a token id outside the vocabulary, a score that is not finite, a full disk.
    """
    work: list[Any] = [None] * len(corpora)
    if dist.get_rank() == 0:
        identity = scorer.identity()
        for number, corpus in enumerate(corpora):
            work[number] = key_and_bounds(
                corpus.index, identity, seq_length, micro_batch_size, chunk_tokens
            )
    dist.broadcast_object_list(work, src=0)
    folders = [
        work_folder(corpus.output, key, bounds)
        for corpus, (key, bounds) in zip(corpora, work, strict=True)
    ]
    readers = [TokenReader(corpus.index, scorer.vocab_size) for corpus in corpora]
    chunks = _outstanding(folders)
    with _Progress(corpora, folders) as progress:
        for number, chunk in chunks[dist.get_rank() :: dist.get_world_size()]:
            take_chunk(
                folders[number], chunk, scorer, readers[number], seq_length, micro_batch_size
            )
            progress.update()
        for folder in folders:
            folder.close()
        _wait_for_all(progress)
    return folders


def key_and_bounds(
    index: IndexSummary, identity: str, seq_length: int, micro_batch_size: int, chunk_tokens: int
) -> tuple[str, np.ndarray]:
    """Returns the key under which a corpus' scores are kept, and the bounds of its chunks.

    Args:
        index: the corpus.
        identity: identity of the weighting model.
        seq_length: longest window.
        micro_batch_size: windows of `seq_length` in a batch.
        chunk_tokens: tokens of a chunk.
    """
    key = work_key(
        model=identity,
        corpus=corpus_digest(index),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        chunk_tokens=chunk_tokens,
    )
    return key, chunk_bounds(index, chunk_tokens)


def work_folder(output: str, key: str, bounds: np.ndarray) -> WorkFolder:
    """Returns the folder with the scores that belong to a weight file."""
    return WorkFolder(f"{output}.scores", key, bounds)


def take_chunk(
    folder: WorkFolder,
    chunk: int,
    scorer: WindowScorer,
    reader: TokenReader,
    seq_length: int,
    micro_batch_size: int,
) -> None:
    """Scores a chunk and keeps its scores.

    Args:
        folder: where to keep them.
        chunk: its number.
        scorer: the weighting model.
        reader: the corpus.
        seq_length: longest window.
        micro_batch_size: windows of `seq_length` in a batch.

    Raises:
        DWMError: a token id outside the vocabulary, a score that is not finite, a full disk.
    """
    first, last = (int(bound) for bound in folder.bounds[chunk : chunk + 2])
    folder.append(chunk, score_chunk(scorer, reader, first, last, seq_length, micro_batch_size))


def _wait_for_all(progress: _Progress) -> None:
    """Returns once every rank has arrived, so that all scores are on disk.

    Raises:
        DWMError: a rank has ended before it got here.
    """
    try:
        waiting = dist.barrier(async_op=True)
        while not waiting.is_completed():
            time.sleep(0.05)
            progress.update()
        waiting.wait()
    except RuntimeError as error:
        raise DWMError(
            "another rank ended before its documents were scored, and said why; once that is "
            "fixed, start again: finished chunks are kept"
        ) from error


def _outstanding(folders: Sequence[WorkFolder]) -> list[tuple[int, int]]:
    """Returns the corpus and chunk of all remaining work, the same on every rank."""
    chunks: list[Any] = [None]
    if dist.get_rank() == 0:
        for folder in folders:
            folder.scan()
        chunks = [
            [(n, int(c)) for n, folder in enumerate(folders) for c in np.flatnonzero(~folder.done)]
        ]
    dist.broadcast_object_list(chunks, src=0)
    return chunks[0]


class _Progress:
    """A progress bar on rank 0 over all ranks' documents, read from the work folders."""

    def __init__(self, corpora: Sequence[Corpus], folders: Sequence[WorkFolder]) -> None:
        self._shown = dist.get_rank() == 0
        if not self._shown:
            return
        self._folders, self._indices = folders, [corpus.index for corpus in corpora]
        self._tokens, self._start, self._looked = 0, time.monotonic(), 0.0
        before = sum(int(np.diff(f.bounds)[f.done].sum()) for f in folders)
        total = sum(corpus.index.documents for corpus in corpora)
        if before:
            print(
                f"NOTE: {before} of {total} documents were scored earlier; the rest is scored now",
                file=sys.stderr,
            )
        self._bar = bar(total, " documents", "score", initial=before)
        self._shown = not self._bar.disable

    def update(self) -> None:
        """Shows what has been finished; checks at most twice a second."""
        if not self._shown or time.monotonic() - self._looked < 0.5:
            return
        self._look()

    def _look(self) -> None:
        self._looked = time.monotonic()
        documents = 0
        for folder, index in zip(self._folders, self._indices, strict=True):
            for chunk in folder.scan():
                first, last = folder.bounds[chunk : chunk + 2]
                documents += int(last - first)
                self._tokens += int(index.document_tokens(first, last).sum())
        rate = self._tokens / max(self._looked - self._start, 1e-6)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(documents)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        # Also closed after an error, so that the message starts on a new line.
        if self._shown:
            self._look()
            self._bar.close()


def write(
    corpora: Sequence[Corpus],
    folders: Sequence[WorkFolder],
    temperature: float,
    top_fraction: float | None,
    keep_scores: bool,
) -> str:
    """Writes the weight files, on rank 0.

    Args:
        corpora: the scored corpora.
        folders: the work folder of each; deleted unless scores are kept.
        temperature: T of `w = exp((s - max s) / T)`.
        top_fraction: share of the documents that keep a weight; None for all.
        keep_scores: whether the work folder stays and `.scores.npy` is written.

    Returns:
        The summary.

    Raises:
        DWMError: chunks are missing, a corpus is left without weight, or a file cannot be written.
    """
    scores = [folder.scores() for folder in folders]
    prefixes = [corpus.index.prefix for corpus in corpora]
    weights = weights_of(scores, prefixes, temperature, top_fraction)
    files: list[WeightFile] = []
    for corpus, values, own in zip(corpora, weights, scores, strict=True):
        if keep_scores:
            _save_scores(scores_path(corpus.output), own)
        files.append(
            write_weights(corpus.output, values, corpus.index, corpus.domains, corpus.domain_names)
        )
    text = summary(files, [corpus.index for corpus in corpora])
    if not keep_scores:
        for folder in folders:
            folder.remove()
    return text


def _save_scores(path: str, scores: np.ndarray) -> None:
    partial = f"{path}.partial-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            np.save(file, scores)
        os.replace(partial, path)
    except OSError as error:
        raise DWMError(f"{path}: cannot be written ({error.strerror})") from error
