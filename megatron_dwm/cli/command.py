"""What all commands share: their parsers, errors, exit codes, and JSON for scripts."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable
from typing import Any

from megatron_dwm.errors import DWMError
from megatron_dwm.files.json_files import json_text

PROGRAM = "megatron-dwm"
# What a command needs beyond a training node: package -> the extra that installs it.
_EXTRAS = {
    "huggingface_hub": "convert",
    "matplotlib": "report",
    "tokenizers": "convert",
    "transformers": "convert",
}
# A shell's exit codes for a program ended by a signal: SIGINT, SIGPIPE.
_INTERRUPTED, _READER_GONE = 130, 141


def new_parser(name: str, text: str) -> argparse.ArgumentParser:
    """Returns the parser of a command.

    Args:
        name: Name of the command, after `megatron-dwm`.
        text: What `--help` says before the flags: what the command does, with an example.
    """
    return argparse.ArgumentParser(prog=f"{PROGRAM} {name}", **layout(text))


def layout(text: str) -> dict[str, Any]:
    """Returns the arguments for a parser whose help shows a text without re-wrapping it."""
    return {
        "description": text.strip(),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def completed(name: str, work: Callable[[], int | None], interrupted: str = "") -> int:
    """Runs a command's work and returns its exit code.

    An error that a user can fix becomes one line on standard error and code 2.

    Args:
        name: Name of the command.
        work: Does the work and returns an exit code; None stands for 0.
        interrupted: What to say about the files after Ctrl-C.
    """
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except (DWMError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return _READER_GONE
        say_error(name, str(error))
        return 2
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        say_error(
            name,
            f"needs the package {error.name}, which is not installed; "
            f"pip install 'megatron-dwm[{extra}]'",
        )
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {name}: interrupted{interrupted}", file=sys.stderr)
        return _INTERRUPTED


def _reader_has_gone() -> bool:
    """Returns whether standard output is a closed pipe, as after `| head`."""
    output = sys.stdout.fileno()
    pipes = select.poll()
    pipes.register(output, 0)
    if not any(event & select.POLLERR for _, event in pipes.poll(0)):
        return False
    # Buffered output must go somewhere when Python exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def say_error(name: str, message: str) -> None:
    """Prints the line that accompanies exit code 2."""
    print(f"{PROGRAM} {name}: error: {message}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Prints one JSON object on standard output; NaN and infinity, which JSON lacks, as null."""
    print(json_text(value), flush=True)
