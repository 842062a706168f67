#!/usr/bin/env python
"""Converts checkpoints between Megatron and Hugging Face.

    python tools/convert export --megatron-path RUN --hf-path OUT

writes the dense Llama of a Megatron run (`torch_dist` format, any parallel layout) as a folder
for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`. It runs in one
process, without a GPU and without Megatron, and holds one layer and one shard in memory.
"""

import argparse
import sys
from pathlib import Path

# `python tools/convert` puts this folder on the path; the modules are named from the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dwm.conversion import ConversionError  # noqa: E402
from tools.convert.export import DTYPES, export  # noqa: E402


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
    command = commands.add_parser("export", help="Megatron -> Hugging Face")
    add = command.add_argument
    add(
        "--megatron-path",
        required=True,
        metavar="RUN",
        help="run folder (its latest checkpoint is taken) or one iter_ folder",
    )
    add("--hf-path", required=True, metavar="OUT", help="folder to write")
    add("--iteration", type=int, metavar="N", help="iteration to take from a run folder")
    add("--dtype", choices=sorted(DTYPES), help="dtype to write (default: the checkpoint's)")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="true vocabulary size; padded rows behind it are cut (default: the tokenizer's)",
    )
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest weights file, such as 500MB or 5GB (default: 5GB)",
    )
    add(
        "--tokenizer-model",
        metavar="FILE",
        help="SentencePiece model or Hugging Face tokenizer folder (default: the one that the "
        "checkpoint names); 'none' exports without a tokenizer",
    )
    add(
        "--rope-scaling-factor",
        type=float,
        metavar="F",
        help="factor that a model with --use-rope-scaling was built with (default: the "
        "checkpoint's, which must be 8, as Megatron's own builders ignore the flag)",
    )
    add("--force", action="store_true", help="replace a model that OUT holds already")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit status: 0, or 1 after an error that was printed as one line.
    """
    options = vars(build_parser().parse_args(argv))
    options.pop("command")
    try:
        export(**options)
    except (ConversionError, OSError) as error:
        print(f"tools/convert export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
