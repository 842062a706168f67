"""The table of commands. A command's module is imported only when it is called."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command of `megatron-dwm`.

    Attributes:
        name: Word after `megatron-dwm`.
        home: Its module, which has `__doc__` (the text of `--help`), `add_arguments(parser)` and
            `main(argv) -> exit code`.
        about: What it does, in a few words.
    """

    name: str
    home: str
    about: str

    def module(self) -> Any:
        """Imports the command's module."""
        return importlib.import_module(f"megatron_dwm.cli.{self.home}")


COMMANDS = (
    Command("tokenizer", "tokenizer", "train a SentencePiece tokenizer on your text"),
    Command("preprocess", "preprocess", "text to Megatron's indexed data sets (.bin, .idx)"),
    Command("dsir", "dsir", "weigh and select documents by their similarity to a target text"),
    Command("inspect", "inspect", "check a data set and print its contents"),
    Command("train", "train", "run your Megatron script with the weighting attached"),
    Command("plan", "plan", "what weighting will cost a run, before you start it"),
    Command(
        "report", "report", "tables and plots of what a run preferred, and comparisons of runs"
    ),
    Command("probe", "probe", "is the meta-gradient of a saved run right? (brute force)"),
    Command("score", "score", "score every document of a corpus, as a weight file"),
    Command("weights", "weights", "make, combine and show weight files"),
    Command("convert", "convert.command", "Megatron <-> Hugging Face: models, weighting models"),
    Command("completion", "completion", "print a shell's completion script"),
)
