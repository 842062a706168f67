"""A model that Megatron trained gives the same logits after export to Hugging Face.

Chain that is proved: stock trainer (TP x PP) -> `torch_dist` checkpoint -> `megatron-dwm convert
export` -> `AutoModelForCausalLM`, with the logits that Megatron itself computed after training,
in the distributed run, as the truth. Weights are drawn wide (init std 0.2), so that a wrong head
order, RoPE base or norm would move the logits by far more than the tolerance.

NOT exercised: Transformer Engine's layers, bf16 runs, checkpoints of other Megatron versions (the
unit tests write their layouts by hand).
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_dwm.cli.main import main  # noqa: E402
from megatron_dwm.hosts.cpu import CPU_FLAGS  # noqa: E402
from tests.functional.harness import torchrun  # noqa: E402

COMMON = """
    --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 48
    --max-position-embeddings 64 --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --init-method-std 0.2 --hidden-dropout 0
    --attention-dropout 0 --mock-data --micro-batch-size 2 --global-batch-size 4
    --train-iters 2 --lr 1e-2 --lr-decay-style constant --eval-iters 0 --eval-interval 100
    --num-workers 0 --save-interval 2 --ckpt-format torch_dist --seed 1234
"""
RUNS = {
    # Every number differs from its default, and the head dimension from h / n.
    "tp2_pp2_untied_gqa": (
        4,
        """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers 4
        --group-query-attention --num-query-groups 2 --kv-channels 24 --rotary-base 500000
        --use-rope-scaling --norm-epsilon 1e-3
        --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer --vocab-size 250""",
    ),
    "tp1_tied_mha_tokenizer": (
        1,
        """--num-layers 2 --tokenizer-type SentencePieceTokenizer
        --tokenizer-model {tokenizer}""",
    ),
}
TOKENIZER_SIZE = 300


def _train_tokenizer(folder: Path) -> Path:
    import sentencepiece

    words = "the weight of a sample is what the model learns from it Straße naïve 日本 123 x"
    lines = [f"{a} {b}  {a}{b}" for a in words.split() for b in words.split()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tiny"),
        vocab_size=TOKENIZER_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tiny.model"


@pytest.fixture(scope="module", params=list(RUNS))
def exported(request, tmp_path_factory):
    """Trains, exports, and returns the run's name, its logits, its folder and the export."""
    folder = tmp_path_factory.mktemp(request.param)
    processes, flags = RUNS[request.param]
    tokenizer = _train_tokenizer(folder) if "{tokenizer}" in flags else None
    script = str(ROOT / "tests/functional/_tiny_pretrain.py")
    done = torchrun(
        processes,
        [
            *(script, str(folder / "logits.pt"), "--save", str(folder / "run"), *CPU_FLAGS),
            *COMMON.split(),
            *flags.format(tokenizer=tokenizer).split(),
        ],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    out = folder / "hf"
    paths = ["--megatron-path", str(folder / "run"), "--hf-path", str(out)]
    # So small that there are several files.
    shards = ["--max-shard-size", "100KB"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["convert", "export", *paths, *shards]) == 0
    assert "iteration 2" in printed.getvalue()
    return request.param, torch.load(folder / "logits.pt"), tokenizer, out


def test_logits_agree(exported):
    """Logits of the exported model are Megatron's, over the true vocabulary, to 1e-4."""
    from transformers import AutoModelForCausalLM

    name, probe, tokenizer, out = exported
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model(probe["tokens"]).logits
    true_size = TOKENIZER_SIZE if tokenizer else 250
    assert logits.shape[-1] == true_size < probe["logits"].shape[-1]
    expected = probe["logits"][..., :true_size]
    difference = (logits - expected).abs().max().item()
    print(f"{name}: largest difference {difference:.1e}, logits up to {expected.abs().max():.1f}")
    assert expected.abs().max() > 1
    assert difference <= 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.5}},
        {"rms_norm_eps": 1e-2},
        {"swap": "self_attn.k_proj"},
        {"swap": "mlp.up_proj"},
    ],
    ids=["rope_base", "rope_scaling", "norm_eps", "kv_heads", "gate_up"],
)
def test_the_comparison_would_see_an_error(exported, change):
    """The tolerance is far below what one wrong number or swapped tensor does to the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, probe, _, out = exported
    config = json.loads((out / "config.json").read_text())
    numbers = {key: value for key, value in change.items() if key != "swap"}
    config = AutoConfig.for_model(**{**config, **numbers})
    model = AutoModelForCausalLM.from_pretrained(out, config=config)
    with torch.no_grad():
        if "swap" in change:
            weight = model.get_submodule(f"model.layers.0.{change['swap']}").weight
            weight.copy_(weight.roll(weight.shape[0] // 2, 0))
        logits = model(probe["tokens"]).logits
    assert (logits - probe["logits"][..., : logits.shape[-1]]).abs().max() > 1e-2


def test_folder_is_sharded_and_tied_as_trained(exported):
    """The index names every file, and a tied model carries no output layer of its own."""
    _, _, tokenizer, out = exported
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name for path in out.glob("*.safetensors")}
    assert set(weight_map.values()) == files and len(files) > 1
    assert ("lm_head.weight" in weight_map) == (tokenizer is None)


def test_tokenizer_is_carried(exported):
    """`AutoTokenizer` gives SentencePiece's ids; a run without a tokenizer exports none."""
    _, _, tokenizer, out = exported
    if tokenizer is None:
        assert not list(out.glob("tokenizer*"))
        return
    import sentencepiece
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(out)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for text in ("the model learns", "  two  spaces ", "Straße 日本 ☃", "line\nbreak 1234", ""):
        ids = truth.encode(text)
        assert ours(text).input_ids == ids
        assert ours.decode(ids) == truth.decode(ids)
    assert (ours.bos_token_id, ours.eos_token_id) == (truth.bos_id(), truth.eos_id())
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == truth.eos_id()


def test_round_trip_through_the_init_reader(exported):
    """`iter_megatron_tensors` gives back the checkpoint's own tensors, for a run to start from."""
    from megatron_dwm.conversion import (
        TorchDistCheckpoint,
        find_checkpoint,
        iter_megatron_tensors,
        read_hf_config,
    )

    _, _, _, out = exported
    checkpoint = TorchDistCheckpoint(find_checkpoint(out.parent / "run"))
    vocab_size = read_hf_config(out).vocab_size
    count = 0
    for name, tensor in iter_megatron_tensors(out, fused_layernorm=True):
        if name.startswith("decoder.layers."):
            _, _, index, suffix = name.split(".", 3)
            stored = checkpoint.load(f"decoder.layers.{suffix}", int(index))
        else:
            stored = checkpoint.load(name)
            stored = stored[:vocab_size] if stored.dim() == 2 else stored
        assert torch.equal(tensor, stored), name
        count += 1
    assert count == checkpoint.args.num_layers * 6 + len(checkpoint.tensors) - 6
