"""Compares the meta-gradient of a saved run with brute force at its next step.

    megatron-dwm probe --checkpoint runs/dwm --samples 8

starts the run again from its own saved command line, without writing anything into its folder: the
weights of a few samples are actually changed, and the effect on the meta loss is compared with the
estimate. For a run that needs several processes:

    torchrun --nproc-per-node 2 -m megatron_dwm probe --checkpoint runs/dwm

Arguments after `--` are further flags for the run's script, after the saved ones.
Exit code 0: confirmed; 1: not confirmed; 2: no comparison, and one line says why; torchrun exits
with 1 for both.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from typing import TYPE_CHECKING

from megatron_dwm.cli.command import completed, new_parser
from megatron_dwm.errors import DWMError

if TYPE_CHECKING:
    from megatron_dwm.hosts.megatron_lm.probe_command import Request

STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN", help="the run's --save folder")
    add(
        "--iteration",
        type=int,
        metavar="N",
        help="iteration of the checkpoint; default: the last one",
    )
    add("--samples", type=int, default=8, metavar="N", help="samples that are compared (8)")
    add(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="print one JSON object and nothing else; with FILE, write it there beside the text",
    )
    add("--script", metavar="FILE", help="the training script, if the saved one has moved")


def parse(argv: list[str]) -> Request:
    """Reads the command line.

    Raises:
        DWMError: there is no such checkpoint, or the JSON file cannot be written.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    parser = new_parser("probe", __doc__)
    parser.allow_abbrev = False
    add_arguments(parser)
    given = parser.parse_args(argv[:at])
    if given.samples < 3:
        raise DWMError(f"--samples {given.samples}; a correlation needs 3 or more")
    run, iteration = _checkpoint(os.path.abspath(given.checkpoint), given.iteration)
    path = _json_path(given.json, run)
    from megatron_dwm.hosts import cpu

    try:
        # Before Megatron is imported.
        cpu.install()
    except (RuntimeError, ValueError) as error:
        raise DWMError(str(error)) from None
    from megatron_dwm.hosts.megatron_lm.probe_command import Request

    return Request(
        run=run,
        iteration=iteration,
        samples=given.samples,
        json=path,
        script=None if given.script is None else os.path.abspath(given.script),
        flags=argv[at + 1 :],
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    code = compared(sys.argv[1:] if argv is None else argv)
    if code < 2:
        import torch

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return code


def compared(words: list[str]) -> int:
    """Does the comparison; leaves the process group as it is."""
    return completed("probe", lambda: _probe(words))


def _probe(words: list[str]) -> int:
    try:
        request = parse(words)
    except DWMError:
        # All ranks see the same error.
        if os.environ.get("RANK", "0") == "0":
            raise
        return 2
    from megatron_dwm.hosts.megatron_lm.probe_command import probe

    return probe(request)


def _checkpoint(path: str, iteration: int | None) -> tuple[str, int]:
    """Returns the run's folder and the iteration, given a run or one of its checkpoints."""
    if not os.path.isdir(path):
        raise DWMError(f"--checkpoint {path}: no such folder")
    named = re.fullmatch(r"iter_(\d+)", os.path.basename(path))
    if named is not None and iteration is None:
        return os.path.dirname(path), int(named[1])
    found = sorted(
        int(m[1]) for m in map(re.compile(r"iter_(\d+)").fullmatch, os.listdir(path)) if m
    )
    if not found:
        raise DWMError(f"--checkpoint {path} holds no checkpoint (iter_*); give a run's --save")
    if iteration is not None and iteration not in found:
        shown = ", ".join(str(i) for i in found)
        raise DWMError(f"--iteration {iteration} is not in {path}; it holds {shown}")
    if iteration is not None:
        return path, iteration
    tracker = os.path.join(path, "latest_checkpointed_iteration.txt")
    with contextlib.suppress(OSError, ValueError), open(tracker) as file:
        latest = int(file.read())
        if latest in found:
            return path, latest
    return path, found[-1]


def _json_path(path: str | None, run: str) -> str | None:
    if path in (None, STDOUT):
        return path
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise DWMError(f"--json {path}: no such folder")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise DWMError(f"--json {path} cannot be written")
    if os.path.commonpath([os.path.realpath(run), os.path.realpath(folder)]) == os.path.realpath(
        run
    ):
        raise DWMError(f"--json {path} lies in the run, which is left as it is; choose another")
    return path
