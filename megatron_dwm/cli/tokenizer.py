r"""Trains a Llama-style SentencePiece tokenizer on JSON Lines or plain text.

    megatron-dwm tokenizer --input corpus/train/*.jsonl \
        --out corpus/tokenizer --vocab-size 4096

writes corpus/tokenizer.model for Megatron (`--tokenizer-type SentencePieceTokenizer
--tokenizer-model corpus/tokenizer.model`) and, because the file is named tokenizer.model, for
Hugging Face (`LlamaTokenizer.from_pretrained("corpus")`). The same input, flags and sentencepiece
release give the same file, byte for byte.
Exit code 0: written, or already there with --skip-existing; 2: bad input.
"""

from __future__ import annotations

import argparse

from megatron_dwm.cli.command import completed, new_parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines or plain text files or glob patterns, also .gz .bz2 .xz .zst",
    )
    parser.add_argument(
        "--out", required=True, metavar="PREFIX", help="writes PREFIX.model and PREFIX.vocab"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces (default: 4096)")
    parser.add_argument(
        "--json-key", default="text", help="key of the text in JSON Lines (default: text)"
    )
    parser.add_argument(
        "--input-format",
        choices=["auto", "jsonl", "text"],
        default="auto",
        help="format of the input; auto decides by the file's name",
    )
    parser.add_argument(
        "--max-mb",
        type=float,
        default=100.0,
        help="train on a uniform sample of documents of this size (default: 100)",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="seed of the sample and of the trainer"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--skip-existing", action="store_true", help="do nothing if PREFIX.model exists"
    )
    existing.add_argument("--force", action="store_true", help="overwrite PREFIX.model")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = new_parser("tokenizer", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.vocab_size < 260:
        parser.error(f"--vocab-size {args.vocab_size}: 256 bytes and 3 special tokens come first")
    if args.max_mb <= 0:
        parser.error(f"--max-mb {args.max_mb}: must be positive")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    return completed("tokenizer", lambda: run(args), ", nothing was written")


def run(args: argparse.Namespace) -> None:
    """Reads, samples, trains and writes.

    Raises:
        InputError: The input is bad, or the output exists.
    """
    from megatron_dwm.corpus.train_tokenizer import run as train

    train(args)
