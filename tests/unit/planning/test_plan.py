"""`megatron-dwm plan` against figures derived by hand, for models whose sizes are public.

What the plan says of steps that are really taken is in tests/functional/test_plan.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.cli import plan as command
from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.config.schema import DWMConfig  # noqa: E402
from megatron_dwm.hosts.megatron_lm import planned as planned_module  # noqa: E402
from megatron_dwm.hosts.megatron_lm.checks import check_arguments  # noqa: E402
from megatron_dwm.hosts.megatron_lm.planned import (  # noqa: E402
    _arguments,
    _methods,
    _started_as,
    planned,
)
from megatron_dwm.hosts.megatron_lm.planned_model import weighting_model  # noqa: E402
from megatron_dwm.hosts.unsupported import refusals  # noqa: E402
from megatron_dwm.planning import flops, traffic  # noqa: E402
from megatron_dwm.planning.model import GHOST_CURRENT, GHOST_NEXT  # noqa: E402
from tests.tiny_hf_models import MODELS  # noqa: E402

COMMON = """
--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
--untie-embeddings-and-output-weights --seq-length 4096 --max-position-embeddings 4096
--micro-batch-size 1 --bf16 --use-distributed-optimizer --train-iters 10000 --lr 1e-4
--tokenizer-type NullTokenizer --vocab-size 1 --dwm --mock-data
"""
LLAMA = f"""
--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --sequence-parallel
--global-batch-size 1024 --padded-vocab-size 32000 {COMMON}
""".split()
DEEPSEEK = f"""
--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128
--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128
--qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --num-experts 256
--moe-layer-freq ([0]*3+[1]*58) --moe-router-topk 8 --moe-ffn-hidden-size 2048
--moe-shared-expert-intermediate-size 2048 --moe-router-score-function sigmoid
--moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss
--moe-aux-loss-coeff 1e-4 --moe-grouped-gemm --moe-token-dispatcher-type alltoall
--expert-model-parallel-size 64 --expert-tensor-parallel-size 1
--pipeline-model-parallel-size 16 --decoder-first-pipeline-num-layers 3
--decoder-last-pipeline-num-layers 2 --global-batch-size 15360 --padded-vocab-size 129280 {COMMON}
""".split()

MODEL = ["--dwm-form", "model"]

# The last of two such flags counts.
NO_TOKENIZER = [
    *(
        " ".join(LLAMA)
        .replace("--padded-vocab-size 32000", "")
        .replace("--vocab-size 1 ", "")
        .split()
    ),
    *"--tokenizer-type HuggingFaceTokenizer --tokenizer-model no/such".split(),
]


def arguments(words: list[str]) -> Any:
    with _started_as(words, 1024):
        return _arguments(words)[0]


def without(flag: str) -> list[str]:
    at = LLAMA.index(flag)
    return LLAMA[:at] + LLAMA[at + 2 :]


def method(plan: dict, name: str) -> dict:
    return next(m for m in plan["methods"] if m["estimator"] == name)


# --- Llama 7B at TP 4, PP 4, DP 64 ----------------------------------------------------------------

H, FFN, V, S = 4096, 11008, 32000, 4096
LINEAR = 4 * H * H + 3 * H * FFN  # a layer's
FUSED = 3 * H * H + 2 * H * FFN  # of them behind a norm: QKV, and the MLP's first


@pytest.fixture(scope="module")
def llama() -> dict:
    return planned(LLAMA, 1024).plan()


def test_llama_parameters(llama: dict) -> None:
    """6,738,415,616, as Llama 2's checkpoint has; a quarter of a stage on a rank."""
    assert llama["model"]["parameters"] == 6_738_415_616
    inner = 8 * (LINEAR // 4 + 2 * H)
    ends = V * H // 4
    assert llama["model"]["parameters_by_stage"] == [inner + ends, inner, inner, inner + ends + H]
    assert llama["layout"]["world_size"] == 1024 and llama["layout"]["dp"] == 64


def test_llama_flops(llama: dict) -> None:
    """6 FLOPs a parameter and token, and attention's two products over half of the square."""
    tokens = 1024 * S
    forward = 2 * (32 * LINEAR + V * H) + 32 * 2 * (2 * S * H) / 2
    assert llama["stock"]["flops"] == pytest.approx(3 * tokens * forward)
    found = method(llama, "ghost")["flops"]["share_of_stock"]
    assert found["C meta"] == pytest.approx(1 / 4)  # the meta batch is a quarter
    # A product a matrix, two where Transformer Engine has the norm inside.
    inner = 2 * (32 * (LINEAR + FUSED) + V * H)
    assert found["D influence"] == pytest.approx(inner / (3 * forward))
    found = method(llama, "finite_difference")["flops"]["share_of_stock"]
    # Two forwards of three; every hundredth meta step two more.
    assert found["D influence"] == pytest.approx(2 / 3 * 1.01)


def test_llama_time(llama: dict) -> None:
    """16 micro-batches and 4 of the meta batch, each filling and emptying 4 stages."""
    training = 3 * (8 * (2 * LINEAR + 2 * S * H) + 2 * V * H) / 4  # of a token, on the last stage
    inner = (8 * 2 * (LINEAR + FUSED) + 2 * V * H) / 4
    expected = 1 + ((4 + 3) * training + (16 + 3) * inner) / ((16 + 3) * training)
    found = method(llama, "ghost")
    # The regression on the head's features is what is left.
    assert found["stock_steps"] == pytest.approx(expected, rel=1e-6)
    assert found["average"]["stock_steps"] == pytest.approx(1 + (expected - 1) / 16, rel=1e-6)


def test_llama_bytes(llama: dict) -> None:
    """What each rank of the second stage sends in a meta step, by group."""
    parameters = 8 * (LINEAR // 4 + 2 * H)
    found = method(llama, "ghost")["sent"]["by_stage"][1]
    # h is reduce-scattered and v all-gathered, float32 each.
    assert found[traffic.DP] == pytest.approx(2 * 63 / 64 * 4 * parameters)
    hidden = S * H * 2
    # 4 micro-batches of C, a quarter of the states on each rank, forward and backward.
    assert found[traffic.PP] == pytest.approx(4 * 2 * hidden / 4)
    # Each of the two parts of a layer gathers and scatters on its way forward, the same backward,
    # and gathers its input again for the weight gradients: 5 in C. Ghost's hooks gather input and
    # normalised v for QKV and the MLP's first matrix, and a gradient for the other two: 3.
    passes = 8 * 2 * (4 * 5 + 16 * 3)
    norms = 2 * 3 / 4 * 4 * (8 * 2 * H)  # their gradients, summed over tensor parallelism
    assert found[traffic.TP] == pytest.approx(passes * 3 / 4 * hidden + norms)


def test_llama_memory(llama: dict) -> None:
    parameters = 8 * (LINEAR // 4 + 2 * H)
    assert method(llama, "ghost")["kept"][1]["v"] == 4 * parameters
    kept = method(llama, "finite_difference")["kept"][1]
    assert kept["theta"] == kept["theta+"] == 2 * parameters
    # bf16 parameters and float32 gradients, and a 64th of Adam's 12 bytes.
    assert llama["stock"]["bytes_by_stage"][1] == pytest.approx((6 + 12 / 64) * parameters)
    # k = 1024: the Gram matrix and its decomposition.
    assert llama["plain"]["kept"][1]["head: regression"] == pytest.approx(2 * 8 * 1024**2, rel=0.01)


def test_small_meta_batch_pays_for_idle_stages(llama: dict) -> None:
    """One micro-batch through 4 stages takes 4, not 1."""
    small = planned([*LLAMA, "--dwm-meta-batch-size", "64"], 1024).plan()
    flops = [method(p, "ghost")["flops"]["share_of_stock"]["C meta"] for p in (llama, small)]
    assert flops[0] / flops[1] == pytest.approx(4)
    steps = [method(p, "ghost")["stock_steps"] for p in (llama, small)]
    assert steps[0] - steps[1] == pytest.approx(3 / 19)


# --- DeepSeek-V3 at EP 64, PP 16 ------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek() -> dict:
    return planned(DEEPSEEK, 1024).plan()


def test_deepseek_parameters(deepseek: dict) -> None:
    """671B, of which 37B for a token (arXiv 2412.19437), from its config.json."""
    h, vocabulary = 7168, 129280
    attention = h * 1536 + 1536 * 128 * 192 + h * 576 + 512 * 128 * 256 + 128 * 128 * h
    attention += 1536 + 512  # norms of the two small ranks
    expert = 3 * h * 2048
    moe = attention + 2 * h + 257 * expert + 256 * h
    dense = attention + 2 * h + 3 * h * 18432
    total = 2 * vocabulary * h + 3 * dense + 58 * moe + h
    assert total == 671_026_404_352
    assert deepseek["model"]["parameters"] == total
    active = vocabulary * h + 3 * dense + 58 * (moe - 248 * expert) + h
    assert deepseek["model"]["active_parameters"] == active
    assert active + vocabulary * h == pytest.approx(37.55e9, rel=1e-3)
    assert deepseek["model"]["layers_by_stage"] == [3, *[4] * 14, 2]
    # 4 of the 256 experts, of each of 4 layers.
    assert deepseek["model"]["parameters_by_stage"][1] == 4 * (moe - 252 * expert)


def test_deepseek_estimator(deepseek: dict) -> None:
    """Experts over 64 ranks do not keep ghost away; a dispatcher of unknown order does."""
    assert [m["estimator"] for m in deepseek["methods"]] == ["ghost", "finite_difference"]
    assert deepseek["refused"] == []
    flex = planned([*DEEPSEEK, "--moe-token-dispatcher-type", "flex"], 1024).plan()
    assert [m["estimator"] for m in flex["methods"]] == ["finite_difference", "ghost"]
    assert "--moe-token-dispatcher-type flex" in flex["chosen"]
    assert flex["chosen"].startswith("auto; ghost does not cover the parameter decoder.layers.0")


def test_deepseek_bytes(deepseek: dict) -> None:
    """Tokens of 8 experts out and back over 64 ranks, forward in D, both ways in C."""
    found = method(deepseek, "finite_difference")["sent"]["by_stage"][1]
    one_way = 63 / 64 * 4096 * 8 * (2 * 7168 * 2 + 2)
    assert found[traffic.EP] == pytest.approx(4 * one_way * (60 * 2 + 240 * 2 * 1.01))
    # Experts are on one rank each, so that only the rest is reduced, gathered and kept in shares.
    rest = deepseek["model"]["parameters_by_stage"][1] - 4 * 4 * 3 * 7168 * 2048
    assert found[traffic.DP] == pytest.approx(2 * 63 / 64 * 4 * rest)
    assert traffic.EXPERT_DP not in found


# --- what is refused ------------------------------------------------------------------------------


def test_refused_lines_are_the_runs_own() -> None:
    words = [*LLAMA, "--context-parallel-size", "2", "--dwm-meta-batch-size", "7"]
    found = planned(words, 1024)
    args = arguments(words)
    with pytest.raises(ValueError) as error:
        check_arguments(DWMConfig.from_args(args).with_defaults(), args)
    assert "; ".join(found.refused) == str(error.value)
    assert len(found.refused) == 2 and any(
        "--context-parallel-size" in row[0] for row in refusals()
    )
    assert any(line.startswith("--context-parallel-size 2 is not") for line in found.refused)


def test_refused_estimators_and_optimizers() -> None:
    flex = ["--moe-token-dispatcher-type", "flex"]
    found = planned([*DEEPSEEK, *flex, "--dwm-estimator", "ghost"], 1024)
    assert found.refused[0].startswith("--dwm-estimator ghost does not cover the parameter")
    found = planned([*LLAMA, "--dwm-lookahead", "current", "--dwm-estimator", "auto"], 1024)
    assert found.refused == [] and str(found.methods[0]) == "ghost, lookahead current"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--world-size is missing"),
        (["--world-size", "0"], "--world-size 0; it must be 1 or more"),
        (["--world-size", "1000", *LLAMA], "world size (1000) is not divisible"),
        (
            ["--world-size", "1024", *LLAMA, "--dwm-metainterval", "4"],
            "--dwm-metainterval: no such",
        ),
        (["--world-size", "1024", *(w for w in LLAMA if w != "--dwm")], "--dwm is missing"),
        (["--world-size", "1024", *NO_TOKENIZER], "--tokenizer-model no/such: there is no such"),
        (["--world-size", "1024", *LLAMA, "--num-layers", "33"], "Number of layers should be"),
        (
            ["--world-size", "1024", *LLAMA, "--spec", "own", "spec"],
            "--spec ['own', 'spec']: builds",
        ),
        (["--world-size", "1024", *LLAMA, "--mtp-num-layers", "1"], "--mtp-num-layers 1: builds"),
        (["--world-size", "1024", *without("--micro-batch-size")], "assert args.micro_batch_size"),
        (
            [*"--world-size 1024 --eval-global-batch-size 1024".split(), *LLAMA]
            + ["--global-batch-size", "1000"],
            "global batch size (1000) is not divisible",
        ),
        (
            ["--world-size", "1024", *without("--global-batch-size")]
            + ["--step-batch-size-schedule", "256"],
            'Invalid schedule entry "256"',
        ),
        (
            ["--world-size", "1024", *LLAMA, *MODEL, "--dwm-num-attention-heads", "0"],
            "--dwm-num-attention-heads is 0; it must be above 0",
        ),
        (
            ["--world-size", "1024", *LLAMA, *MODEL, "--dwm-init", "llm:x"],
            "--dwm-init is 'llm:x'; allowed are",
        ),
        (
            ["--world-size", "1024", *NO_TOKENIZER, "--tokenizer-type", "GPT2BPETokenizer"]
            + ["--tokenizer-model", "", "--vocab-file", "no/such"],
            "--vocab-file no/such: there is no such",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert command.main(words or ["script.py"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1
    assert error.startswith("megatron-dwm plan: error: ") and message in error


# --- what flags change ----------------------------------------------------------------------------


def test_batch_is_the_schedules_last() -> None:
    words = without("--global-batch-size")
    found = planned([*words, "--step-batch-size-schedule", "0:256,1B:1K"], 128).run
    assert found.batch.samples == 1000 and found.batch.meta_samples == 248
    assert any("schedule" in note and "1000 samples" in note for note in found.notes)


def test_steps_are_counted_in_the_schedules_last_batch() -> None:
    words = " ".join(without("--global-batch-size")).replace("--train-iters 10000", "").split()
    words += ["--train-samples", "65536"]
    shares = [
        planned([*words, *batch], 1024).run.weighting.share
        for batch in (
            ["--step-batch-size-schedule", "0:256 1B:1024"],
            ["--global-batch-size", "1024"],
        )
    ]
    assert shares[0] == shares[1]


def test_block_recomputation_is_of_each_virtual_stage() -> None:
    """2 stages of 4 chunks of 4 layers: 1 layer of each chunk is a quarter."""
    words = [*LLAMA, *"--pipeline-model-parallel-size 2".split()]
    words += "--num-layers-per-virtual-pipeline-stage 4".split()
    full = "--recompute-granularity full --recompute-num-layers 1 --recompute-method".split()
    plain, block, uniform = (
        planned(flags, 1024).run
        for flags in (words, [*words, *full, "block"], [*words, *full, "uniform"])
    )
    assert plain.layout.vp == 4

    def again(run: Any) -> tuple[float, float]:
        once = flops.micro_batch(run.model, run.model.stages[0], run)
        sent = traffic.micro_batch(run.model, run, 0, traffic.TRAINING)
        before = traffic.micro_batch(plain.model, plain, 0, traffic.TRAINING)
        return once.again, sent.bytes[traffic.TP] - before.bytes[traffic.TP]

    assert again(plain) == (0.0, 0.0) and min(again(uniform)) > 0
    assert again(block) == pytest.approx([part / 4 for part in again(uniform)])


def test_weighting_model_after_a_first_stage_without_layers() -> None:
    layout = ["--pipeline-model-parallel-layout", "E|t*16|t*16|L"]
    words = [*LLAMA, *layout, *MODEL, "--dwm-init", "llm:2"]
    found = planned(words, 1024)
    assert found.plan()["model"]["layers_by_stage"] == [0, 16, 16, 0]
    dwm = found.run.weighting.dwm
    assert dwm is not None and dwm.parameters() == 2 * (LINEAR + 2 * H) + V * H + H


def test_weighting_model_of_a_folder_has_its_head_dimension(tmp_path: Path) -> None:
    kind, config = MODELS["llama"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    own = DWMConfig(
        init=f"hf:{tmp_path}", hidden_size=32, num_attention_heads=4, num_query_groups=2
    )
    run = planned(LLAMA, 1024).run
    found = weighting_model(own, arguments(LLAMA), run.model, V).stages[0].layers[0]
    assert found.matrices[0].rows == (4 + 2 * 2) * 12 and found.attention == 2 * 4 * 12


def test_lookahead_heeds_the_losses_that_are_left_out() -> None:
    args, model = arguments(LLAMA), planned(LLAMA, 1024).run.model
    config = DWMConfig(enabled=True, mtp="plain").with_defaults()
    assert _methods(config, args, model)[0][0] == GHOST_CURRENT
    args.mtp_num_layers = 1
    assert _methods(config, args, model)[0][0] == GHOST_NEXT
    current = dataclasses.replace(config, lookahead="current")
    (line,) = _methods(current, args, model)[2]
    assert line.startswith("--dwm-lookahead current") and "--dwm-mtp plain" in line


@pytest.mark.parametrize(
    ("impl", "kind"),
    [("local", "DotProductAttention"), ("transformer_engine", "TEDotProductAttention")],
)
def test_softmax_offset_is_covered_without_dropout_alone(impl: str, kind: str) -> None:
    words = [*LLAMA, "--transformer-impl", impl, "--softmax-type", "learnable"]
    found = planned([*words, "--attention-dropout", "0.1"], 1024)
    assert found.reason == (
        "auto; ghost does not cover the parameter "
        f"decoder.layers.0.self_attention.core_attention.softmax_offset (of a {kind}: it uses "
        "--attention-dropout)"
    )
    found = planned([*words, "--attention-dropout", "0"], 1024)
    assert found.methods[0] == GHOST_CURRENT
    assert any(note.startswith("--softmax-type learnable: the offsets") for note in found.run.notes)


def test_vocabulary_is_counted_by_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(args: Any) -> None:
        args.padded_vocab_size = 512

    monkeypatch.setattr(planned_module, "build_tokenizer", build)
    words = [*NO_TOKENIZER[:-4], "--tokenizer-type", "GPT2BPETokenizer"]
    embedding = planned([*words, "--vocab-file", str(tmp_path)], 1024).run.model.stages[0].embedding
    assert embedding is not None and embedding.rows == 512


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--window-size (128,0)", "--window-size (128, 0): attention is counted over the full"),
        ("--optimizer sgd", "--optimizer sgd: the trainer's memory counts Adam's"),
    ],
)
def test_what_the_figures_leave_out_is_noted(flags: str, note: str) -> None:
    assert not any(found.startswith(note) for found in planned(LLAMA, 1024).run.notes)
    assert any(
        found.startswith(note) for found in planned([*LLAMA, *flags.split()], 1024).run.notes
    )


# --- the command ----------------------------------------------------------------------------------


def test_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The same plan as a table and as JSON; 1 where the run would be refused."""
    words = ["--world-size", "1024", "pretrain_gpt.py", *LLAMA, "--their-own-flag", "3"]
    assert command.main(words) == 0
    table = capsys.readouterr().out
    for text in ("6.74B parameters", "TP 4 x PP 4 x DP 64", "C meta", "theta+", "--their-own-flag"):
        assert text in table
    assert max(map(len, table.splitlines())) < 140
    assert command.main(["--json", *words, "--sft"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"]["parameters"] == 6_738_415_616
    assert len(plan["refused"]) == 1 and plan["refused"][0].startswith("--sft is not supported")
