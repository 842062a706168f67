"""Entry point of `megatron-dwm` and of `python -m megatron_dwm`."""

from __future__ import annotations

import difflib
import sys

from megatron_dwm.cli.command import PROGRAM
from megatron_dwm.cli.table import COMMANDS

_AFTER = """
A run from text to report:
  megatron-dwm tokenizer --input text/*.jsonl --out tokenizer --vocab-size 32000
  megatron-dwm preprocess --input text/*.jsonl --output-prefix data/web --append-eod \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model
  megatron-dwm train pretrain_gpt.py YOUR FLAGS --data-path data/web_text_document \\
      --save runs/dwm --dwm --dwm-meta-data-path data/meta_text_document
  megatron-dwm report --run runs/dwm

`megatron-dwm COMMAND --help` shows a command's flags and examples. To use several processes, start
`train`, `probe` and `score` as `torchrun --nproc-per-node N -m megatron_dwm COMMAND ...`. Exit
codes: 0 done; 1 the answer is no (verify, probe, damage found); 2 bad input or usage, with one line
on standard error."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words:
        print(overview(), file=sys.stderr)
        return 2
    word, *rest = words
    if word in ("-h", "--help", "help"):
        print(overview())
        return 0
    if word in ("-V", "--version"):
        from megatron_dwm import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    for command in COMMANDS:
        if command.name == word:
            return command.module().main(rest)
    names = [command.name for command in COMMANDS]
    near = difflib.get_close_matches(word, names, 1)
    advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
    print(f"{PROGRAM}: error: {word}: no such command; {advice}", file=sys.stderr)
    return 2


def overview() -> str:
    """Returns the text of `megatron-dwm --help`."""
    lines = [
        f"usage: {PROGRAM} [-h] [--version] COMMAND ...",
        "",
        "Learned data weighting for language model pre-training with NVIDIA Megatron.",
        "",
        "commands:",
        *(f"  {command.name:<12}{command.about}" for command in COMMANDS),
    ]
    return "\n".join(lines) + "\n" + _AFTER
