"""What `megatron-dwm plan` says of small runs is what these runs do, within 15%.

Ranks are spawned once; each case takes a stock step, a plain weighted step and meta steps by every
method that its layout allows (benchmarks/plan.py, which has more cases). FLOPs are those of torch's
counter over all ranks, bytes those handed to the process groups, memory the tensors alive in passes
C and D. The step's excess over the stock step is compared, so that nothing of the trainer's own is.

Not exercised here: Transformer Engine's layers, latent attention, context parallelism, and time
(benchmarks/cost.py).
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.functional.harness import ROOT, host_flags, torchrun

BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "plan.py"), run_name="benchmark")
# Tensor, pipeline and data parallel with both estimators; experts on one rank and over ranks.
CASES = ["tp2-pp2", "moe-pp2-dp2", "moe-ep2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not host_flags():
        pytest.skip("the plans are of runs on the CPU: here the trainer finds a GPU")
    folder = tmp_path_factory.mktemp("plan")
    script = str(ROOT / "benchmarks" / "plan.py")
    done = torchrun(BENCHMARK["RANKS"], [script], PLAN_CASES=" ".join(CASES), OUT=str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_plan_is_what_runs_do(folder: Path, name: str) -> None:
    rows = BENCHMARK["compared"](str(folder), name)
    kinds = {(step, what.split()[0]) for step, what, _, _ in rows}
    for method in BENCHMARK["CASES"][name][1]:
        assert {(method, "FLOPs"), (method, "bytes"), (method, "memory")} <= kinds
    for step, what, planned, measured in rows:
        limit = 0.0 if what == "parameters" else BENCHMARK["LIMIT"]
        assert BENCHMARK["off"](planned, measured) <= limit, (step, what, planned, measured)


@pytest.mark.parametrize("name", CASES)
def test_layers_are_those_that_megatron_builds(folder: Path, name: str) -> None:
    """By name and class, as the estimator is chosen by them."""
    ranks = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(4)]
    for rank in ranks:
        assert rank["layers"] == ranks[0]["planned_layers"][rank["stage"]]
