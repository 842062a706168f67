"""Converts text to Megatron's indexed data sets, in parallel and in the order of the input."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dwm.core.vocabulary import megatron_vocabulary_size
from megatron_dwm.corpus.preprocess_workers import Encoded, encode_in_order
from megatron_dwm.corpus.text_batches import read_batches
from megatron_dwm.errors import InputError
from megatron_dwm.progress import bar


class Progress:
    """Progress over the input's bytes: a bar on a terminal, lines elsewhere."""

    def __init__(self, total_bytes: int, log_interval: int):
        """Sets the input's size on disk and the number of documents between two lines."""
        self._bar = bar(total_bytes, "B", "preprocess")
        self._interval = log_interval
        self._next = log_interval
        self._start = time.perf_counter()
        self.documents = 0
        self.text_bytes = 0
        self._read = 0

    def update(self, encoded: Encoded) -> None:
        """Counts a written batch."""
        self.documents += encoded.documents
        self.text_bytes += encoded.batch_bytes
        self._bar.update(encoded.position - self._read)
        self._read = encoded.position
        if self._bar.disable and self.documents >= self._next:
            self._next = (self.documents // self._interval + 1) * self._interval
            print(f"Processed {self.documents} documents ({self.rate()})", file=sys.stderr)

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def rate(self) -> str:
        """Throughput so far, in words."""
        seconds = max(self.seconds(), 1e-9)
        return f"{self.documents / seconds:.0f} docs/s, {self.text_bytes / seconds / 1e6:.2f} MB/s"

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def dataset_prefix(output_prefix: str, key: str) -> str:
    """Returns the path without suffix of the dataset of a key, as Megatron's own tool names it."""
    return f"{output_prefix}_{key}_document"


@contextmanager
def dataset_builders(finals: dict[str, str], dtype: type) -> Iterator[dict]:
    """Opens one IndexedDatasetBuilder per key, under temporary names.

    On a clean exit the datasets are finished and renamed; on an error they are removed, and
    a dataset of an earlier run stays as it was.

    Args:
        finals: Path without suffix of each key's dataset.
        dtype: NumPy type of the stored tokens.

    Yields:
        The builder of each key.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    partials = {key: f"{final}.partial-{os.getpid()}" for key, final in finals.items()}
    try:
        builders = {key: IndexedDatasetBuilder(partials[key] + ".bin", dtype) for key in finals}
        yield builders
        for key in finals:
            builders[key].finalize(partials[key] + ".idx")
        for key, final in finals.items():
            # An old index must never appear with new data: without an index the data set cannot be
            # read.
            Path(final + ".idx").unlink(missing_ok=True)
            os.replace(partials[key] + ".bin", final + ".bin")
            os.replace(partials[key] + ".idx", final + ".idx")
    finally:
        for partial in partials.values():
            for suffix in (".bin", ".idx"):
                Path(partial + suffix).unlink(missing_ok=True)


def preprocess(args: argparse.Namespace, files: list[Path], tokenizer: Any) -> None:
    """Writes the datasets.

    Raises:
        InputError: The input is bad, or no document has text.
    """
    from megatron.core.datasets.indexed_dataset import DType

    vocabulary = megatron_vocabulary_size(tokenizer)
    dtype = DType.optimal_dtype(vocabulary)
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(sum(path.stat().st_size for path in files), args.log_interval)
    written = dict.fromkeys(args.json_keys, 0)
    tokens = dict.fromkeys(args.json_keys, 0)
    try:
        finals = {key: dataset_prefix(args.output_prefix, key) for key in args.json_keys}
        with dataset_builders(finals, dtype) as builders:
            batches = read_batches(files, args.input_format)
            for encoded in encode_in_order(batches, args, tokenizer, dtype, args.workers):
                for key, documents in encoded.keys.items():
                    for document, lengths in documents.split(dtype):
                        builders[key].add_document(document, lengths)
                        written[key] += 1
                        tokens[key] += len(document)
                progress.update(encoded)
            for key in args.json_keys:
                if not written[key]:
                    raise InputError(
                        f"--input: {progress.documents} documents, none with text under key "
                        f"'{key}'. Nothing was written; check the files and --json-keys."
                    )
    finally:
        progress.close()
    for key in args.json_keys:
        empty = progress.documents - written[key]
        print(
            f"Wrote {finals[key]}: {written[key]} documents, "
            f"{tokens[key]} tokens, {empty} empty documents skipped"
        )
    print(f"{progress.seconds():.1f} s with {args.workers} workers ({progress.rate()})")
    if vocabulary > tokenizer.vocab_size:
        print(
            f"NOTE: the tokenizer's ids go up to {vocabulary - 1}, and the trainer pads the "
            f"vocabulary from {tokenizer.vocab_size}: where that gives fewer than {vocabulary} "
            f"rows, train with --padded-vocab-size.",
            file=sys.stderr,
        )


def find_optimal_num_workers(args: argparse.Namespace, files: list[Path], tokenizer: Any) -> None:
    """Prints the throughput of each number of workers, fastest first."""
    from megatron.core.datasets.indexed_dataset import DType

    dtype = DType.optimal_dtype(megatron_vocabulary_size(tokenizer))
    rates = []
    for workers in args.workers_to_check:
        documents, start = 0, time.perf_counter()
        batches = read_batches(files, args.input_format)
        for encoded in encode_in_order(batches, args, tokenizer, dtype, workers):
            documents += encoded.documents
            if documents >= args.max_documents:
                break
        rates.append((documents / (time.perf_counter() - start), workers))
    for rate, workers in sorted(rates, reverse=True):
        print(f"{workers} workers: {rate:.0f} docs/s")
