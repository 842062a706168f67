"""Loss, gradient and influence at random layouts are those of one process in float64.

Eight cases by default; `make test-extended` takes 200. LAYOUTS=n and LAYOUT_SEED=n draw others.

What this does not exercise: context parallelism (Megatron's local attention has none), more than
four ranks, and 16-bit parameters.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import correlation, relative_error
from tests.distributed.layout_cases import Case, Setting, draw
from tests.functional.harness import ROOT, torchrun

COUNT = 200 if os.environ.get("MEGATRON_DWM_TEST_EXTENDED") == "1" else 8
CASES = draw(int(os.environ.get("LAYOUTS", COUNT)), int(os.environ.get("LAYOUT_SEED", "0")))


def spawn(ranks: int, cases: list[dict[str, Any]], folder: Path) -> None:
    """Takes the cases in one set of ranks; what came out is in the folder."""
    path = folder / f"cases-{cases[0]['role']}-{ranks}.json"
    path.write_text(json.dumps(cases))
    worker = ROOT / "tests" / "distributed" / "layout_worker.py"
    done = torchrun(ranks, [str(worker)], timeout=1500, CASES=str(path), OUT=str(folder))
    for case in cases:
        out = folder / f"{case['name']}.json"
        assert out.exists(), f"{case['name']}: nothing came out\n{done.stderr[-4000:]}"
        error = json.loads(out.read_text()).get("error")
        assert error is None, f"{case['name']}: {' '.join(case['args'])}\n{error}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    setting = Setting(folder)
    setting.save_starts(CASES)
    starts = {case.start: [c for c in CASES if c.start == case.start] for case in CASES}
    spawn(1, [setting.reference(cases) for cases in starts.values()], folder)
    for ranks, cases in itertools.groupby(sorted(CASES, key=_ranks), _ranks):
        spawn(ranks, [setting.layout(case) for case in cases], folder)
    return {case.name: json.loads((folder / f"{case.name}.json").read_text()) for case in CASES}


def _ranks(case: Case) -> int:
    return case.ranks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_is_one_process_in_float64(found: dict[str, Any], case: Case) -> None:
    out = found[case.name]
    expected = out["expected"]
    assert out["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert out["norm"] == pytest.approx(expected["norm"], rel=1e-6)
    assert out["gradient"] <= 1e-6
    assert out["worst"] <= 1e-5
    influence = case.deal(expected["influence"])
    for name, values in out["influence"].items():
        assert correlation(values, influence) >= 0.999, name
        # The comparison can fail: the influence of another sample is far off.
        assert relative_error([*values[1:], values[0]], influence) > 0.1
    # Adam divides by the root of what is nearly 0 for some, which takes a digit of float32.
    assert relative_error(out["influence"]["ghost"], influence) <= 1e-5
