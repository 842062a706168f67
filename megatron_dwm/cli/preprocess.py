r"""Tokenizes JSON Lines or plain text into Megatron's indexed data sets (.bin and .idx).

    megatron-dwm preprocess --input 'corpus/train/*.jsonl' \
        --output-prefix data/train --tokenizer-type SentencePieceTokenizer \
        --tokenizer-model corpus/tokenizer.model --append-eod --workers 8

writes data/train_text_document.bin and .idx for `--data-path data/train_text_document`. It
takes the flags of Megatron's own tools/preprocess_data.py and tokenizes with Megatron's tokenizers.
Each line of JSON Lines is a document, and so is each plain text file. Documents stay in input order
whatever the number of workers, so the output is always the same, byte for byte. Files appear under
their final names only if everything succeeded.
Exit code 0: written; 2: bad input.
"""

from __future__ import annotations

import argparse
import os

from megatron_dwm.cli.command import completed, new_parser
from megatron_dwm.corpus.tokenizer_flags import add_tokenizer_args
from megatron_dwm.progress import working


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
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
        help="format of the input; auto decides by the file's name",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of the texts, with one data set for each (default: text); a list of strings "
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
        help="tokenizing processes (default: one per usable core)",
    )
    group.add_argument(
        "--log-interval",
        type=int,
        default=10000,
        metavar="N",
        help="without a terminal: report every N documents (instead of a progress bar)",
    )
    group.add_argument(
        "--find-optimal-num-workers",
        action="store_true",
        help="measure speed with --workers-to-check on the first --max-documents; write nothing",
    )
    group.add_argument(
        "--workers-to-check",
        nargs="+",
        type=int,
        default=[16, 32, 64],
        metavar="N",
        help="numbers of workers to try (default: 16 32 64)",
    )
    group.add_argument(
        "--max-documents",
        type=int,
        default=100_000,
        metavar="N",
        help="documents per measurement (default: 100000)",
    )
    group = parser.add_argument_group(
        "accepted from command lines written for Megatron's tool",
        "The workers share all files and the order is the input's, so partitions have no effect.",
    )
    group.add_argument("--partitions", type=int, default=1, help="without effect")
    group.add_argument("--keep-sequential-samples", action="store_true", help="without effect")
    group.add_argument("--split-sentences", action="store_true", help="refused, see the message")
    group.add_argument("--keep-newlines", action="store_true", help="of --split-sentences")
    group.add_argument("--lang", default="english", help="of --split-sentences")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = new_parser("preprocess", __doc__)
    add_arguments(parser)
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
    # The output does not depend on padding, which would need flags of the parallel layout.
    args.pad_vocab_size = False
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    return completed("preprocess", lambda: run(args), ", nothing was written")


def run(args: argparse.Namespace) -> None:
    """Tokenizes, or measures speed for several numbers of workers.

    Raises:
        InputError: The input or the tokenizer's flags are bad.
    """
    from megatron_dwm.corpus.preprocess import find_optimal_num_workers, preprocess
    from megatron_dwm.corpus.preprocess_workers import (
        build_megatron_tokenizer,
        quiet_megatron_import,
    )
    from megatron_dwm.files.text_files import expand_inputs, input_format

    files = expand_inputs(args.input)
    for path in files:
        input_format(path, args.input_format)
    with working("loading the tokenizer"), quiet_megatron_import():
        tokenizer = build_megatron_tokenizer(args)
    work = find_optimal_num_workers if args.find_optimal_num_workers else preprocess
    work(args, files, tokenizer)
