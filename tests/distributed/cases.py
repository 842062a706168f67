"""The runs whose meta-gradient is taken apart, and how the worker is spawned for them.

One spawn of ranks takes many cases, as starting the trainer takes longer than a tiny case.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy

from tests.functional.harness import MOCK, ROOT, TINY, Run, host_flags, run_all, torchrun

COMMON = [
    *(word for word in TINY if word not in ("--swiglu", "--disable-bias-linear")),
    *MOCK,
    *"--dwm --dwm-meta-batch-size 8 --train-iters 20 --global-batch-size 8".split(),
]
CHAIN = [
    *"--dwm-form model --dwm-rule chain --dwm-schedule joint".split(),
    *"--dwm-num-layers 2 --dwm-hidden-size 64 --dwm-num-attention-heads 4".split(),
]
# A meta step in every step, and weights that leave 1 from the first of them.
HEAD = "--dwm-meta-interval 1 --dwm-gate off".split()
for name in ("--normalization", "--position-embedding-type"):
    at = COMMON.index(name)
    del COMMON[at : at + 2]
COMMON = [w for w in COMMON if w != "--untie-embeddings-and-output-weights"]

# Between them every kind of parameter of dense GPT and Llama models.
MODELS = {
    "llama": "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type "
    "rope --untie-embeddings-and-output-weights --add-qkv-bias --qk-layernorm",
    "gpt": "--normalization LayerNorm --position-embedding-type learned_absolute",
}
OPTIMIZERS = {
    "plain": "",
    "distributed": "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
}
VPP2 = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
# {TP1, TP2} x {PP1, PP2, VPP2} x {DP1, DP2}, all that fits in four ranks; DP is what is left.
LAYOUTS = {
    "tp1-pp1-dp1": (1, ""),
    "tp1-pp1-dp2": (2, ""),
    "tp1-pp2-dp1": (2, "--pipeline-model-parallel-size 2"),
    "tp1-vpp2-dp1": (2, VPP2),
    "tp2-pp1-dp1": (2, "--tensor-model-parallel-size 2"),
    "tp1-pp2-dp2": (4, "--pipeline-model-parallel-size 2"),
    "tp1-vpp2-dp2": (4, VPP2),
    "tp2-pp1-dp2": (4, "--tensor-model-parallel-size 2"),
    "tp2-pp2-dp1": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2-vpp2-dp1": (4, f"--tensor-model-parallel-size 2 {VPP2}"),
}
FIRST = "tp1-pp1-dp1"
# All four of models and optimizers on one rank, and elsewhere what has TP2, PP2, VPP2 and DP2 with
# both models and both optimizers between them; test_layouts.py draws many more.
EACH = list(itertools.product(MODELS, OPTIMIZERS))
TAKEN = {
    FIRST: EACH,
    "tp1-pp2-dp2": [("llama", "distributed")],
    "tp2-pp1-dp2": [("gpt", "distributed")],
    "tp2-pp2-dp1": [("gpt", "plain")],
    "tp1-vpp2-dp2": [("gpt", "distributed")],
    "tp2-vpp2-dp1": [("llama", "plain")],
}


def arguments(flags: str, model: str = "llama", form: list[str] = CHAIN) -> list[str]:
    """Returns the script's arguments: later flags win."""
    return [*host_flags(), *COMMON, *form, *MODELS[model].split(), *flags.split()]


def save_starts(folder: Path) -> None:
    """Saves, for each model and optimizer, the state after three steps of one rank.

    Every layout starts from it, so that all have the same parameters, DWM and moments.
    """
    runs = [
        Run(
            f"{model}-{optimizer}",
            arguments(
                f"{OPTIMIZERS[optimizer]} --exit-interval 3 "
                f"--save {folder / f'start-{model}-{optimizer}'} --save-interval 3",
                model,
            ),
        )
        for model in MODELS
        for optimizer in OPTIMIZERS
    ]
    results = run_all(1, runs, folder)
    for run in runs:
        results.succeeded(run.name)


def combinations() -> list[tuple[str, str, str]]:
    """Returns (model, optimizer, layout): `TAKEN`, or all of them in `make test-extended`."""
    extended = os.environ.get("MEGATRON_DWM_TEST_EXTENDED") == "1"
    return [
        (model, optimizer, layout)
        for layout in LAYOUTS
        for model, optimizer in (EACH if extended else TAKEN.get(layout, ()))
    ]


def layout_cases(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Returns the cases of the layouts that take so many ranks."""
    found = []
    for model, optimizer, layout in combinations():
        size, flags = LAYOUTS[layout]
        if size != ranks:
            continue
        start = folder / f"start-{model}-{optimizer}"
        words = f"{OPTIMIZERS[optimizer]} --no-load-rng --load {start} {flags}"
        found.append(
            {
                "name": f"{model}-{optimizer}-{layout}",
                "args": arguments(words, model),
                "after": 3,
                "estimators": ["ghost", "finite_difference"],
                "reference": True,
                "update": True,
            }
        )
    return found


def take_apart(
    ranks: int, cases: list[dict[str, Any]], folder: Path, timeout: int = 900, **variables: str
) -> dict[str, dict[str, Any]]:
    """Spawns the worker once and returns what came out of each case, by name.

    Variables as those of `torchrun`.
    """
    path = folder / f"cases-{ranks}.json"
    path.write_text(json.dumps(cases))
    done = torchrun(
        ranks,
        [str(ROOT / "tests" / "distributed" / "meta_gradient_worker.py")],
        timeout=timeout,
        CASES=str(path),
        OUT=str(folder),
        **variables,
    )
    found = {}
    for case in cases:
        out = folder / f"{case['name']}.json"
        assert out.exists(), f"{case['name']}: nothing came out\n{done.stderr[-4000:]}"
        found[case["name"]] = json.loads(out.read_text())
        assert "error" not in found[case["name"]], found[case["name"]]["error"]
    return found


def relative_error(found: Any, expected: Any) -> float:
    """Returns `|found - expected| / |expected|`."""
    found, expected = numpy.asarray(found), numpy.asarray(expected)
    return float(numpy.linalg.norm(found - expected) / numpy.linalg.norm(expected))


def correlation(a: Any, b: Any) -> float:
    """Returns Pearson's correlation."""
    return float(numpy.corrcoef(a, b)[0, 1])


def in_data_order(out: dict[str, Any], values: list[float]) -> numpy.ndarray:
    """Returns per-sample values in the order of the data, whatever the data-parallel size.

    The trainer deals each micro-step's samples to the data-parallel ranks in turn.
    """
    size, b = out["dp"], out["micro_batch_size"]
    return numpy.asarray(values).reshape(size, -1, b).transpose(1, 0, 2).reshape(-1)
