"""Blocks for datatrove pipelines: texts to indexed data sets, and DSIR, split over tasks.

    pip install 'megatron-dwm[datatrove]'

A stage is an executor with several tasks; a block in a dependent executor with one task merges what
the tasks wrote. The result equals what `megatron-dwm preprocess` and `megatron-dwm dsir` make from
the same files, byte for byte, for any number of tasks. Other blocks, such as filters, may come
between the reader and these; the result is then that of the commands for the documents that pass. A
killed task leaves nothing that counts, and is run again from its start. Everything is kept in
folders that all tasks share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_dwm.core.vocabulary import megatron_vocabulary_size
from megatron_dwm.corpus.dsir import Features, count, log_weight
from megatron_dwm.corpus.dsir_run import (
    RAW,
    SCORES,
    TARGET,
    Selection,
    TextHasher,
    document_text,
    score_arrays,
    summed_ratios,
    write,
)
from megatron_dwm.corpus.part_folder import PartFolder
from megatron_dwm.corpus.preprocess import dataset_builders, dataset_prefix
from megatron_dwm.corpus.preprocess_workers import (
    Encoder,
    build_megatron_tokenizer,
    quiet_megatron_import,
)
from megatron_dwm.corpus.text_batches import read_batches
from megatron_dwm.corpus.tokenizer_flags import tokenizer_settings
from megatron_dwm.data.index import read_index
from megatron_dwm.errors import InputError
from megatron_dwm.files import text_files

# Keys of a document's metadata.
FILE, NUMBER, POSITION, SEQUENCES = "file", "file_number", "position", "sequences"
_INDEXED = "indexed"


class ReadTexts(PipelineStep):
    """Reads JSON Lines or plain text, compressed or not, as `megatron-dwm preprocess` does.

    A task reads the files `files[rank::world_size]`. A document's metadata has its `file`, the
    `file_number` among all files, its `position` (line) in the file and, where its text is a list,
    the `sequences`. Documents without text are included: some tokenizers have tokens for them.

    Args:
        files: File names or glob patterns.
        json_key: Key of the text in JSON Lines.
        input_format: `jsonl`, `text`, or `auto` to decide by the file's name.

    Raises:
        InputError: A pattern matches no file, or a format is unknown.
    """

    name = "Megatron texts"
    type = "READER"

    def __init__(
        self, files: Sequence[str], json_key: str = "text", input_format: str = "auto"
    ) -> None:
        super().__init__()
        patterns = [files] if isinstance(files, str) else files
        self.files = text_files.expand_inputs([str(pattern) for pattern in patterns], "files")
        self.json_key, self.input_format = json_key, input_format
        for path in self.files:
            text_files.input_format(path, input_format)

    def run(
        self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yields the documents of this task's files, after those of the block before it."""
        yield from data or ()
        for number in range(rank, len(self.files), world_size):
            for batch in read_batches([self.files[number]], self.input_format):
                for line, texts in batch.documents([self.json_key]):
                    sequences = texts[self.json_key]
                    metadata: dict[str, Any] = {
                        FILE: batch.path,
                        NUMBER: number,
                        POSITION: line,
                    }
                    if len(sequences) != 1:
                        metadata[SEQUENCES] = sequences
                    self.stat_update("documents")
                    text = document_text(sequences)
                    yield Document(text=text, id=f"{batch.path}:{line}", metadata=metadata)


class WriteIndexed(PipelineStep):
    """Tokenizes documents and writes an indexed data set for each file, for `MergeIndexed`.

    Args:
        output_prefix: As `--output-prefix`; the parts are in `PREFIX_KEY_document.parts`.
        json_key: Names the data set, as the key does in `megatron-dwm preprocess`.
        append_eod: As `--append-eod`.
        tokenizer: Tokenizer flags of `megatron-dwm preprocess` as keywords, such as
            `tokenizer_type`.

    Raises:
        InputError: An unknown keyword.
    """

    name = "Megatron indexed data set"
    type = "WRITER"

    def __init__(
        self, output_prefix: str, json_key: str = "text", append_eod: bool = False, **tokenizer: Any
    ) -> None:
        super().__init__()
        self.output = dataset_prefix(str(output_prefix), json_key)
        self.append_eod, self.tokenizer = append_eod, tokenizer
        tokenizer_settings(append_eod, **tokenizer)

    def run(
        self, data: Iterator[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Writes the documents, and yields them for the next block.

        Raises:
            InputError: The tokenizer cannot be built, or cannot take a text.
        """
        from megatron.core.datasets.indexed_dataset import DType

        settings = tokenizer_settings(self.append_eod, **self.tokenizer)
        settings.json_keys = []  # documents arrive one by one, without keys
        with quiet_megatron_import():
            tokenizer = build_megatron_tokenizer(settings)
        dtype = DType.optimal_dtype(megatron_vocabulary_size(tokenizer))
        encoder = Encoder(tokenizer, settings, dtype)
        folder = _indexed_parts(self.output)
        folder.path.mkdir(parents=True, exist_ok=True)
        numbers: list[int] = []
        for number, documents in groupby(data, key=_number):
            if number in numbers:
                raise InputError(
                    f"{self.output}: documents of file {number} are not in one run; keep them in "
                    "the order in which ReadTexts reads them"
                )
            with dataset_builders({_INDEXED: _part(folder, number)}, dtype) as builders:
                for document in documents:
                    encoded = encoder.encode_document(_sequences(document), *_place(document))
                    if encoded:
                        tokens = np.concatenate(encoded)
                        builders[_INDEXED].add_document(tokens, [len(ids) for ids in encoded])
                        self.stat_update("documents")
                        self.stat_update("tokens", value=len(tokens))
                    yield document
            numbers.append(number)
        # Written last: from then on the task's parts count.
        described = np.array(repr(sorted(vars(settings).items())))
        folder.save(
            _INDEXED, rank, world_size, numbers=np.array(numbers, np.int64), settings=described
        )


class MergeIndexed(PipelineStep):
    """Merges the parts of `WriteIndexed` in the order of the files, in one task.

    Args:
        output_prefix: That of `WriteIndexed`.
        json_key: That of `WriteIndexed`.
    """

    name = "Megatron indexed data set, merged"
    type = "WRITER"

    def __init__(self, output_prefix: str, json_key: str = "text") -> None:
        super().__init__()
        self.output = dataset_prefix(str(output_prefix), json_key)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the data set and removes the parts.

        Raises:
            InputError: A task has left no parts, or there is no document.
        """
        _alone(self, world_size)
        folder = _indexed_parts(self.output)
        tasks = list(folder.load_all(_INDEXED))
        if len({str(task["settings"]) for task in tasks}) > 1:
            raise InputError(
                f"{folder.path}: tasks have used different tokenizer settings; remove the folder "
                f"and run WriteIndexed again in all of them"
            )
        numbers = np.sort(np.concatenate([task["numbers"] for task in tasks]))
        merge_indexed([_part(folder, number) for number in numbers.tolist()], self.output)
        folder.remove()


def merge_indexed(parts: Sequence[str], output: str) -> None:
    """Writes an indexed data set from several, one after another; it appears whole.

    Args:
        parts: Their paths without suffix; their tokens are of one type.
        output: Path without suffix.

    Raises:
        InputError: There is no document in them.
    """
    indices = [read_index(part) for part in parts]
    if not any(index.documents for index in indices):
        raise InputError(f"{output}: no document with text in any file; check files and json_key")
    with dataset_builders({_INDEXED: output}, indices[0].dtype.type) as builders:
        for part in parts:
            builders[_INDEXED].add_index(part)


class DsirCounts(PipelineStep):
    """Counts the n-grams of documents, for the input or the target; see `megatron-dwm dsir`.

    Args:
        output: The file that `MergeDsir` will write; the parts are in `OUTPUT.parts`.
        target: Whether the documents are those of the target.
        ngrams: Length of the longest n-grams, in words.
        buckets: Number of hash buckets.
    """

    name = "DSIR counts"
    type = "STATS"

    def __init__(
        self, output: str, target: bool = False, ngrams: int = 2, buckets: int = 10_000
    ) -> None:
        super().__init__()
        self.output, self.target = str(output), target
        self.features = Features(ngrams, buckets)

    def run(
        self, data: Iterator[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Counts the documents, and yields them for the next block.

        Raises:
            InputError: A text that cannot be hashed.
        """
        hasher = TextHasher(self.features)
        counts = np.zeros(self.features.buckets, np.int64)
        for document in data:
            if document.text:
                buckets = hasher.buckets(document.text, *_place(document))
                counts += count([buckets], self.features)
                self.stat_update("ngrams", value=len(buckets))
            yield document
        _dsir_parts(self.output).save(
            TARGET if self.target else RAW,
            rank,
            world_size,
            counts=counts,
            ngrams=np.array(self.features.ngrams),
        )


class DsirScores(PipelineStep):
    """Weighs documents with the counts of `DsirCounts`.

    Args:
        output: That of `DsirCounts`.
        smoothing: Pseudo-count of every bucket of the target.
    """

    name = "DSIR scores"
    type = "STATS"

    def __init__(self, output: str, smoothing: float = 0.0) -> None:
        super().__init__()
        self.output, self.smoothing = str(output), smoothing

    def run(
        self, data: Iterator[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Weighs the documents, and yields them with `dsir_log_weight` in their metadata.

        Raises:
            InputError: Counts are missing or do not belong together, or a text cannot be hashed.
        """
        folder = _dsir_parts(self.output)
        features = _counted_features(folder)
        ratios = summed_ratios(folder, self.smoothing)
        hasher = TextHasher(features)
        pairs: list[tuple[float, int]] = []
        numbers: list[int] = []
        for document in data:
            if document.text:
                buckets = hasher.buckets(document.text, *_place(document))
                pairs.append((log_weight(buckets, ratios), len(buckets)))
                numbers.append(_number(document))
                document.metadata["dsir_log_weight"] = pairs[-1][0]
            yield document
        folder.save(
            SCORES, rank, world_size, numbers=np.array(numbers, np.int64), **score_arrays(pairs)
        )


class MergeDsir(PipelineStep):
    """Writes the file of `megatron-dwm dsir` from the parts of `DsirScores`, in one task.

    Args:
        output: That of `DsirScores`.
        select: As `--select`.
        seed: As `--seed`.
        min_ngrams: As `--min-ngrams`.
    """

    name = "DSIR weights, merged"
    type = "WRITER"

    def __init__(
        self, output: str, select: float | None = None, seed: int = 1234, min_ngrams: int = 0
    ) -> None:
        super().__init__()
        self.output = str(output)
        self.selection = None if select is None else Selection(select, seed, min_ngrams)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the file and removes the parts.

        Raises:
            InputError: A task has left no scores.
        """
        _alone(self, world_size)
        folder = _dsir_parts(self.output)
        tasks = list(folder.load_all(SCORES))
        joined = {name: np.concatenate([task[name] for task in tasks]) for name in tasks[0]}
        # Each file is read by one task, and its documents stay in order.
        order = np.argsort(joined["numbers"], kind="stable")
        write(self.output, joined["log_weight"][order], joined["ngrams"][order], self.selection)
        folder.remove()


def _alone(step: PipelineStep, world_size: int) -> None:
    if world_size > 1:
        raise InputError(f"{step.name}: run it in an executor with tasks=1, not {world_size}")


def _number(document: Document) -> int:
    if NUMBER not in document.metadata:
        raise InputError(
            f"document {document.id}: no {NUMBER} in its metadata; read the texts with ReadTexts"
        )
    return document.metadata[NUMBER]


def _place(document: Document) -> tuple[str, int]:
    """Returns file and line, for messages; for a document of another reader, its id."""
    return document.metadata.get(FILE, document.id), document.metadata.get(POSITION, 0)


def _sequences(document: Document) -> list[str]:
    """Returns the sequences of a document; a text that a block has changed is one sequence."""
    sequences = document.metadata.get(SEQUENCES)
    if sequences is not None and document_text(sequences) == document.text:
        return sequences
    return [document.text]


def _indexed_parts(output: str) -> PartFolder:
    return PartFolder(f"{output}.parts", "tasks of WriteIndexed")


def _part(folder: PartFolder, number: int) -> str:
    return str(folder.path / f"{number:05d}")


def _dsir_parts(output: str) -> PartFolder:
    return PartFolder(f"{output}.parts", "tasks of DsirCounts and DsirScores")


def _counted_features(folder: PartFolder) -> Features:
    """Returns the features that all counts in a folder share.

    Raises:
        InputError: The counts have different features.
    """
    parts = [part for kind in (TARGET, RAW) for part in folder.load_all(kind)]
    found = {(int(part["ngrams"]), len(part["counts"])) for part in parts}
    if len(found) > 1:
        raise InputError(
            f"{folder.path}: counts with different ngrams or buckets; remove the folder and run "
            f"DsirCounts again with the same for input and target"
        )
    return Features(*found.pop())
