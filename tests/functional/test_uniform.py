"""Four ranks: uniform weights are the stock trainer, and a DWM shallower than the pipeline.

With uniform weights every reported loss and the final weights are those of the stock trainer, bit
for bit: the losses and gradient norms are compared as exact numbers, the parameters of every
rank by hash, between a run without `--dwm` and one with `--dwm --dwm-policy uniform`, whose losses
go through the weighting with w = 1.

Not exercised here: GPUs, Transformer Engine, sequence and context parallelism.
"""

from __future__ import annotations

import pytest

from tests.functional.harness import DWM, MOCK, TINY, Results, Run, run_all

# Four ranks each; what is not named is data parallel.
LAYOUTS = {
    "tp2-pp2": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    "vpp2-dp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "dp4-distributed-optimizer": "--use-distributed-optimizer",
    "tp2-dp2-per-token": "--tensor-model-parallel-size 2 --calculate-per-token-loss",
    "pp2-dp2-bf16-recompute": "--pipeline-model-parallel-size 2 --bf16 --use-distributed-optimizer "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "mtp-pp2-dp2": "--pipeline-model-parallel-size 2 --mtp-num-layers 2 --clip-grad 0.3",
    "moe-ep1": "--num-experts 4 --moe-router-topk 2",
    "moe-ep2": "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2 "
    "--moe-token-dispatcher-type alltoall",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs = []
    for name, flags in LAYOUTS.items():
        common = [*TINY, *MOCK, *flags.split()]
        runs.append(Run(f"{name}-stock", common))
        runs.append(Run(f"{name}-uniform", [*common, "--dwm", "--dwm-policy", "uniform"]))
        if name == "tp2-pp2":
            runs.append(Run(f"{name}-learned", [*common, *DWM]))
    folder = tmp_path_factory.mktemp("uniform")
    shallow = [*TINY, *MOCK, *DWM, "--pipeline-model-parallel-size", "4", "--dwm-num-layers", "1"]
    kept = [
        "--save",
        str(folder / "shallow"),
        "--save-interval",
        "2",
        "--ckpt-format",
        "torch_dist",
    ]
    runs.append(Run("shallow-whole", shallow))
    runs.append(Run("shallow-first", [*shallow, *kept, "--exit-interval", "2"]))
    runs.append(Run("shallow-second", [*shallow, *kept, "--load", str(folder / "shallow")]))
    return run_all(4, runs, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uniform_is_bit_identical_to_stock(results: Results, layout: str) -> None:
    """Losses, gradient norms, validation losses and every rank's parameters are equal."""
    stock, uniform = (results.succeeded(f"{layout}-{kind}") for kind in ("stock", "uniform"))
    assert len(stock[-1]["steps"]) == 4
    for before, after in zip(stock, uniform, strict=True):
        assert before["steps"] == after["steps"]
        assert before["valid"] == after["valid"]
        assert before["parameters"] == after["parameters"]


def test_learned_weights_change_the_training(results: Results) -> None:
    """The comparison can fail: learned weights give other parameters and later losses."""
    stock, learned = results.succeeded("tp2-pp2-stock"), results.succeeded("tp2-pp2-learned")
    assert stock[-1]["steps"][0] == learned[-1]["steps"][0]
    assert stock[-1]["steps"][-1] != learned[-1]["steps"][-1]
    assert all(a["parameters"] != b["parameters"] for a, b in zip(stock, learned, strict=True))


def test_weighting_model_shallower_than_the_pipeline(results: Results) -> None:
    """One DWM layer on four pipeline stages trains, and is saved and resumed exactly."""
    whole, second = results.succeeded("shallow-whole"), results.succeeded("shallow-second")
    assert len(whole[-1]["steps"]) == 4
    assert whole[-1]["steps"][2:] == second[-1]["steps"]
    assert [a["parameters"] for a in whole] == [b["parameters"] for b in second]
    lines = [x for x in whole[-1]["stdout"].splitlines() if "dwm iteration" in x]
    assert "max weight: 1.000 " not in lines[-1]
