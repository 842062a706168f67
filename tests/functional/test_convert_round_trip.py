"""Hugging Face -> Megatron at TP2 x PP2 -> Hugging Face, for every family, without a bit's change.

Chain that is proved: transformers' tiny random models -> `megatron-dwm convert import` -> the
stock trainer loads with `--load` and the flags that the import printed, at TP2 x PP2 (mixture of
experts with sequence parallelism, as Megatron demands, and at PP2 x EP2 too), takes a step at
learning rate zero and saves -> `megatron-dwm convert export` -> the original's bits, in fp32 and
bf16. In fp32, the logits that Megatron computed in the distributed run are those of transformers
to 1e-4.

NOT exercised: Transformer Engine's layers, which need a GPU; grouped GEMM of experts.
"""

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_dwm.cli.convert.command import main  # noqa: E402
from megatron_dwm.conversion import TorchDistCheckpoint, find_checkpoint, iter_hf_tensors  # noqa: E402
from tests import tiny_hf_models  # noqa: E402
from tests.functional.harness import host_flags, torchrun  # noqa: E402

LAYOUT = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
EXPERTS = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
TRAINING = """
    --seq-length 32 --mock-data --micro-batch-size 2 --global-batch-size 4 --train-iters 1
    --lr-decay-style constant --eval-iters 0 --eval-interval 100 --num-workers 0
    --save-interval 1 --log-interval 1 --seed 1234 --hidden-dropout 0 --attention-dropout 0
"""
# Flags of the model that --use-checkpoint-args does not take from the checkpoint.
NOT_IN_CHECKPOINT_ARGS = """
    --norm-epsilon 0.0001 --use-rope-scaling --kv-channels 12 --tokenizer-type NullTokenizer
    --vocab-size 250
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOTH = ("llama", "qwen2", "qwen3", "mixtral", "gpt2")
RUNS = [(name, "fp32") for name in tiny_hf_models.MODELS] + [(name, "bf16") for name in BOTH]


def imported(source, run, *flags):
    """Imports a model; returns the words of the flags that were printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        words = ["import", "--hf-path", str(source), "--megatron-path", str(run), *flags]
        assert main(words) == 0
    return shlex.split(printed.getvalue().partition("needs:\n\n")[2].replace("\\\n", " "))


def run_of(folder, name, words, model, *flags, lr="0"):
    """Describes one run for run_many.py."""
    host = host_flags()
    if model == "gpt2":
        # Its GELU is the tanh approximation, which Megatron computes in the fused kernel only.
        host = [flag for flag in host if flag != "--no-bias-gelu-fusion"]
    layout = {"mixtral": f"{LAYOUT} --sequence-parallel", "experts": EXPERTS}.get(model, LAYOUT)
    args = [*host, *words, *TRAINING.split(), *layout.split(), *flags, "--lr", lr]
    saved = str(folder / f"{name}.saved")
    env = {"LOGITS": str(folder / f"{name}.logits.pt")}
    return {"name": name, "args": [*args, "--save", saved], "env": env}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Imports all, takes all runs in four ranks, exports all; returns the folder."""
    folder = tmp_path_factory.mktemp("round_trip")
    runs = []
    for model in tiny_hf_models.MODELS:
        tiny_hf_models.write(model, folder / model)
    for model, dtype in RUNS:
        name = f"{model}.{dtype}"
        words = imported(folder / model, folder / f"{name}.run", "--dtype", dtype)
        runs.append(run_of(folder, name, words, model, *(["--bf16"] if dtype == "bf16" else [])))
    words = imported(folder / "mixtral", folder / "experts.run")
    runs.append(run_of(folder, "experts", words, "experts"))
    # Controls: a step that is taken, and a model that --use-checkpoint-args builds.
    words = imported(folder / "llama", folder / "trained.run")
    runs.append(run_of(folder, "trained", words, "llama", lr="1e-3"))
    load = ["--load", str(folder / "llama.fp32.run"), "--use-checkpoint-args"]
    words = [*load, *NOT_IN_CHECKPOINT_ARGS.split()]
    runs.append(run_of(folder, "checkpoint_args", words, "llama"))
    # A model that begins at random and is saved in the format of before: a file for each rank.
    words = imported(folder / "gpt2_exact_gelu", folder / "legacy.run")
    words = words[: words.index("--load")]
    runs.append(run_of(folder, "legacy", words, "", "--ckpt-format", "torch"))

    (folder / "runs.json").write_text(json.dumps(runs))
    done = torchrun(
        4,
        [str(ROOT / "tests/functional/run_many.py")],
        RUNS=str(folder / "runs.json"),
        OUT=str(folder),
        RUN_SCRIPT=str(ROOT / "tests/functional/_tiny_pretrain.py"),
        MEGATRON_DWM_HOST="cpu",
        # The fused GELU is compiled on a GPU; here it runs as it is written.
        TORCHDYNAMO_DISABLE="1",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for run in runs:
        for rank in range(4):
            result = json.loads((folder / f"{run['name']}.{rank}.json").read_text())
            assert result["code"] == 0, f"{run['name']}, rank {rank}: {result['stderr'][-3000:]}"
            assert len(result["steps"]) == 1
        words = [
            "--megatron-path",
            str(folder / f"{run['name']}.saved"),
            "--max-shard-size",
            "60KB",
        ]
        assert main(["export", *words, "--hf-path", str(folder / f"{run['name']}.back")]) == 0
    return folder


def tensors(folder):
    return dict(iter_hf_tensors(folder))


@pytest.mark.parametrize(("model", "dtype"), RUNS)
def test_weights_come_back_bit_exact(results, model, dtype):
    """The trainer loaded every bit at its parallel layout, and saved it again."""
    original, found = tensors(results / model), tensors(results / f"{model}.{dtype}.back")
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        assert found[name].dtype == DTYPES[dtype]
        assert torch.equal(found[name], tensor.to(DTYPES[dtype])), name


def test_experts_come_back_from_expert_parallel_ranks(results):
    original, found = tensors(results / "mixtral"), tensors(results / "experts.back")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def test_the_comparison_would_see_a_step(results):
    """After one step at a learning rate that is not zero, every weight differs."""
    original, found = tensors(results / "llama"), tensors(results / "trained.back")
    assert found.keys() == original.keys()
    assert not any(torch.equal(found[name], tensor) for name, tensor in original.items())


def logits_of(folder, tokens, roll=None):
    """Returns transformers' logits `[b, s, V]`; `roll` names a tensor to turn by half first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        if roll is not None:
            parameter = dict(model.named_parameters())[roll]
            size = max(parameter.shape)
            parameter.copy_(parameter.roll(size // 2, parameter.shape.index(size)))
        return model(tokens).logits


@pytest.mark.parametrize("model", tiny_hf_models.MODELS)
def test_logits_agree(results, model):
    """Megatron's logits are transformers', over the true vocabulary, to 1e-4."""
    probe = torch.load(results / f"{model}.fp32.logits.pt")
    expected = logits_of(results / model, probe["tokens"])
    assert expected.shape[-1] == tiny_hf_models.VOCAB_SIZE < probe["logits"].shape[-1]
    difference = (probe["logits"][..., : expected.shape[-1]] - expected).abs().max().item()
    print(f"{model}: largest difference {difference:.1e}, logits up to {expected.abs().max():.1f}")
    assert expected.abs().max() > 1
    assert difference <= 1e-4


@pytest.mark.parametrize(
    ("model", "tensor"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
        ("qwen2", "model.layers.1.self_attn.v_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("mixtral", "model.layers.1.mlp.gate.weight"),
        ("mixtral", "model.layers.1.mlp.experts.down_proj"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("gpt2", "transformer.wpe.weight"),
    ],
)
def test_the_tolerance_would_see_an_error(results, model, tensor):
    """One tensor of one layer, in another order, moves the logits by far more."""
    probe = torch.load(results / f"{model}.fp32.logits.pt")
    wrong = logits_of(results / model, probe["tokens"], roll=tensor)
    assert (probe["logits"][..., : wrong.shape[-1]] - wrong).abs().max() > 1e-2


def test_two_kinds_of_gelu_are_told_apart(results):
    """The tanh approximation and the exact function differ by more than the tolerance."""
    from transformers import AutoConfig, AutoModelForCausalLM

    probe = torch.load(results / "gpt2.fp32.logits.pt")
    config = AutoConfig.from_pretrained(results / "gpt2")
    config.activation_function = "gelu"
    model = AutoModelForCausalLM.from_pretrained(results / "gpt2", config=config).eval()
    with torch.no_grad():
        wrong = model(probe["tokens"]).logits
    assert (probe["logits"][..., : wrong.shape[-1]] - wrong).abs().max() > 1e-4


def test_the_checkpoint_describes_its_model(results):
    """`--use-checkpoint-args` builds the same model from the import's own arguments."""
    original, found = tensors(results / "llama"), tensors(results / "checkpoint_args.back")
    assert all(torch.equal(found[name], original[name]) for name in original)
    ours, theirs = (
        torch.load(results / f"{n}.logits.pt") for n in ("checkpoint_args", "llama.fp32")
    )
    assert torch.equal(ours["logits"], theirs["logits"])


@pytest.mark.parametrize("model", tiny_hf_models.MODELS)
def test_import_writes_what_the_trainer_writes(results, model):
    """Same names, shapes and dtypes; only the MoE norm has a second name."""
    ours, theirs = (
        TorchDistCheckpoint(find_checkpoint(results / f"{model}.fp32.{kind}")).tensors
        for kind in ("run", "saved")
    )
    second = {"decoder.layers.pre_mlp_layernorm.weight"} if model == "mixtral" else set()
    assert ours.keys() - theirs.keys() == second
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    assert all(ours[n] == theirs[n] for n in theirs if n not in vocabulary)


def test_a_legacy_checkpoint_of_the_trainer_is_read(results):
    """`--ckpt-format torch` at TP2 x PP2, exported, has the logits that Megatron computed."""
    folders = [path.name for path in (results / "legacy.saved/iter_0000001").iterdir()]
    assert sorted(folders) == [f"mp_rank_{t:02d}_{p:03d}" for t in range(2) for p in range(2)]
    probe = torch.load(results / "legacy.logits.pt")
    found = logits_of(results / "legacy.back", probe["tokens"])
    difference = (probe["logits"][..., : found.shape[-1]] - found).abs().max().item()
    print(f"legacy: largest difference {difference:.1e}, logits up to {found.abs().max():.1f}")
    assert difference <= 1e-4
    wrong = logits_of(
        results / "legacy.back", probe["tokens"], "transformer.h.1.attn.c_attn.weight"
    )
    assert (probe["logits"][..., : wrong.shape[-1]] - wrong).abs().max() > 1e-3
