"""Runs that go on at other layouts, with the LLM, the DWM and both optimizers.

The same run at its own layout is what the others are compared with: losses, gradient norms, meta
losses and weights of the steps after the checkpoint. On TP2 x DP2 both optimizers are in shares; of
four pipeline stages one holds nothing of the DWM.

Not exercised here: GPUs; more than four ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dwm.logs.log_file import FILE_NAME, read_log
from tests.functional.corpus import write_dataset
from tests.functional.harness import DWM, TINY, Run, run_all

COMMON = [
    *TINY,
    *"--train-iters 6 --save-interval 3 --ckpt-format torch_dist".split(),
    *"--ckpt-fully-parallel-save --use-distributed-optimizer".split(),
    *"--dist-ckpt-optim-fully-reshardable".split(),
    *"--dwm-log-samples --dwm-head-lr 3e-2 --dwm-backbone-lr 3e-3".split(),
]
# Four ranks each.
STARTS = {
    "tp2-pp2": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    "tp2-dp2": "--tensor-model-parallel-size 2",
    "pp4": "--pipeline-model-parallel-size 4",
}
# Where a run comes from, and the ranks and flags that it goes on with.
LAYOUTS = {
    "tp1-pp1": ("tp2-pp2", 1, ""),
    "tp1-pp1-dp2": ("tp2-pp2", 2, ""),
    "dp2-to-dp1": ("tp2-dp2", 1, ""),
    "dp2-to-pp2": ("tp2-dp2", 2, "--pipeline-model-parallel-size 2"),
    "pp4-to-dp2": ("pp4", 2, ""),
}
# What differs between layouts is the order of sums: single precision, over three steps.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Returns iterations 4 to 6 of each run's step log, by name."""
    folder: Path = tmp_path_factory.mktemp("resharding")
    data = [
        *("--data-path", write_dataset(folder / "train", 1, documents=200)),
        *("--dwm-meta-data-path", write_dataset(folder / "meta", 2)),
        *("--data-cache-path", str(folder / "cache")),
    ]
    common = [*COMMON, *data, *DWM]
    save = {name: str(folder / name) for name in STARTS}
    found = {}
    runs = [Run(n, [*common, *f.split(), "--save", save[n]]) for n, f in STARTS.items()]
    results = run_all(4, runs, folder)
    for name in STARTS:
        results.succeeded(name)
        found[name] = read_log(folder / name / FILE_NAME)[3:]
    for ranks in (1, 2):
        runs = []
        for layout, (start, size, flags) in LAYOUTS.items():
            if size != ranks:
                continue
            load = ["--load", save[start], "--ckpt-step", "3", "--no-load-rng", *flags.split()]
            runs.append(Run(layout, [*common, *load, "--save", str(folder / layout)]))
            if layout == "tp1-pp1":
                name = "without-optimizers"
                words = [*common, *load, "--no-load-optim", "--save", str(folder / name)]
                runs.append(Run(name, words))
        results = run_all(ranks, runs, folder)
        for run in runs:
            results.succeeded(run.name)
            found[run.name] = read_log(folder / run.name / FILE_NAME)
    return found


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]], name: str) -> float:
    """Returns the largest relative difference of a field of the log, or of a list of samples."""
    values = [np.array([line[name] for line in lines], dtype=float) for lines in (one, other)]
    if values[0].ndim == 2:  # samples come in the order of the data-parallel ranks
        values = [np.sort(v, axis=1) for v in values]
    return float(np.max(np.abs(values[0] - values[1]) / np.abs(values[0])))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["lm_loss", "meta_loss", "dwm_grad_norm", "weights"])
def test_run_goes_on_at_another_layout(logs: dict, layout: str, name: str) -> None:
    assert [line["iteration"] for line in logs[layout]] == [4, 5, 6]
    assert all(line["dwm_updated"] for line in logs[layout])
    assert difference(logs[LAYOUTS[layout][0]], logs[layout], name) <= TOLERANCE


def test_optimizers_came_along(logs: dict) -> None:
    """Without their states the run goes elsewhere: both models' steps are others."""
    for name in ("lm_loss", "weights"):
        assert difference(logs["tp2-pp2"], logs["without-optimizers"], name) > 10 * TOLERANCE
