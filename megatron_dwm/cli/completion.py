"""Prints the completion script of a shell: commands, flags, choices and file names.

    megatron-dwm completion bash > ~/.local/share/bash-completion/completions/megatron-dwm
    megatron-dwm completion zsh > "${fpath[1]}/_megatron-dwm"

or, for the current shell only: eval "$(megatron-dwm completion bash)". The script completes without
starting Python; generate it again after an upgrade.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_dwm.cli.command import PROGRAM, completed, layout, new_parser
from megatron_dwm.cli.table import COMMANDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("shell", choices=["bash", "zsh"], help="which shell")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = new_parser("completion", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return completed("completion", lambda: print(script(args.shell)))


def script(shell: str) -> str:
    """Returns a shell's completion script."""
    import shtab

    parser = whole_parser()
    _complete_files(parser, shtab.FILE)
    return shtab.complete(parser, shell)


def whole_parser() -> argparse.ArgumentParser:
    """Returns the parser of the program with all its commands."""
    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command")
    for command in COMMANDS:
        module = command.module()
        child = commands.add_parser(command.name, help=command.about, **layout(module.__doc__))
        module.add_arguments(child)
    return parser


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Lets words, and flags that take any text, complete to file names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in set(action.choices.values()):
                _complete_files(child, files)
        elif action.nargs != 0 and action.type is None and not action.choices:
            action.complete = files  # type: ignore[attr-defined]
