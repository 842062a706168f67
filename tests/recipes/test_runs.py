"""Public recipes at toy size through the launcher: stock, with uniform weights, with the head.

docs/recipes.md says what each does, and this is what it is held to. `make test` runs those of
`SOME`, between them pipeline stages with virtual ones, experts over ranks, latent attention,
multi-token prediction, expert bias and a Mamba hybrid; `make test-recipes` runs all.

Not exercised here: what the page lists as replaced on the CPU.
"""

from __future__ import annotations

import os

import pytest

from tests.recipes.cutting import Recipe, read_recipes
from tests.recipes.harness import RUNS, SAME, Outcome, run_recipes
from tests.recipes.table import PAGE, rows

SOME = ("llama3-70b", "deepseek-v3", "nemotron-3-nano")
ALL = os.environ.get("RECIPES") == "all"
RECIPES = [recipe for recipe in read_recipes() if ALL or recipe.name in SOME]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_recipes(RECIPES, tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_recipe_does_what_the_page_says(outcomes: dict[str, Outcome], recipe: Recipe) -> None:
    found = outcomes[recipe.name]
    written = rows(PAGE.read_text())[recipe.title]
    assert [found.stock, found.uniform, found.head, found.estimator] == written[2:6]
    assert found.stock == RUNS and found.uniform == SAME
