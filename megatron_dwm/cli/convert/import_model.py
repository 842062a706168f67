"""Writes a Hugging Face model as a checkpoint that the stock trainer loads with --load.

    megatron-dwm convert import --hf-path smollm2 --megatron-path start

The checkpoint is torch_dist without an optimizer, for any tensor-, pipeline- and expert-parallel
size. The command prints the trainer's flags that build the model (also kept in
OUT/trainer_flags.txt).
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_dwm.cli.convert.dtypes import DTYPES

# The factor that Megatron's own builders use, whatever the flag says.
BUILT_IN_ROPE_FACTOR = 8.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's flags."""
    add = parser.add_argument
    add("--hf-path", required=True, metavar="DIR", help="folder with config.json and safetensors")
    add("--megatron-path", required=True, metavar="OUT", help="folder to write, for --load OUT")
    add("--dtype", choices=DTYPES, help="dtype to write (default: the folder's)")
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="as in the run that will load it (default: 128, like Megatron's)",
    )
    add(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="size for which the vocabulary is padded; other sizes can load it too (default: 1)",
    )
    add(
        "--rope-scaling-factor",
        type=float,
        metavar="F",
        help="allow a model with Llama 3's RoPE scaling of this factor, which your own model "
        f"builder must set: the stock one uses {BUILT_IN_ROPE_FACTOR:g} whatever its flag says",
    )
    add("--force", action="store_true", help="replace an import that OUT already holds")


def run(**options: Any) -> None:
    """Imports; the options are `conversion.import_model`'s."""
    from megatron_dwm.conversion.import_model import import_model

    import_model(**options)
