"""Losses of multi-token prediction (`--mtp-num-layers`) in weights and influence, on real runs.

They never pass through the loss function: the model attaches them in its forward pass. Under
`--dwm-mtp weighted` the trainer differentiates

    sum_i w_i (l_i + m_i) / micro-batches / data-parallel size

with m_i the sample's share of them, under `plain` the m_i have no w_i. The meta loss is of next
tokens alone in both. Of every sample of a step (see test_meta_gradient.py): what the product's
passes find by both estimators, a backward pass per sample, and brute force, in which the
trainer's step is taken again with a changed weight. Brute force is what tells `weighted` from
`plain`: a weight that missed the m_i would change the meta loss by less than the estimate says.

Not exercised here: GPUs, Transformer Engine, experts in the extra layers (tests/recipes has them).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import arguments, correlation, relative_error, take_apart

# Of brute force with a weight changed by 0.25 up and down: its own third-order term, which AdamW's
# first steps make large.
BRUTE_ERROR = 0.1
BOTH = ["ghost", "finite_difference"]
# Loud enough that leaving the losses out, or weighing them by mistake, shows in every figure.
MTP = (
    "--mtp-num-layers 2 --mtp-loss-scaling-factor 1.0 --num-layers 2 --clip-grad 0.3 "
    "--hidden-size 32 --ffn-hidden-size 64 --global-batch-size 4 --dwm-meta-batch-size 4"
)
PP2 = "--pipeline-model-parallel-size 2"
TIED = "--position-embedding-type rope"  # the trainer refuses learned positions here
# An element that only one sample reaches takes AdamW's first step by its sign, which under `plain`
# flips where the sample's two gradients cancel: no derivative tells. SGD has one everywhere.
SGD = "--optimizer sgd --sgd-momentum 0.9 --lr 0.1"
CASES = {
    "weighted": (1, "", "llama"),
    "weighted-sgd": (1, SGD, "llama"),
    "plain": (1, f"{SGD} --dwm-mtp plain", "llama"),
    "tied": (1, TIED, "gpt"),
    "per-token-recomputed": (
        1,
        "--calculate-per-token-loss --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
        "llama",
    ),
    "stages": (2, f"{PP2} --calculate-per-token-loss", "llama"),
    "stages-tied": (2, f"{PP2} {TIED}", "gpt"),
    "tensor-parallel": (2, "--tensor-model-parallel-size 2", "llama"),
    "distributed": (2, "--use-distributed-optimizer", "llama"),
}


# Those that show the whole chain.
BRUTE = ("weighted", "weighted-sgd", "plain", "per-token-recomputed", "stages")


def cases(ranks: int) -> list[dict[str, Any]]:
    common: dict[str, Any] = {"estimators": BOTH, "reference": True}
    found = [
        {
            "name": name,
            "args": arguments(f"{MTP} {flags}", model),
            **common,
            **({"brute": 0.25, "update": True} if name in BRUTE else {}),
        }
        for name, (size, flags, model) in CASES.items()
        if size == ranks
    ]
    if ranks == 1:
        flags = f"{MTP} --dwm-lookahead current --optimizer sgd --lr 0.1 --clip-grad 0"
        found.append(
            {
                "name": "current",
                "args": arguments(flags),
                "estimators": ["ghost"],
                "reference": True,
            }
        )
        broken = {"name": "broken", "args": arguments(MTP), "estimators": ["ghost"]}
        found.append({**broken, "break_all": "further-losses-unheard", "brute": 0.25})
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mtp")
    return {
        name: found
        for ranks in (1, 2)
        for name, found in take_apart(ranks, cases(ranks), folder).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_estimators_are_the_backward_pass_of_each_sample(out: dict[str, Any], name: str) -> None:
    found = out[name]
    assert relative_error(found["c"]["ghost"], found["reference"]) < 1e-6
    assert relative_error(found["c"]["finite_difference"], found["reference"]) < 5e-3


@pytest.mark.parametrize("name", BRUTE)
def test_influence_is_what_a_changed_weight_does(out: dict[str, Any], name: str) -> None:
    found = out[name]
    assert relative_error(found["c"]["ghost"], found["brute"]) < BRUTE_ERROR
    assert correlation(found["c"]["ghost"], found["brute"]) > 0.999


@pytest.mark.parametrize("name", BRUTE)
def test_a_meta_step_leaves_the_model_where_the_trainer_s_step_takes_it(
    out: dict[str, Any], name: str
) -> None:
    assert out[name]["updated"] and out[name]["left_alone"]


def test_weighted_and_plain_are_told_apart(out: dict[str, Any]) -> None:
    """From one state: the further losses are a large part of what a weight does."""
    weighted, plain = out["weighted-sgd"], out["plain"]
    assert relative_error(weighted["brute"], plain["brute"]) > 0.2
    assert relative_error(weighted["c"]["ghost"], plain["c"]["ghost"]) > 0.2


def test_influence_is_read_off_the_training_pass(out: dict[str, Any]) -> None:
    assert relative_error(out["current"]["c"]["ghost"], out["current"]["reference"]) < 1e-6


def test_brute_force_notices_losses_that_no_weight_reaches(out: dict[str, Any]) -> None:
    broken = out["broken"]
    assert relative_error(broken["c"]["ghost"], broken["brute"]) > 0.2
