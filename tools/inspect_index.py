#!/usr/bin/env python
"""Checks a Megatron dataset (.idx and .bin) and prints what is in it.

    python tools/inspect_index.py data/train_text_document --sequence-length 4096

Exits with code 2 and one line that says what is wrong when the pair is missing or damaged.
"""

import argparse
import sys

from megatron_dwm.data import DatasetError, IndexSummary, num_packed_samples, read_index


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", help="path of the pair without .idx and .bin")
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="also print how many packed samples of N tokens one epoch has",
    )
    args = parser.parse_args()
    if args.sequence_length is not None and args.sequence_length < 1:
        parser.error(f"--sequence-length: expected at least 1, found {args.sequence_length}")
    return args


def describe(index: IndexSummary, sequence_length: int | None) -> list[tuple[str, str]]:
    """Lists the lines to print, as pairs of a name and a value."""
    lines = [
        ("documents", f"{index.documents:,}"),
        ("sequences", f"{index.sequences:,}"),
        ("tokens", f"{index.tokens:,}"),
        ("token type", index.dtype.name),
    ]
    if index.documents:
        lines.append(("tokens per document", f"{index.tokens / index.documents:,.1f} (mean)"))
    if sequence_length is not None:
        samples = num_packed_samples(index.tokens, sequence_length)
        lines.append((f"samples of {sequence_length:,} tokens", f"{samples:,}"))
    # Legitimate, but the usual sign of a .bin from another run than the .idx.
    unused = index.bin_bytes - index.tokens * index.dtype.itemsize
    if unused > 0:
        lines.append(("bytes of the .bin that no sequence uses", f"{unused:,}"))
    return lines


def main() -> int:
    """Runs the command; returns its exit code."""
    args = parse_args()
    try:
        lines = describe(read_index(args.prefix), args.sequence_length)
    except DatasetError as error:
        print(f"inspect_index: error: {error}", file=sys.stderr)
        return 2
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
