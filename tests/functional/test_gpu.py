"""The functional tests on real GPUs, without the host backend: `make test-gpu`.

One rank for each GPU, data parallel, the local layer spec (so neither Transformer Engine nor Apex
is needed). Skipped where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.analysis.log_file import FILE_NAME, read_log
from tests.functional.corpus import write_dataset
from tests.functional.harness import DWM, MOCK, TINY, Results, Run, run_all

pytestmark = pytest.mark.gpu

LOCAL = """
--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-persist-layer-norm --no-rope-fusion --bf16
""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    import torch

    ranks = min(4, torch.cuda.device_count())
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
    ]
    return run_all(ranks, runs, folder)


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
