"""The stock trainer with `--transformer-impl transformer_engine`, weighted and unweighted.

Transformer Engine's own Python classes run on the CPU (`tests/transformer_engine_cpu`), in ranks
that are forked from a process of their own. Uniform weights must not change a bit of the stock run
with the same layers. Checkpoints pass between Transformer Engine's layers and Megatron's own, and
to a process without Transformer Engine, whose optimizer is another, too: a run that changes sides
must go on as the one that did not, within rounding. Under tensor and sequence parallelism
`<v, g_i>` of a real step, read off by ghost, is compared with a backward pass for each sample.
Not exercised here: the compiled kernels, GPUs, bfloat16, FP8, context parallelism, fused attention
(in float32 the unfused one runs).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import HEAD, relative_error, take_apart
from tests.functional.harness import MOCK, TINY, Results, Run, host_flags, run_all

STOP = 2
COMMON = [
    *(*TINY, *MOCK, "--num-layers", "2", "--global-batch-size", "8", "--eval-iters", "0"),
    *"--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --no-load-rng".split(),
]
FUSED = "--transformer-impl transformer_engine".split()
DWM = ["--dwm", "--dwm-meta-batch-size", "8", *HEAD]
FUSER = ["--use-transformer-engine-op-fuser"]
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()
CLOSE = 2e-6


def saving(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", str(STOP)]


def loading(folder: Path) -> list[str]:
    return ["--load", str(folder), "--ckpt-step", str(STOP)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fused")


def folder_for(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


@pytest.fixture(scope="module")
def plain(folder: Path) -> Results:
    """Runs without Transformer Engine."""
    runs = [Run("local", [*COMMON, *DWM, *saving(folder / "saved-without")])]
    return run_all(1, runs, folder_for(folder, "plain"))


@pytest.fixture(scope="module")
def one(folder: Path, plain: Results, transformer_engine: dict[str, str]) -> Results:
    """Runs of one rank with it; some have Megatron's own layers all the same."""
    words = [*COMMON, *FUSED]
    runs = [
        Run("stock", words),
        Run("uniform", [*words, "--dwm", "--dwm-policy", "uniform"]),
        Run("head", [*words, *DWM, *saving(folder / "fused")]),
        Run("fuser-stock", [*words, *FUSER]),
        Run("fuser-uniform", [*words, *FUSER, "--dwm", "--dwm-policy", "uniform"]),
        Run("fuser-head", [*words, *FUSER, *DWM]),
        Run("local", [*COMMON, *DWM, *saving(folder / "local")]),
        Run("from-local", [*words, *DWM, *loading(folder / "local")]),
        Run("from-fused", [*COMMON, *DWM, *loading(folder / "fused")]),
        Run("refused", [*words, *DWM, *loading(folder / "saved-without")]),
    ]
    return run_all(1, runs, folder_for(folder, "one"), **transformer_engine)


@pytest.fixture(scope="module")
def back(folder: Path, one: Results) -> Results:
    """A run without it that loads what was saved with it."""
    words = [*COMMON, *loading(folder / "fused")]
    runs = [Run("from-fused", [*words, *DWM]), Run("unweighted", words)]
    return run_all(1, runs, folder_for(folder, "back"))


@pytest.fixture(scope="module")
def two(folder: Path, one: Results, transformer_engine: dict[str, str]) -> Results:
    """Runs of two tensor-parallel ranks with sequence parallelism, from what one rank saved."""
    words = [*COMMON, *FUSED, *TP2, *loading(folder / "fused")]
    runs = [
        Run("stock", words),
        Run("uniform", [*words, "--dwm", "--dwm-policy", "uniform"]),
        Run("head", [*words, *DWM]),
    ]
    return run_all(2, runs, folder_for(folder, "two"), **transformer_engine)


def losses(results: Results, name: str) -> list[float]:
    return [values["lm loss"] for _, values, _ in results.losses(name)]


class TestOneRank:
    @pytest.mark.parametrize("kind", ["", "fuser-"])
    def test_uniform_is_stock_bit_for_bit(self, one: Results, kind: str) -> None:
        stock, uniform = (one.succeeded(f"{kind}{name}")[0] for name in ("stock", "uniform"))
        assert uniform["steps"] == stock["steps"]
        assert uniform["parameters"] == stock["parameters"]

    @pytest.mark.parametrize("kind", ["", "fuser-"])
    def test_learned_weights_change_the_training_by_the_exact_influence(
        self, one: Results, kind: str
    ) -> None:
        head, stock = one.succeeded(f"{kind}head")[0], one.succeeded(f"{kind}stock")[0]
        assert "estimator ghost: auto; it covers every trained parameter" in head["stdout"]
        assert head["parameters"] != stock["parameters"]
        # Weights differ from the first meta step on, and gradients with them, by a tenth.
        norms = [[norm for _, _, norm in rank["steps"]] for rank in (head, stock)]
        assert abs(norms[0][-1] / norms[1][-1] - 1) > 0.05

    def test_fused_layers_train_as_those_one_by_one(self, one: Results) -> None:
        assert losses(one, "fuser-head") == pytest.approx(losses(one, "head"), rel=CLOSE)

    def test_its_layers_are_those_of_megatron(self, one: Results, plain: Results) -> None:
        assert losses(one, "head") == pytest.approx(losses(plain, "local"), rel=CLOSE)
        # Other kernels, other bits.
        assert one["head"][0]["parameters"] != plain["local"][0]["parameters"]


def measures(results: Results, name: str) -> list[float]:
    """Returns losses and gradient norms, which the weights are in, of the steps after the stop."""
    steps = [step for step in results.losses(name) if step[0] > STOP]
    return [number for _, values, norm in steps for number in (values["lm loss"], norm)]


class TestCheckpoints:
    def test_a_run_goes_on_with_transformer_engine(self, one: Results) -> None:
        assert measures(one, "from-local") == pytest.approx(measures(one, "local"), rel=2e-5)

    def test_and_with_the_layers_of_megatron(self, one: Results) -> None:
        assert measures(one, "from-fused") == pytest.approx(measures(one, "head"), rel=2e-5)

    def test_and_where_there_is_no_transformer_engine(self, one: Results, back: Results) -> None:
        expected = measures(one, "head")
        assert measures(back, "from-fused") == pytest.approx(expected, rel=2e-5)
        # Negative control: without the weighting that lies in the checkpoint.
        assert measures(back, "unweighted") != pytest.approx(expected, rel=0.01)

    def test_where_megatron_would_ask_for_state_that_is_not_there_the_way_out_is_named(
        self, one: Results
    ) -> None:
        (found,) = one["refused"]
        assert found["code"] == 2, found["stderr"][-2000:]
        assert "--dist-ckpt-strictness log_unexpected" in found["stderr"]


class TestTensorAndSequenceParallel:
    """Two ranks that load what one saved: a run with Transformer Engine resumes, in any layout."""

    def test_uniform_is_stock_bit_for_bit(self, two: Results) -> None:
        for stock, uniform in zip(two.succeeded("stock"), two.succeeded("uniform"), strict=True):
            assert uniform["steps"] == stock["steps"]
            assert uniform["parameters"] == stock["parameters"]

    def test_learned_weights_are_those_of_one_rank(self, one: Results, two: Results) -> None:
        expected = measures(one, "head")
        assert measures(two, "head") == pytest.approx(expected, rel=2e-5)
        assert measures(two, "stock") != pytest.approx(expected, rel=0.01)


# --------------------------------------------------------------------------- ghost, on two ranks

# In the place of grouped queries.
MLA = """
--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 16
--qk-pos-emb-head-dim 8 --v-head-dim 16 --qk-layernorm
""".split()
PARALLEL = {
    "llama": "--qk-layernorm --add-qkv-bias",
    "offset-fuser": "--softmax-type learnable --use-transformer-engine-op-fuser",
    "mla": "",
    "experts": "",
}
# Instead of tensor parallelism: each rank has two of the experts, in one grouped layer.
EXPERTS = """
--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-grouped-gemm
--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none --moe-aux-loss-coeff 0
--expert-model-parallel-size 2
""".split()


def parallel_case(name: str, **more: Any) -> dict[str, Any]:
    words = list(COMMON)
    if name == "mla":
        at = words.index("--group-query-attention")
        words[at : at + 3] = MLA  # and its number of groups
    # As the recipes have it: weight gradients are added up inside the layers.
    flags = [f for f in host_flags() if f != "--no-gradient-accumulation-fusion"]
    # The factor of clipping is not part of the reference.
    parallel = EXPERTS if name == "experts" else TP2
    args = [*flags, *words, *FUSED, *parallel, *DWM, "--clip-grad", "0", *PARALLEL[name].split()]
    case = {"args": args, "after": 1, "estimators": ["ghost"], "reference": True, **more}
    return {**case, "allow": "grouped-gemm"} if name == "experts" else case


@pytest.fixture(scope="module")
def apart(folder: Path, transformer_engine: dict[str, str]) -> dict[str, dict[str, Any]]:
    cases = [{"name": name, **parallel_case(name)} for name in PARALLEL]
    cases.append({"name": "broken", **parallel_case("llama"), "break": "no-model-parallel-sum"})
    return take_apart(2, cases, folder_for(folder, "apart"), **transformer_engine)


@pytest.mark.parametrize("name", PARALLEL)
def test_ghost_is_exact_under_tensor_sequence_and_expert_parallelism(
    apart: dict[str, dict[str, Any]], name: str
) -> None:
    found = apart[name]
    assert relative_error(found["c"]["ghost"], found["reference"]) <= 1e-6


def test_the_comparison_notices_a_sum_over_ranks_that_is_left_out(
    apart: dict[str, dict[str, Any]],
) -> None:
    """Negative control."""
    found = apart["broken"]
    assert relative_error(found["c"]["ghost"], found["reference"]) > 1e-4
