"""The functional tests on real GPUs, without the host backend: `make test-gpu`.

One rank for each GPU, data parallel, the local layer spec (so neither Transformer Engine nor Apex
is needed). Skipped where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dwm.data.weight_file import read_weights
from megatron_dwm.logs.log_file import FILE_NAME, read_log
from tests.distributed.cases import arguments, correlation, relative_error, take_apart
from tests.functional.corpus import write_dataset
from tests.functional.harness import DWM, MOCK, ROOT, TINY, Results, Run, run_all, torchrun

pytestmark = pytest.mark.gpu

FP32 = """
--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-persist-layer-norm --no-rope-fusion
""".split()
LOCAL = [*FP32, "--bf16"]
# Meta-gradients that are taken apart, on one GPU: flags, model.
GRADIENTS = {
    "adamw": (f"{' '.join(FP32)} --clip-grad 0", "llama"),
    "adamw-clipped": (f"{' '.join(FP32)} --clip-grad 0.3", "gpt"),
    "bf16": (f"{' '.join(LOCAL)} --clip-grad 0.3", "llama"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    import torch

    ranks = max(1, min(4, torch.cuda.device_count()))
    common = [*TINY, *LOCAL, "--ckpt-format", "torch_dist"]
    mock = [*common, *MOCK]
    meta = write_dataset(folder / "meta", 1)
    train = write_dataset(folder / "train", 2, documents=200)
    data = ["--data-path", train, "--dwm-meta-data-path", meta]
    learned = [*common, *data, *DWM, "--save", str(folder / "learned"), "--save-interval", "2"]
    runs = [
        Run("stock", mock),
        Run("uniform", [*mock, "--dwm", "--dwm-policy", "uniform"]),
        Run("learned", learned),
        Run("llm", [*mock, *DWM, "--dwm-init", "llm:2"]),
        Run(
            "resumed",
            [*common, *data, *DWM, "--load", str(folder / "learned"), "--ckpt-step", "2"]
            + ["--save", str(folder / "resumed"), "--save-interval", "4"],
        ),
    ]
    return run_all(ranks, runs, folder)


@pytest.fixture(scope="module")
def gradients(folder: Path) -> dict[str, dict[str, Any]]:
    cases = [
        {
            "name": name,
            "args": arguments(flags, model),
            "estimators": ["ghost", "finite_difference"],
            "reference": True,
            "brute": 0 if name == "bf16" else 0.25,
            "update": True,
        }
        for name, (flags, model) in GRADIENTS.items()
    ]
    return take_apart(1, cases, folder)


def test_uniform_is_bit_identical_to_stock(results: Results) -> None:
    """Losses, gradient norms and parameters are those of the stock trainer."""
    for before, after in zip(results.succeeded("stock"), results.succeeded("uniform"), strict=True):
        assert before["steps"] == after["steps"]
        assert before["parameters"] == after["parameters"]


def test_learned_run_trains_both_models(results: Results, folder: Path) -> None:
    """Every step is a meta step with finite figures, and the weights move."""
    results.succeeded("learned")
    log = read_log(folder / "learned" / FILE_NAME)
    assert [line["iteration"] for line in log] == [1, 2, 3, 4]
    assert all(line["dwm_updated"] and line["meta_loss"] > 0 for line in log)
    assert log[-1]["max_weight"] > 1.0


def test_start_from_the_llm(results: Results) -> None:
    """`--dwm-init llm:2` copies layers and trains on."""
    assert [step[0] for step in results.losses("llm")] == [1, 2, 3, 4]


def test_resumed_run_goes_on_as_if_nothing_had_happened(results: Results, folder: Path) -> None:
    """From the checkpoint of iteration 2: the same losses, weights and meta losses."""
    results.succeeded("resumed")
    whole, rest = read_log(folder / "learned" / FILE_NAME), read_log(folder / "resumed" / FILE_NAME)
    assert [line["iteration"] for line in rest] == [3, 4]
    for name in ("lm_loss", "meta_loss", "max_weight"):
        values = [[line[name] for line in lines] for lines in (whole[2:], rest)]
        np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw-clipped"])
def test_meta_gradient(gradients: dict, name: str) -> None:
    """Both estimators are the per-sample loop, and that is what a weight really does."""
    out = gradients[name]
    assert relative_error(out["c"]["ghost"], out["reference"]) <= 1e-4
    assert relative_error(out["c"]["finite_difference"], out["reference"]) <= 2e-2
    assert correlation(out["c"]["ghost"], out["brute"]) >= 0.999
    assert out["updated"] and out["left_alone"]


def test_meta_gradient_in_bf16(gradients: dict) -> None:
    """Both estimators agree with the per-sample loop as far as bf16 goes."""
    out = gradients["bf16"]
    assert relative_error(out["c"]["ghost"], out["reference"]) <= 5e-2
    assert relative_error(out["c"]["finite_difference"], out["reference"]) <= 0.25
    assert out["updated"] and out["left_alone"]


def test_corpus_is_scored_as_on_a_cpu(results: Results, folder: Path) -> None:
    """The weights of a bf16 run's DWM; equal scores would make any two scorings agree."""
    results.succeeded("learned")
    found = {}
    for device, variables in (
        ("gpu", {}),
        ("cpu", {"MEGATRON_DWM_HOST": "cpu", "CUDA_VISIBLE_DEVICES": ""}),
    ):
        out = folder / f"{device}.weights"
        words = [str(ROOT / "tools" / "score_corpus.py"), "--checkpoint", str(folder / "learned")]
        words += ["--data", str(folder / "train"), "--output", str(out)]
        done = torchrun(1, words, **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        found[device] = np.log(np.asarray(read_weights(str(out)).weights))
    assert found["cpu"].std() > 0
    assert np.abs(found["gpu"] - found["cpu"]).max() <= 0.05 * found["cpu"].std() + 1e-3
