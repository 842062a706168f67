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
# Public recipes

NVIDIA's public pre-training recipes, with their original flags, under weighted training. Each was
run at toy size on two CPU ranks through the launcher (`megatron-dwm train`), three times over four
steps: with the stock trainer, with uniform weights, and with the default head taking a meta step
in every step. The script is `examples/pretrain_dwm.py`, which replaces Megatron-LM's
`pretrain_gpt.py` and `pretrain_hybrid.py`, because the wheel has neither; data and meta set are
synthetic. `make test-recipes` runs all recipes and fails if one does not do what this page says;
`python -m tests.recipes.table` writes this page. The flags are in `tests/recipes/recipes.toml`,
with their sources.

`bit-identical`: every reported loss, every gradient norm, the validation loss and the final
parameters of every rank equal those of the stock run. *At full size*: the result of the flag
checks on the original recipe, `accepted` or the flags for which it is refused; uniform weights are
accepted with all recipes. Flags under *replaced on the CPU* need Transformer Engine, its kernels
or a GPU, and are not tested here: such a row uses Megatron's local layers instead of Transformer
Engine's.

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

Only sizes change, and no flag is added that a recipe does not have. Sizes become {sizes}; at
most {caps}. Per-layer patterns (`--moe-layer-freq`, `--hybrid-layer-pattern`) keep the
first layer of each kind. Parallel sizes ({parallel}) become two ranks of one dimension: expert
parallelism if the recipe has it, else pipeline stages, else tensor parallelism if it works
without sequence parallelism, else data parallelism. Files, trackers, intervals and job time limits
are left out.

The CPU host's own flags (`--transformer-impl local` and no fused kernels) are added. Left out
or replaced, if a recipe has them: {stand_ins}. Plain torch replaces Mamba's kernels,
emerging-optimizers, on which Muon is built, and multi-latent attention, whose sizes the local
layers of Megatron 0.19 do not support (`tests/recipes/stand_ins.py`).

Not included: Gemma, whose layers Megatron-Bridge builds from its own code, not from flags."""


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
