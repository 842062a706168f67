"""docs/recipes.md says what the recipes and the checks say; no rank is started.

What it says of the runs is looked at in test_runs.py.
"""

from __future__ import annotations

import pytest

from tests.recipes.cutting import Recipe, read_recipes
from tests.recipes.harness import Outcome
from tests.recipes.table import PAGE, page, row, rows

RECIPES = read_recipes()
NOTHING = Outcome("", "", "", "")


def test_it_is_of_these_recipes_columns_and_rules() -> None:
    """All but the cells of the runs is what the script would write."""
    written = PAGE.read_text().splitlines()
    expected = page(RECIPES, {r.name: row(r, NOTHING) for r in RECIPES}).splitlines()

    def without_rows(lines: list[str]) -> list[str]:
        return [line for line in lines if not line.startswith("| [")]

    assert without_rows(written) == without_rows(expected)
    assert list(rows("\n".join(written))) == [r.title for r in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_what_needs_no_run_is_up_to_date(recipe: Recipe) -> None:
    written = rows(PAGE.read_text())[recipe.title]
    (expected,) = rows(row(recipe, NOTHING)).values()
    assert [*written[:2], written[-1]] == [*expected[:2], expected[-1]]


def test_a_recipe_is_cut_in_sizes_alone() -> None:
    """What is no size, no lack of the CPU and no file is handed on word for word."""
    (recipe,) = (r for r in RECIPES if r.name == "mixtral-8x7b")
    small = recipe.small()
    for words in ("--moe-aux-loss-coeff 1e-2", "--rotary-base 1000000", "--overlap-param-gather"):
        assert words in " ".join(small)
    assert "--expert-model-parallel-size 2" in " ".join(small)
    assert "--pipeline-model-parallel-size" not in small
    assert "--moe-grouped-gemm" not in small and "--moe-grouped-gemm" in recipe.replaced()


def test_each_has_a_source() -> None:
    assert len(RECIPES) >= 20
    assert len({r.title for r in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        assert recipe.source.startswith("https://github.com/")
