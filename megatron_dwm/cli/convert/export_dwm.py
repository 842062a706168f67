"""Writes the data weighting model (DWM) of a run as a Hugging Face sequence classifier.

    megatron-dwm convert export-dwm --megatron-path runs/dwm --hf-path dwm_hf

OUT is a folder for AutoModelForSequenceClassification, so that

    pipeline("text-classification", model=OUT, function_to_apply="none")

returns the score that training used for the same tokens. Training saw windows of a packed corpus,
with end-of-document tokens between documents; the pipeline sees only the text's own tokens. For
mean pooling (the default in training) transformers has no class: a module is written beside the
weights, and the pipeline needs trust_remote_code=True.
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
        help="run folder (its latest checkpoint is used), one iter_ folder or one dwm_stage_ "
        "snapshot",
    )
    add("--hf-path", required=True, metavar="OUT", help="folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--iteration", type=int, metavar="N", help="iteration to use from a run folder"
    )
    which.add_argument(
        "--all-stages",
        action="store_true",
        help="write every dwm_stage_ snapshot of the run, to OUT/dwm_stage_*",
    )
    add("--dtype", choices=DTYPES, help="dtype to write (default: the checkpoint's)")
    add(
        "--tokenizer-model",
        metavar="FILE",
        help="SentencePiece model or Hugging Face tokenizer folder (default: the one that the "
        "checkpoint names); 'none' exports without a tokenizer",
    )
    add("--force", action="store_true", help="replace a model that OUT already holds")


def run(**options: Any) -> None:
    """Exports; the options are `conversion.export_dwm`'s."""
    from megatron_dwm.conversion.export_dwm import export_dwm

    export_dwm(**options)
