#!/usr/bin/env python
r"""Tokenizes JSON Lines or plain text into Megatron's indexed dataset (.bin and .idx).

    python tools/preprocess_data.py --input 'corpus/train/*.jsonl' \
        --output-prefix data/train --tokenizer-type SentencePieceTokenizer \
        --tokenizer-model corpus/tokenizer.model --append-eod --workers 8

writes data/train_text_document.bin and .idx for `--data-path data/train_text_document`. It
takes the flags of Megatron's own tools/preprocess_data.py and tokenizes with Megatron's
tokenizers. A line of JSON Lines is a document, and so is a whole plain text file. Documents
stay in the order of the input whatever the number of workers, so the output is the same
byte for byte. Nothing appears under the final names unless everything went well.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preprocess_workers import (
    Batch,
    Encoded,
    build_megatron_tokenizer,
    encode_in_order,
    quiet_megatron_import,
)
from text_files import InputError, TextFile, expand_inputs, input_format, read_blocks, read_whole

from megatron_dwm.core.vocabulary import megatron_vocabulary_size

BLOCK_BYTES = 1 << 18


def add_tokenizer_args(parser: argparse.ArgumentParser) -> None:
    """Adds Megatron's tokenizer flags: same names, defaults and destinations.

    They are listed here because importing them from Megatron takes seconds, which `--help`
    should not.
    """
    group = parser.add_argument_group("tokenizer (as in Megatron)")
    add = group.add_argument
    add("--tokenizer-type", required=True, help="such as SentencePieceTokenizer")
    add("--tokenizer-model", help="model file, directory or Hugging Face name")
    add("--vocab-size", type=int, help="vocabulary size, for NullTokenizer and TikTokenizer")
    add("--vocab-file", help="vocabulary of GPT2BPETokenizer and the BERT tokenizers")
    add("--merge-file", help="merges of GPT2BPETokenizer")
    add("--tokenizer-metadata", dest="metadata_path", help="tokenizer metadata (.json)")
    add("--tokenizer-special-tokens", dest="special_tokens", nargs="+")
    add("--tiktoken-pattern", choices=["v1", "v2"])
    add("--tiktoken-num-special-tokens", type=int, default=1000)
    add("--tokenizer-sentencepiece-legacy", action="store_true")
    add(
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
        "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
        dest="tokenizer_sentencepiece_ignore_extra_whitespaces",
        action="store_false",
    )
    add("--tokenizer-hf-no-use-fast", action="store_true")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true")
    add("--trust-remote-code", action="store_true")
    add("--null-tokenizer-eod-id", type=int)
    add("--null-tokenizer-pad-id", type=int, default=-1)
    add("--chat-template")
    # Stored tokens do not depend on these; a command line written for training has them.
    add("--padded-vocab-size", type=int, help=argparse.SUPPRESS)
    add(
        "--no-pad-vocab-size",
        "--disable-pad-vocab-size",
        dest="pad_vocab_size",
        action="store_false",
        help=argparse.SUPPRESS,
    )
    add("--vocab-extra-ids", type=int, default=0, help=argparse.SUPPRESS)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines or plain text files or glob patterns, also .gz .bz2 .xz .zst",
    )
    group.add_argument(
        "--input-format",
        choices=["auto", "jsonl", "text"],
        default="auto",
        help="format of the input; auto goes by the file's name",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of the texts, one dataset each (default: text); a list of strings "
        "under a key is one document of several sequences",
    )
    add_tokenizer_args(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.bin and .idx; replaces existing ones",
    )
    group.add_argument(
        "--append-eod",
        action="store_true",
        help="end every document with the end-of-document token",
    )
    group = parser.add_argument_group("running")
    group.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        help="tokenizing processes (default: as many as usable cores)",
    )
    group.add_argument(
        "--log-interval",
        type=int,
        default=10000,
        metavar="N",
        help="without a terminal, report every N documents instead of a progress bar",
    )
    group.add_argument(
        "--find-optimal-num-workers",
        action="store_true",
        help="measure --workers-to-check on the first --max-documents, write nothing",
    )
    group.add_argument("--workers-to-check", nargs="+", type=int, default=[16, 32, 64])
    group.add_argument("--max-documents", type=int, default=100_000)
    group = parser.add_argument_group(
        "accepted from command lines written for Megatron's tool",
        "The workers share all files and the order is the input's, so partitions have no effect.",
    )
    group.add_argument("--partitions", type=int, default=1)
    group.add_argument("--keep-sequential-samples", action="store_true")
    group.add_argument("--split-sentences", action="store_true", help="refused, see the message")
    group.add_argument("--keep-newlines", action="store_true", help="of --split-sentences")
    group.add_argument("--lang", default="english", help="of --split-sentences")
    args = parser.parse_args(argv)

    if args.split_sentences:
        parser.error(
            "--split-sentences: this tool has no sentence splitter (it would need nltk and its "
            "downloaded models). Split beforehand and give each document's text as a list of "
            "sentences; they become the sequences of one document."
        )
    for flag in ("workers", "log_interval", "max_documents", "partitions"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    if min(args.workers_to_check) < 1:
        parser.error(f"--workers-to-check {args.workers_to_check}: must be at least 1")
    if len(set(args.json_keys)) < len(args.json_keys):
        parser.error(f"--json-keys {' '.join(args.json_keys)}: a key is named twice")
    # Nothing stored depends on padding, and it would ask for flags of the parallel layout.
    args.pad_vocab_size = False
    return args


class Progress:
    """Progress over the input's bytes: a bar on a terminal, lines elsewhere."""

    def __init__(self, total_bytes: int, log_interval: int):
        """Sets the bytes of the input on disk and the documents between two lines."""
        from tqdm import tqdm

        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None)
        self._interval = log_interval
        self._next = log_interval
        self._start = time.perf_counter()
        self.documents = 0
        self.text_bytes = 0
        self._read = 0

    def update(self, encoded: Encoded) -> None:
        """Counts a batch that was written."""
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


def read_batches(files: list[Path], override: str) -> Iterator[Batch]:
    """Reads the input in order, in batches for the workers.

    Args:
        files: Input files.
        override: See `text_files.input_format`.

    Yields:
        Batches of about BLOCK_BYTES; a plain text file is one batch.

    Raises:
        InputError: See `text_files`.
    """
    done = 0
    for path in files:
        with TextFile(path) as file:
            if input_format(path, override) == "text":
                yield Batch(str(path), 1, read_whole(file), done + file.size)
            else:
                for first_line, block in read_blocks(file, BLOCK_BYTES):
                    yield Batch(str(path), first_line, block, done + file.tell())
            done += file.size


@contextmanager
def dataset_builders(prefix: str, keys: list[str], dtype: type) -> Iterator[dict]:
    """Opens one IndexedDatasetBuilder a key, on temporary names.

    On a clean exit the datasets are finished and renamed; on an error they are removed, and
    a dataset of an earlier run stays as it was.

    Args:
        prefix: Output prefix.
        keys: Keys, one dataset each.
        dtype: NumPy type of the stored tokens.

    Yields:
        The builder of each key.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    finals = {key: f"{prefix}_{key}_document" for key in keys}
    partials = {key: f"{final}.partial-{os.getpid()}" for key, final in finals.items()}
    try:
        builders = {key: IndexedDatasetBuilder(partials[key] + ".bin", dtype) for key in keys}
        yield builders
        for key in keys:
            builders[key].finalize(partials[key] + ".idx")
        for key in keys:
            # Without its index a dataset cannot be read, so no old index may meet new data.
            Path(finals[key] + ".idx").unlink(missing_ok=True)
            os.replace(partials[key] + ".bin", finals[key] + ".bin")
            os.replace(partials[key] + ".idx", finals[key] + ".idx")
    finally:
        for partial in partials.values():
            for suffix in (".bin", ".idx"):
                Path(partial + suffix).unlink(missing_ok=True)


def preprocess(args: argparse.Namespace, files: list[Path], tokenizer: Any) -> None:
    """Writes the datasets.

    Raises:
        InputError: A fault in the input, or no document with text.
    """
    from megatron.core.datasets.indexed_dataset import DType

    vocabulary = megatron_vocabulary_size(tokenizer)
    dtype = DType.optimal_dtype(vocabulary)
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(sum(path.stat().st_size for path in files), args.log_interval)
    written = dict.fromkeys(args.json_keys, 0)
    tokens = dict.fromkeys(args.json_keys, 0)
    try:
        with dataset_builders(args.output_prefix, args.json_keys, dtype) as builders:
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
            f"Wrote {args.output_prefix}_{key}_document: {written[key]} documents, "
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


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = get_args(argv)
    try:
        files = expand_inputs(args.input)
        for path in files:
            input_format(path, args.input_format)
        with quiet_megatron_import():
            tokenizer = build_megatron_tokenizer(args)
        if args.find_optimal_num_workers:
            find_optimal_num_workers(args, files, tokenizer)
        else:
            preprocess(args, files, tokenizer)
    except (InputError, OSError) as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("preprocess_data: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
