"""The meta-gradient of real runs against brute force, under parallel layouts.

A run of the stock trainer is stopped before its fourth step. For every sample of that step's
global batch the worker then really changes the sample's weight, lets the trainer take its own
step, and measures the meta loss; and it computes `<v, g_i>` by per-sample backward passes. The
product's own passes A to D must agree with both.

Not exercised here: GPUs, bf16 (finite differences are coarser there), learned estimators' cost.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from tests.functional.harness import DWM, MOCK, ROOT, TINY, host_flags, torchrun

CASES = {
    "adamw-clipped": (1, "--clip-grad 0.3"),
    "sgd-momentum-clipped": (1, "--optimizer sgd --sgd-momentum 0.9 --lr 0.1 --clip-grad 0.3"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    # All experts active: a change of the routing has no derivative.
    "moe-ep2": (
        2,
        "--num-experts 2 --expert-model-parallel-size 2 --moe-router-topk 2 "
        "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none "
        "--clip-grad 0.3 --use-distributed-optimizer",
    ),
    "vpp2-dp2-distributed-optimizer": (
        4,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--calculate-per-token-loss --clip-grad 0.3",
    ),
}


def probe(ranks: int, flags: str, out: Path) -> dict:
    done = torchrun(
        ranks,
        [
            str(ROOT / "tests" / "distributed" / "meta_gradient_worker.py"),
            *(*host_flags(), *TINY, *MOCK, *DWM, *flags.split()),
        ],
        PROBE_OUT=str(out),
    )
    assert out.exists(), done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_is_what_a_weight_really_does(case: str, tmp_path: Path) -> None:
    """Correlation with brute force >= 0.99 over the batch, error to the reference <= 2e-2."""
    found = probe(*CASES[case], tmp_path / "probe.json")
    c, brute, reference = (numpy.array(found[k]) for k in ("c", "brute", "reference"))
    assert len(c) == 16
    assert found["left_alone"], "the meta step changed the language model or its optimizer"
    if "--clip-grad 0.3" in CASES[case][1]:
        assert found["grad_norm"] > 0.3, "clipping was not active, so it was not tested"
    assert numpy.corrcoef(c, brute)[0, 1] >= 0.99
    assert numpy.corrcoef(reference, brute)[0, 1] >= 0.99
    assert numpy.linalg.norm(c - reference) <= 2e-2 * numpy.linalg.norm(reference)
    # The comparison can fail: samples in another order do not correlate.
    assert abs(numpy.corrcoef(numpy.roll(c, 1), brute)[0, 1]) < 0.9
