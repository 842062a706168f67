"""The meta-gradient of real runs with Muon, plain and with whole parameters spread over ranks.

As test_meta_gradient.py: what the product's passes find for every sample of a step, against a
backward pass per sample (v from the product's passes) and against a weight that is really changed.
Muon is Megatron's, on a stand-in for emerging-optimizers; embeddings, norms and the output layer
have Adam beside it. In bf16 a changed weight is lost in the rounding of parameters, so there brute
force is left out.

Not exercised here: emerging-optimizers itself, tensor parallelism, and buffers that are laid out by
parameters (`--use-distributed-optimizer` with Megatron's own layout).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import arguments, correlation, relative_error, take_apart

MUON = (
    "--muon-momentum 0.9 --muon-nesterov --muon-scale-mode spectral --lr 2e-3 --num-layers 2 "
    "--hidden-size 32 --ffn-hidden-size 64 --global-batch-size 4 --dwm-meta-batch-size 4"
)
SPREAD = f"{MUON} --optimizer dist_muon --bf16"
CASES = {
    "plain": (1, f"{MUON} --optimizer muon --clip-grad 0"),
    "clipped": (1, f"{MUON} --optimizer muon --clip-grad 0.3"),
    "copies": (2, f"{MUON} --optimizer muon --clip-grad 0.3"),
    "stages": (2, f"{MUON} --optimizer muon --clip-grad 0.3 --pipeline-model-parallel-size 2"),
    "spread": (2, f"{SPREAD} --clip-grad 0.3"),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, found = tmp_path_factory.mktemp("muon"), {}
    for ranks in (1, 2):
        cases: list[dict[str, Any]] = []
        for name, (size, flags) in CASES.items():
            if size == ranks:
                case = {"name": name, "args": arguments(flags), "allow": "muon", "reference": True}
                case["estimators"] = ["ghost", "finite_difference"]
                cases.append(case if "--bf16" in flags else {**case, "brute": 0.25})
        if ranks == 2:
            broken = {"name": "broken", "args": arguments(SPREAD), "allow": "muon"}
            case = {**broken, "break": "owners-not-summed", "reference": True}
            cases.append({**case, "estimators": ["ghost"]})
        found.update(take_apart(ranks, cases, folder))
    return found


@pytest.mark.parametrize("name", CASES)
def test_estimators_are_the_backward_pass_of_each_sample(out: dict[str, Any], name: str) -> None:
    found, exact = out[name], "--bf16" not in CASES[name][1]
    assert relative_error(found["c"]["ghost"], found["reference"]) < (1e-6 if exact else 1e-2)
    limit = 2e-2 if exact else 0.3
    assert relative_error(found["c"]["finite_difference"], found["reference"]) < limit


@pytest.mark.parametrize("name", [name for name in CASES if name != "spread"])
def test_influence_is_what_a_changed_weight_does(out: dict[str, Any], name: str) -> None:
    found = out[name]
    assert correlation(found["c"]["ghost"], found["brute"]) > 0.99
    assert relative_error(found["c"]["ghost"], found["brute"]) < 0.1


def test_a_sum_over_owners_that_is_left_out_is_noticed(out: dict[str, Any]) -> None:
    """What it sums is not in the other ranks' buffers already."""
    broken = out["broken"]
    assert relative_error(broken["c"]["ghost"], broken["reference"]) > 0.1
