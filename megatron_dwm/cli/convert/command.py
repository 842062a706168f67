"""Converts between Megatron checkpoints and Hugging Face folders, and checks both.

    megatron-dwm convert import --hf-path smollm2 --megatron-path start
    megatron-dwm convert export --megatron-path runs/dwm --hf-path model_hf
    megatron-dwm convert verify --megatron-path runs/dwm --hf-path model_hf
    megatron-dwm convert inspect runs/dwm --deep

Each runs in one process and needs no GPU; import and export hold one layer and one file's buffer
in memory, not the model. `megatron-dwm convert COMMAND --help` has the flags.
Exit code 0: done, 1: the answer is no (verify, inspect), 2: bad input.
"""

from __future__ import annotations

import argparse

from megatron_dwm.cli.command import completed, layout, new_parser
from megatron_dwm.cli.convert import export, export_dwm, import_model, inspect, verify

# Word -> the module with `add_arguments(parser)` and `run(**options)`, and what it is for.
SUBCOMMANDS = {
    "import": (import_model, "Hugging Face -> Megatron"),
    "export": (export, "Megatron -> Hugging Face"),
    "export-dwm": (export_dwm, "weighting model -> Hugging Face sequence classifier"),
    "verify": (verify, "same logits and loss on both sides?"),
    "inspect": (inspect, "which checkpoints of a run are intact"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands and their flags."""
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="what to do"
    )
    for name, (module, about) in SUBCOMMANDS.items():
        child = commands.add_parser(name, help=about, **layout(module.__doc__ or ""))
        module.add_arguments(child)
        child.set_defaults(run=module.run)


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code."""
    parser = new_parser("convert", __doc__ or "")
    add_arguments(parser)
    options = vars(parser.parse_args(argv))
    command, run = options.pop("command"), options.pop("run")
    return completed(f"convert {command}", lambda: run(**options))
