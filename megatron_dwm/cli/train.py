r"""Runs a script that calls Megatron's `pretrain`, unchanged, with the weighting attached.

    megatron-dwm train pretrain_gpt.py YOUR FLAGS \
        --dwm --dwm-meta-data-path data/meta_text_document

runs in one process. For several processes, also on several nodes, start it under torchrun:

    torchrun --nproc-per-node 8 -m megatron_dwm train pretrain_gpt.py YOUR FLAGS --dwm ...

All arguments after SCRIPT are the script's, and it takes the flags below in addition to its own.
Without --dwm it is the stock trainer. The exit code is the script's own, or 2 if the flags or the
data are refused, after one line on standard error.
"""

from __future__ import annotations

import argparse
import sys

from megatron_dwm.cli.command import new_parser
from megatron_dwm.config.flags import add_dwm_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("script", metavar="SCRIPT", help="your training script")
    parser.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help="its flags")
    add_dwm_args(parser)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--"]:
        del words[0]
    if not words or words[0].startswith("-"):
        # Only here: the parser would remove `--` from the script's arguments.
        parser = new_parser("train", __doc__)
        add_arguments(parser)
        parser.parse_args(words)
        return 2
    from megatron_dwm import launch

    launch.main(words)
    return 0
