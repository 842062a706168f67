"""Writes the language model of a Megatron run as a folder for AutoModelForCausalLM.

    megatron-dwm convert export --megatron-path runs/dwm --hf-path model_hf

reads the torch_dist format of any parallel layout, and dense mp_rank_* folders (--ckpt-format
torch). The tokenizer is exported too, and OUT appears only when it is complete.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_dwm.cli.convert.dtypes import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's flags."""
    add = parser.add_argument
    add(
        "--megatron-path",
        required=True,
        metavar="RUN",
        help="run folder (its latest checkpoint is used) or one iter_ folder",
    )
    add("--hf-path", required=True, metavar="OUT", help="folder to write")
    add("--iteration", type=int, metavar="N", help="iteration to use from a run folder")
    add("--dtype", choices=DTYPES, help="dtype to write (default: the checkpoint's)")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="true vocabulary size; padded rows beyond it are dropped (default: the tokenizer's)",
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
    add("--force", action="store_true", help="replace a model that OUT already holds")


def run(**options: Any) -> None:
    """Exports; the options are `conversion.export`'s."""
    from megatron_dwm.conversion.export import export

    export(**options)
