"""Runs that are taken whole and again from a checkpoint on the way, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dwm.logs.log_file import CLOCK_FIGURES, FILE_NAME, read_log
from tests.functional.harness import TINY, Run

DP2 = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --lr 1e-2"


def words_on(folder: Path, train: list[str], valid: str) -> list[str]:
    """Returns the flags of tiny runs on data sets that have equal shares, saved as `torch_dist`.

    Args:
        folder: of the cache.
        train: prefixes of the training data.
        valid: prefix of the validation data.
    """
    at = TINY.index("--split")
    blend = [word for prefix in train for word in ("0.5", prefix)]
    return [
        *(*TINY[:at], *TINY[at + 2 :], "--ckpt-format", "torch_dist"),
        *("--train-data-path", *blend, "--valid-data-path", valid),
        *("--data-cache-path", str(folder / "cache")),
    ]


def whole_and_resumed(
    name: str, words: list[str], folder: Path, stop: int, stopped: bool = False
) -> list[Run]:
    """Returns a run `NAME-whole`, and `NAME-second` that goes on from its checkpoint at `stop`.

    Args:
        name: of the runs; they save to `NAME-whole` and `NAME-parts`.
        words: their flags, with `--save-interval STOP`.
        folder: where they save.
        stop: step.
        stopped: instead, a run `NAME-first` ends there, and the second goes on in its folder.
    """
    whole, parts = (str(folder / f"{name}-{part}") for part in ("whole", "parts"))
    runs = [Run(f"{name}-whole", [*words, "--save", whole])]
    source = ["--load", whole, "--ckpt-step", str(stop)]
    if stopped:
        end = ["--exit-interval", str(stop)]
        runs.append(Run(f"{name}-first", [*words, "--save", parts, *end]))
        source = ["--load", parts]
    return [*runs, Run(f"{name}-second", [*words, "--save", parts, *source])]


def log_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the step log without what depends on the clock."""
    lines = read_log(str(folder / name / FILE_NAME))
    return [{k: v for k, v in line.items() if k not in CLOCK_FIGURES} for line in lines]
