"""The tutorials run, as the site shows them, and what their text says of the result is so.

All of them by `tools/docs/tutorials.py`, which forks a process for each from one that has imported
the trainer. Not exercised: a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.harness import ROOT, environment
from tests.processor_time import processor_time_of_children
from tools.docs import tutorials

pytestmark = pytest.mark.extended

NAMES = [tutorial.name for tutorial in tutorials.found()]
# Of a processor, for all of them: a minute where nobody else computes.
SECONDS = 120


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tutorials")
    words = [sys.executable, "-W", "ignore", "tools/docs/tutorials.py", "--out", str(folder)]
    before = processor_time_of_children()
    done = subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert processor_time_of_children() - before < SECONDS
    return folder


def printed(out: Path, name: str) -> str:
    return "\n".join(json.loads((out / f"{name}.json").read_text())["printed"])


def test_there_are_three() -> None:
    assert NAMES == ["first_weighted_run", "learn_small_apply_large", "your_own_policy"]


@pytest.mark.parametrize("name", NAMES)
def test_it_ends_in_a_picture_that_its_page_shows(out: Path, name: str) -> None:
    picture = (out / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10000
    page = tutorials.page(tutorials.Tutorial(tutorials.FOLDER / f"{name}.py"), out)
    assert page.count("\n# ") == 1 and f"]({name}.png)" in page
    assert "noqa" not in page and page.count("```") % 2 == 0


def numbers(text: str, before: str) -> list[float]:
    """Returns the numbers that follow on a text, each up to a comma, a bracket or a space."""

    return [float(n) for n in re.findall(re.escape(before) + r"\s*(-?[\d.]+\d)", text)]


def test_noise_loses_its_weight_and_the_loss_falls(out: Path) -> None:
    text = printed(out, "first_weighted_run")
    good, noise = (numbers(text, f" {name}") for name in ("good", "noise"))
    assert good[0] == noise[0] == 1
    assert noise[-1] < 0.8 and 1.1 < good[-1]
    stock, weighted = numbers(text, "validation loss")
    assert weighted < stock - 0.02


def test_what_a_small_run_has_learned_serves_a_large_one(out: Path) -> None:
    text = printed(out, "learn_small_apply_large")
    stock, drawn = numbers(text, "validation loss")
    assert drawn < stock - 0.02


def test_a_policy_of_one_s_own_finds_that_high_loss_harms(out: Path) -> None:
    text = printed(out, "your_own_policy")
    slope, good, noise = (numbers(text, name)[-1] for name in ("slope", " good", " noise"))
    assert slope < 0 and noise < 1 < good
