#!/usr/bin/env python
"""Converts checkpoints between Megatron and Hugging Face.

Every subcommand is a module of this folder. It runs in one process, without a GPU, and holds one
layer and one file's buffer in memory, not the model.
"""

import argparse
import sys
from pathlib import Path

# `python tools/convert` puts this folder on the path; the modules are named from the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dwm.conversion import ConversionError  # noqa: E402
from tools.convert import export, export_dwm, import_, inspect_, verify  # noqa: E402

# Each has `add_parser(commands)`: it registers its sub-parser, with `set_defaults(run=function)`.
# The function takes the sub-parser's options as keyword arguments and returns the exit status
# (None stands for 0).
SUBCOMMANDS = (export, import_, verify, inspect_, export_dwm)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    summary, _, detail = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python tools/convert",
        description=summary,
        epilog=detail,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for module in SUBCOMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit status: the subcommand's, or 1 after an error that was printed as one line.
    """
    options = vars(build_parser().parse_args(argv))
    command, run = options.pop("command"), options.pop("run")
    try:
        return run(**options) or 0
    except (ConversionError, OSError) as error:
        print(f"tools/convert {command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
