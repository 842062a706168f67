"""The ghost estimator on Transformer Engine's own layers: exact, in the pass and beside it.

Its Python classes run on the CPU, in a process of their own (`tests/transformer_engine_cpu`), as
whole tiny GPTs (`tiny_gpt.py`) with a backward pass for each sample as the truth. `<v, g_i>` is
compared for a random v, and with v on one kind of parameter at a time, so that no term can hide
behind the others.
What these tests do not exercise: the compiled kernels, GPUs, bfloat16 and FP8; more than one rank
(tests/functional/test_transformer_engine.py has tensor and sequence parallelism).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.contract.te_ghost_cases import CASES, REFUSED
from tests.functional.harness import ROOT, torchrun

# Relative to the largest of the samples' values, in float32; 4e-7 was seen.
TOLERANCE = 1e-6
# Which layers of Transformer Engine, or of Megatron's wrappers of it, a case must hold.
LAYERS = {
    "llama": {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "RMSNorm"},
    "gpt": {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "LayerNorm"},
    "mla": {"TELinear", "TELayerNormColumnParallelLinear"},
    "mla-residual-norm": {"TELinear", "TEColumnParallelLinear", "TEFusedResidualRMSNorm"},
    "grouped": {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "TopKRouter"},
    "offset": {"TEDotProductAttention"},
}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, transformer_engine: dict[str, str]
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ghost") / "out.json"
    script = str(ROOT / "tests" / "contract" / "te_ghost_worker.py")
    done = torchrun(1, [script], OUT=str(out), **transformer_engine)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def result_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    assert "failed" not in results[name], results[name].get("failed")
    return results[name]


@pytest.mark.parametrize("name", CASES)
def test_every_sample(results: dict[str, Any], name: str) -> None:
    found = result_of(results, name)
    assert found["whole"] <= TOLERANCE
    # Negative control: the samples in another order.
    assert found["rolled"] > 0.05


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_parameter_alone(results: dict[str, Any], name: str) -> None:
    alone = result_of(results, name)["alone"]
    assert min(kind["size"] for kind in alone.values()) > 1e-3
    assert max(kind["error"] for kind in alone.values()) <= TOLERANCE, alone


@pytest.mark.parametrize("name", CASES)
def test_read_off_the_training_pass_whose_gradient_stays_bit_identical(
    results: dict[str, Any], name: str
) -> None:
    """`--dwm-lookahead current`; fused layers run once more without adding to any gradient."""
    found = result_of(results, name)
    assert found["training"] <= TOLERANCE
    assert found["untouched"]


@pytest.mark.parametrize("name", LAYERS)
def test_cases_hold_what_their_names_say(results: dict[str, Any], name: str) -> None:
    assert LAYERS[name] <= set(result_of(results, name)["layers"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("offset-dropout", "core_attention.softmax_offset (of a TEDotProductAttention: it uses"),
        ("grouped-jitter", "--moe-input-jitter-eps"),
    ],
)
def test_what_is_not_covered_is_named_and_estimated_by_finite_differences(
    results: dict[str, Any], name: str, words: str
) -> None:
    assert name in REFUSED
    found = result_of(results, name)
    assert found["estimator"] == "finite_difference"
    assert words in found["why"] and found["why"].startswith("auto; ghost does not cover")
    assert words in found["asked"]
