"""Writes docs/recipes.md from what the recipes do: `python -m tests.recipes.table`.

All of them run, which takes some minutes. With names, only those run, and their lines are written.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.recipes.cutting import CAPS, PARALLEL, REPLACED, SIZES, Recipe, read_recipes
from tests.recipes.full_size import refused_at_full_size
from tests.recipes.harness import Outcome, run_recipes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
COLUMNS = [
    "recipe",
    "at full size, the default head is",
    "stock",
    "`--dwm-policy uniform`",
    "default head",
    "estimator",
    "replaced on the CPU",
]
HEAD = """<!-- nav: Reference 70 -->
# Recipes that people run

Public pre-training recipes of NVIDIA, with their flags as they stand, under weighted training.
Each was run at toy size on two CPU ranks through the launcher (`megatron-dwm train`), three times
over four steps: by the stock trainer, with uniform weights, and with the default head taking a
meta step in every step. The script is `examples/pretrain_dwm.py`, which stands in for the
`pretrain_gpt.py` and `pretrain_hybrid.py` of Megatron-LM, as the wheel has neither; data and meta
set are made up. `make test-recipes` runs all of them and fails where one does not do what stands
here; `python -m tests.recipes.table` makes this page. The flags are in
`tests/recipes/recipes.toml`, with their sources.

`bit-identical`: every reported loss, every gradient norm, the validation loss and the final
parameters of every rank are those of the stock run. *At full size*: what the flag checks say of
the recipe before anything is cut, `accepted` or the flags by which it is refused; uniform weights
are accepted with all of them. What stands under *replaced on the CPU* needs Transformer Engine,
its kernels or a GPU, and is not shown here: such a row has Megatron's local layers in the place
of Transformer Engine's.

"""


def page(recipes: list[Recipe], lines: dict[str, str]) -> str:
    """Returns the page, of each recipe's line of the table."""
    table = [HEAD + _row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    return "\n".join([*table, *(lines[r.name] for r in recipes), "", _rule()]) + "\n"


def row(recipe: Recipe, outcome: Outcome) -> str:
    """Returns a recipe's line of the table."""
    results = [outcome.stock, outcome.uniform, outcome.head, outcome.estimator]
    return _row([*first_cells(recipe), *(r.replace("|", "/") for r in results), _replaced(recipe)])


def first_cells(recipe: Recipe) -> list[str]:
    """Returns what needs no run: the recipe with its sources, and the checks at full size."""
    title = f"[{recipe.title}]({recipe.source})"
    if recipe.model is not None:
        title += f" ([sizes]({recipe.model}))"
    refused = refused_at_full_size(recipe.words())
    full = "accepted" if not refused else "refused: " + ", ".join(f"`{flag}`" for flag in refused)
    return [title, full]


def rows(text: str) -> dict[str, list[str]]:
    """Returns the table's cells by the recipe's title."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| [") and len(cells) == len(COLUMNS):
            found[cells[0].split("]")[0].removeprefix("[")] = cells
    return found


def _replaced(recipe: Recipe) -> str:
    return ", ".join(f"`{flag}`" for flag in recipe.replaced())


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule() -> str:
    """Returns what is done to every recipe, from the tables that do it."""
    sizes = ", ".join(f"`{name} {value}`" for name, value in SIZES.items())
    caps = ", ".join(f"`{name} {value}`" for name, value in CAPS.items())
    stand_ins = ", ".join(
        f"`{name}`" + (f" (by `{' '.join(value)}`)" if value else "")
        for name, value in REPLACED.items()
        if name != "--transformer-impl"
    )
    parallel = ", ".join(f"`{name}`" for name in PARALLEL)
    return f"""## How a recipe is cut

Sizes go, everything else stays; a flag that a recipe has not stays away. Sizes become {sizes}; at
most {caps}. What speaks of every layer (`--moe-layer-freq`, `--hybrid-layer-pattern`) keeps the
first layer of each kind. Parallel sizes ({parallel}) become two ranks of one dimension: expert
parallelism where the recipe has it, else pipeline stages, else tensor parallelism where it goes
without sequence parallelism, else data parallelism. Files, trackers, intervals and times at which
a job ends are left out.

The CPU host's own flags (`--transformer-impl local` and no fused kernels) come on top. Left out
or replaced, where a recipe has them: {stand_ins}. Plain torch stands in for Mamba's kernels, for
emerging-optimizers, on which Muon is built, and for the attention of latent heads, whose sizes the
local layers of Megatron 0.19 do not take (`tests/recipes/stand_ins.py`).

Not among them: Gemma, whose layers Megatron-Bridge builds from code of its own, not from flags."""


def main() -> None:
    """Runs what is asked for."""
    names, recipes = sys.argv[1:], read_recipes()
    wanted = [recipe for recipe in recipes if not names or recipe.name in names]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_recipes(wanted, Path(folder))
    lines = {recipe.name: row(recipe, outcomes[recipe.name]) for recipe in wanted}
    print("\n".join(lines.values()))
    if names:
        known = rows(PAGE.read_text())
        lines = {r.name: lines.get(r.name) or _row(known[r.title]) for r in recipes}
    PAGE.write_text(page(recipes, lines))


if __name__ == "__main__":
    main()
