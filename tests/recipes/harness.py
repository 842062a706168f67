"""Runs recipes on two CPU ranks, and says of each what came out."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tests.functional.harness import ROOT, Results, host_flags, torchrun
from tests.recipes.cutting import STEPS, Recipe

RANKS = 2
RUNS, SAME = "runs", "bit-identical"


@dataclass
class Outcome:
    """What came out of a recipe's small runs; a text is `runs`, or why not.

    Attributes:
        stock: the stock trainer.
        uniform: weights of 1; `bit-identical` to stock.
        head: the default head.
        estimator: which one the head took.
    """

    stock: str
    uniform: str
    head: str
    estimator: str


def run_recipes(recipes: list[Recipe], folder: Path, timeout: int = 3600) -> dict[str, Outcome]:
    """Runs each recipe three times, all in one set of ranks; returns what came out, by name."""
    flags = host_flags()
    with open(folder / "recipes.json", "w") as file:
        json.dump([{"name": r.name, "args": [*r.small(), *flags]} for r in recipes], file)
    done = torchrun(
        RANKS,
        [str(ROOT / "tests" / "recipes" / "run_recipes.py")],
        timeout=timeout,
        RUNS=str(folder / "recipes.json"),
        OUT=str(folder),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = Results(folder, RANKS)
    return {recipe.name: _outcome(recipe.name, results) for recipe in recipes}


def _outcome(name: str, results: Results) -> Outcome:
    runs = {kind: results[f"{name}-{kind}"] for kind in ("stock", "uniform", "head")}
    texts = {kind: _text(ranks) for kind, ranks in runs.items()}
    if texts["stock"] == texts["uniform"] == RUNS:
        same = all(
            a[what] == b[what]
            for a, b in zip(runs["stock"], runs["uniform"], strict=True)
            for what in ("steps", "valid", "parameters")
        )
        texts["uniform"] = SAME if same else "differs from stock"
    said = [
        line
        for rank in runs["head"]
        for line in rank["stdout"].splitlines()
        if line.startswith("DWM: estimator ")
    ]
    estimator = re.split(r"[ :]+", said[0])[2] if said else ""
    return Outcome(**texts, estimator=estimator)


def _text(ranks: list[dict]) -> str:
    """Returns `runs`, or the last line of the rank that says most about why not."""
    for rank in ranks:
        if rank["code"] != 0:
            lines = [line for line in rank["stderr"].splitlines() if line.strip()]
            ours = [line for line in lines if line.startswith("megatron_dwm: error: ")]
            if ours:
                return f"refused: {ours[0].removeprefix('megatron_dwm: error: ')}"
            if rank is ranks[-1]:
                return (lines or ["ended without a word"])[-1].strip()
    if len(ranks[-1]["steps"]) < STEPS:
        return f"took {len(ranks[-1]['steps'])} steps"
    return RUNS
