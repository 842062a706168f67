r"""Weighs the documents of a corpus by their similarity to a target text (DSIR), before training.

    megatron-dwm dsir --input 'corpus/web/*.jsonl' --target target.jsonl \
        --output web.csv --select 0.25 --workers 8
    megatron-dwm weights make data/web_text_document --from web.csv --column selected

Data selection with importance resampling (Xie et al., 2023, arXiv 2302.03169): hashed word n-grams
are counted in the target and in the input. A document's log importance weight is the sum, over its
n-grams, of the log ratio of their shares in the two. With --select FRACTION, documents are drawn
without replacement in proportion to their weights (Gumbel top-k).

The output has the columns document, log_weight, ngrams and, with --select, selected (1 or 0), and
one row for each document with text, in the order of the input. `megatron-dwm preprocess` numbers
documents in the same way, if its tokenizer gives tokens for every non-empty text, so the file
matches the data set that preprocess makes from the same --input.

Rows are the same for any number of --workers. A killed run that is started again with the same
flags keeps the input files that it had finished (in OUT.csv.dsir until the output is written) and
ends with the same bytes. --select, --seed, --min-ngrams and --workers may change in between.
Exit code 0: written; 2: bad input.
"""

from __future__ import annotations

import argparse
import math
import os

from megatron_dwm.cli.command import completed, new_parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    group = parser.add_argument_group("input")
    add = group.add_argument
    files = "JSON Lines or plain text files or glob patterns, also .gz .bz2 .xz .zst"
    add("--input", nargs="+", required=True, metavar="FILE", help=f"texts to weigh: {files}")
    add("--target", nargs="+", required=True, metavar="FILE", help="target texts, as for --input")
    add(
        "--input-format",
        choices=["auto", "jsonl", "text"],
        default="auto",
        help="format of all files; auto decides by the file's name",
    )
    add("--json-key", default="text", metavar="KEY", help="key of the text in JSON Lines (text)")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", required=True, metavar="OUT.csv", help="file to write; replaces an existing one"
    )
    group = parser.add_argument_group("features")
    add = group.add_argument
    add(
        "--ngrams",
        type=int,
        default=2,
        metavar="N",
        help="length of the longest n-grams, in words (2)",
    )
    add("--buckets", type=int, default=10_000, metavar="B", help="number of hash buckets (10000)")
    add(
        "--smoothing",
        type=float,
        default=0.0,
        metavar="C",
        help="pseudo-count added to every bucket of the target, for small targets (0)",
    )
    group = parser.add_argument_group("selection")
    add = group.add_argument
    add("--select", type=float, metavar="FRACTION", help="draw this share of the documents")
    add("--seed", type=int, default=1234, help="seed of the draw (1234)")
    add(
        "--min-ngrams",
        type=int,
        default=0,
        metavar="N",
        help="never draw a document with fewer n-grams (0)",
    )
    group = parser.add_argument_group("running")
    add = group.add_argument
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        metavar="N",
        help="processes (default: one per usable core)",
    )
    add(
        "--restart",
        action="store_true",
        help="start over, discarding the work that a run with other flags or files has left",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = new_parser("dsir", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    for name, least in (("ngrams", 1), ("buckets", 2), ("workers", 1), ("min_ngrams", 0)):
        if getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} {getattr(args, name)}: must be at least {least}")
    if not 0 <= args.smoothing < math.inf:
        parser.error(f"--smoothing {args.smoothing}: must be finite and at least 0")
    if args.select is not None and not 0 < args.select <= 1:
        parser.error(f"--select {args.select}: must be above 0 and at most 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: must be at least 0")
    if args.min_ngrams and args.select is None:
        parser.error("--min-ngrams: needs --select")
    # `weights make --from` recognises the format by it.
    if not args.output.endswith(".csv"):
        parser.error(f"--output {args.output}: the name must end in .csv")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    return completed("dsir", lambda: run(args), "; finished files are kept")


def run(args: argparse.Namespace) -> None:
    """Weighs and selects.

    Raises:
        InputError: The input is bad, or another run's work is in the way.
    """
    from megatron_dwm.corpus.dsir_run import run as weigh
    from megatron_dwm.files.text_files import expand_inputs, input_format

    files = expand_inputs(args.input)
    targets = expand_inputs(args.target, "--target")
    for path in (*files, *targets):
        input_format(path, args.input_format)
    weigh(args, files, targets)
