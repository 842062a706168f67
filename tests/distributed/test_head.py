"""The head at every layout: the same scores, the same lesson, and a language model left alone.

A run of one rank trains with the head for six steps, each a meta step: one with the plain and one
with the distributed optimizer, whose rounding is its own. Every layout starts from the checkpoint
of its kind, gives the scores of the next step's samples, takes the step, and gives the scores once
more: with a regression, moments and a map that have all learned from that step.

Controls put something wrong on purpose, and the comparison must notice.

Not exercised here: context parallelism, GPUs, Transformer Engine (sequence parallelism stands on
torch's norms).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.distributed.cases import (
    HEAD,
    MODELS,
    OPTIMIZERS,
    VPP2,
    arguments,
    in_data_order,
    take_apart,
)
from tests.functional.harness import Run, run_all

# Of scores, which are of the order of 1: what float32 states at another layout come to.
SAME = 1e-6
TP2 = "--tensor-model-parallel-size 2"
# Ranks, flags.
LAYOUTS = {
    "one": (1, ""),
    "one-distributed": (1, "--use-distributed-optimizer"),
    "accumulation": (1, "--micro-batch-size 1"),
    "one-micro-batch": (1, "--micro-batch-size 8"),
    "tp2": (2, TP2),
    "tp2-sp": (2, f"{TP2} --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "vpp2": (2, VPP2),
    "dp2": (2, "--micro-batch-size 1"),
    "dp2-distributed": (2, "--use-distributed-optimizer --overlap-grad-reduce"),
    "dp2-recompute": (
        2,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
# What is put wrong, and where.
BROKEN = {"states-not-merged": "tp2-sp", "sums-not-reduced": "dp2"}


def case(name: str, model: str, flags: str, start: Path, **more: Any) -> dict[str, Any]:
    kind = "distributed" if "--use-distributed-optimizer" in flags else "plain"
    words = f"--no-load-rng --load {start}-{kind} {OPTIMIZERS[kind]} {flags}"
    return {
        "name": name,
        "args": arguments(words, model, HEAD),
        "after": 6,
        "allow": "sequence-parallel" if "--sequence-parallel" in flags else None,
        "estimators": [],
        "scores": True,
        "update": True,
        **more,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("head")
    starts = {model: folder / f"start-{model}" for model in MODELS}
    saves = "--exit-interval 6 --save-interval 6 --save"
    runs = [
        Run(f"{model}-{kind}", arguments(f"{flags} {saves} {start}-{kind}", model, HEAD))
        for model, start in starts.items()
        for kind, flags in OPTIMIZERS.items()
    ]
    results = run_all(1, runs, folder)
    for run in runs:
        results.succeeded(run.name)
    out = {}
    for ranks in (1, 2):
        cases = [
            case(f"{model}-{name}", model, flags, starts[model])
            for model in MODELS
            for name, (size, flags) in LAYOUTS.items()
            if size == ranks
        ]
        cases += [
            case(f"broken-{name}", "llama", LAYOUTS[at][1], starts["llama"], break_all=name)
            for name, at in BROKEN.items()
            if LAYOUTS[at][0] == ranks
        ]
        out.update(take_apart(ranks, cases, folder))
    return out


def one_rank(name: str) -> str:
    """Returns the run of one rank that starts from the same checkpoint as a layout."""
    distributed = "--use-distributed-optimizer" in LAYOUTS[name][1]
    return "one-distributed" if distributed else "one"


def scores(out: dict[str, Any], after: bool = False) -> numpy.ndarray:
    """Returns the scores in the order of the data, before the step or after it."""
    before = numpy.asarray(in_data_order(out, out["scores"]))
    if not after:
        return before
    return before + numpy.asarray(in_data_order(out, out["score_change"]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != one_rank(name)])
class TestLayouts:
    def test_scores_are_those_of_one_rank(self, found, model, name):
        expected = scores(found[f"{model}-{one_rank(name)}"])
        assert numpy.std(expected) > 0.05  # there is something to compare
        assert abs(scores(found[f"{model}-{name}"]) - expected).max() < SAME

    def test_what_is_learned_is_what_one_rank_learns(self, found, model, name):
        one = found[f"{model}-{one_rank(name)}"]
        assert one["updated"] and found[f"{model}-{name}"]["updated"]
        expected = scores(one, after=True)
        assert abs(expected - scores(one)).max() > 1e-3
        assert abs(scores(found[f"{model}-{name}"], after=True) - expected).max() < 3 * SAME

    def test_weights_are_those_of_one_rank(self, found, model, name):
        one, other = found[f"{model}-{one_rank(name)}"], found[f"{model}-{name}"]
        expected = numpy.asarray(in_data_order(one, one["weights"]))
        assert numpy.std(expected) > 0.05
        weights = numpy.asarray(in_data_order(other, other["weights"]))
        # The sigmoid's slope of 4 over a normaliser of 1/2 doubles what scores differ by.
        assert abs(weights - expected).max() < 4 * SAME

    def test_the_language_model_is_where_the_weighted_step_alone_takes_it(self, found, model, name):
        assert found[f"{model}-{name}"]["left_alone"]


@pytest.mark.parametrize("name", BROKEN)
def test_check_notices(found, name):
    expected = scores(found["llama-one"], after=True)
    assert abs(scores(found[f"broken-{name}"], after=True) - expected).max() > 100 * SAME
