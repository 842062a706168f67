r"""Compares a Megatron checkpoint with a Hugging Face folder by running the same tokens.

    megatron-dwm convert verify --megatron-path runs/dwm --hf-path model_hf \
        --data data/web_text_document

Both run in float32, and the logits are compared position by position. Megatron's model is built in
this process from the checkpoint's own arguments (for an import, from the flags that the import
printed). The relative difference at a position is the largest absolute difference divided by the
largest logit there, or by 1 if all are smaller. With --data the language-model loss is compared as
well. Both models are in memory at the same time.
Exit code 0: the largest relative difference is within --tolerance; 1: it is not; 2: bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dwm.cli.command import print_json
from megatron_dwm.errors import ConversionError
from megatron_dwm.files.streams import output_to_stderr
from megatron_dwm.progress import working

if TYPE_CHECKING:
    from megatron_dwm.cli.convert.logit_comparison import Comparison

_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's flags."""
    add = parser.add_argument
    add(
        "--megatron-path",
        required=True,
        metavar="RUN",
        help="run folder (its latest checkpoint is used) or one iter_ folder",
    )
    add("--hf-path", required=True, metavar="DIR", help="Hugging Face folder")
    add("--iteration", type=int, metavar="N", help="iteration to use from a run folder")
    add(
        "--data",
        metavar="PREFIX",
        help="indexed data set whose first tokens are used (default: random tokens, and no loss)",
    )
    add("--tolerance", type=float, default=1e-4, metavar="T", help="largest difference (1e-4)")
    add("--tokens", type=int, default=512, metavar="N", help="tokens to run (512)")
    add("--json", dest="as_json", action="store_true", help="print one JSON object")


def run(
    megatron_path: str,
    hf_path: str,
    iteration: int | None = None,
    data: str | None = None,
    tolerance: float = 1e-4,
    tokens: int = 512,
    as_json: bool = False,
) -> int:
    """Compares both sides; the arguments are the command line's.

    Returns:
        0: they agree; 1: they do not.

    Raises:
        DWMError: Bad input.
    """
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ConversionError(f"--tolerance is {tolerance:g}; give a number above 0.")
    if tokens < 2:
        raise ConversionError(f"--tokens is {tokens}; give 2 or more.")
    from megatron_dwm.cli.convert.logit_comparison import compare
    from megatron_dwm.conversion.dist_checkpoint import find_checkpoint

    # Megatron's own output is not part of the result.
    quiet = output_to_stderr() if as_json else contextlib.nullcontext()
    with quiet, working("comparing"):
        found = compare(find_checkpoint(megatron_path, iteration), Path(hf_path), data, tokens)
    worst = found.worst()
    agree = worst <= tolerance
    if as_json:
        print_json(figures(found, tolerance, agree))
        return 0 if agree else 1
    print("\n".join(table(found)))
    verdict = "agree" if agree else "DO NOT AGREE"
    print(f"largest relative difference {worst:.2e}, tolerance {tolerance:g}: the two {verdict}")
    return 0 if agree else 1


def figures(found: Comparison, tolerance: float, agree: bool) -> dict[str, Any]:
    """Returns what `--json` prints."""
    names = ("megatron", "transformers", "megatron_with_padded_vocabulary")
    losses = None if found.losses is None else dict(zip(names, found.losses, strict=True))
    return {
        "agree": agree,
        "tolerance": tolerance,
        "largest_relative_difference": found.worst(),
        "loss": losses,
        "absolute_difference_by_position": found.absolute.tolist(),
        "relative_difference_by_position": found.relative.tolist(),
    }


def table(found: Comparison) -> list[str]:
    """Returns the lines to print: the largest differences by position, and the losses."""
    length = len(found.absolute)
    step = math.ceil(length / _ROWS)
    lines = [f"{'positions':>12} {'max abs':>10} {'max rel':>10}"]
    for first in range(0, length, step):
        last = min(first + step, length)
        worst = [float(v[first:last].max()) for v in (found.absolute, found.relative)]
        lines.append(f"{f'{first}-{last - 1}':>12} {worst[0]:10.2e} {worst[1]:10.2e}")
    overall = float(found.absolute.max()), float(found.relative.max())
    lines.append(f"{'all':>12} {overall[0]:10.2e} {overall[1]:10.2e}")
    if found.losses is not None:
        ours, theirs, trained = found.losses
        lines.append(
            f"loss: Megatron {ours:.6f}, transformers {theirs:.6f}; Megatron's own, with padded "
            f"rows of the vocabulary: {trained:.6f}"
        )
    return lines
