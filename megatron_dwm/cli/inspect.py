"""Checks a Megatron data set (.idx and .bin) and prints what is in it.

    megatron-dwm inspect data/train_text_document --sequence-length 4096

Exit code 0: the pair is whole; 2: it is missing or damaged, and one line says how. For a run's
folder, use `megatron-dwm convert inspect`.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from megatron_dwm.cli.command import completed, new_parser, print_json
from megatron_dwm.errors import InputError

if TYPE_CHECKING:
    from megatron_dwm.data.index import IndexSummary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "prefix", metavar="PREFIX", help="path of the two files without .idx and .bin"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="also print how many packed samples of N tokens there are in an epoch",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = new_parser("inspect", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.sequence_length is not None and args.sequence_length < 1:
        parser.error(f"--sequence-length: expected at least 1, found {args.sequence_length}")
    return args


def figures(index: IndexSummary, sequence_length: int | None) -> dict[str, Any]:
    """Returns what `--json` prints."""
    from megatron_dwm.data.index import num_packed_samples

    found: dict[str, Any] = {
        "prefix": str(index.prefix),
        "documents": index.documents,
        "sequences": index.sequences,
        "tokens": index.tokens,
        "token_type": index.dtype.name,
        "unused_bytes": index.bin_bytes - index.tokens * index.dtype.itemsize,
    }
    if sequence_length is not None:
        found["sequence_length"] = sequence_length
        found["samples"] = int(num_packed_samples(index.tokens, sequence_length))
    return found


def describe(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Lists the lines to print, as pairs of a name and a value."""
    lines = [
        ("documents", f"{found['documents']:,}"),
        ("sequences", f"{found['sequences']:,}"),
        ("tokens", f"{found['tokens']:,}"),
        ("token type", found["token_type"]),
    ]
    if found["documents"]:
        mean = found["tokens"] / found["documents"]
        lines.append(("tokens per document", f"{mean:,.1f} (mean)"))
    if "samples" in found:
        lines.append((f"samples of {found['sequence_length']:,} tokens", f"{found['samples']:,}"))
    # Allowed, but usually a sign that .bin and .idx are from different runs.
    if found["unused_bytes"] > 0:
        lines.append(("bytes of the .bin that no sequence uses", f"{found['unused_bytes']:,}"))
    return lines


def run(args: argparse.Namespace) -> None:
    """Reads the index and prints.

    Raises:
        DWMError: The pair is missing or damaged.
    """
    from megatron_dwm.data.index import read_index

    if os.path.isdir(args.prefix) and not os.path.exists(f"{args.prefix}.idx"):
        raise InputError(
            f"{args.prefix} is a folder; give the path of a data set without .idx, or look at a "
            f"run's checkpoints with: megatron-dwm convert inspect {args.prefix}"
        )
    found = figures(read_index(args.prefix), args.sequence_length)
    if args.json:
        print_json(found)
        return
    lines = describe(found)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    return completed("inspect", lambda: run(args))
