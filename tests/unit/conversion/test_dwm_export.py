"""`convert export-dwm` on weighting models written by hand: forms, tokenizers, refusals.

Scores are compared with Megatron's in tests/functional/test_dwm_conversion.py; here with what is
computed from the tensors of the backbone that transformers loads.
"""

import json

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from test_conversion import megatron_args

from megatron_dwm.cli.convert.command import main
from megatron_dwm.conversion import ConversionError, ModelShape, iter_hf_tensors
from megatron_dwm.conversion.dwm_classifier import read_classifier
from megatron_dwm.conversion.families import FAMILIES

VOCABULARY, PADDED = 7, 8
WORDS = "embedding.word_embeddings.weight"
LLM = {"dwm_init": "llm:2", "seq_length": 16, "dwm_temperature": 0.5}
# Flags of the language model whose layers each form has.
FORMS = {
    "llama": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
}


def described(**changes):
    """What a checkpoint says of a weighting model of the form of `megatron_args`."""
    values = dict(
        num_layers=2,
        hidden_size=12,
        ffn_hidden_size=10,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        pooling="last",
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func="silu",
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=False,
        position_embedding_type="rope",
        rotary_base=500.0,
        rotary_percent=1.0,
        rope_scaling=False,
        vocab_size=VOCABULARY,
    )
    return {**values, **changes}


def tensors_of(family="llama"):
    """Returns random tensors of a model, as its checkpoint names them without `dwm.`."""
    numbers = {k: v for k, v in described().items() if k in ModelShape.__dataclass_fields__}
    shape = ModelShape(
        **{**numbers, "vocab_size": PADDED}, max_position_embeddings=16, tied=True, family=family
    )
    torch.manual_seed(1)
    tensors = {r.megatron: torch.randn(r.shape) for r in FAMILIES[family].rules(shape)}
    return {**tensors, "score.weight": torch.randn(1, 12)}


def write(folder, tensors, shape, args=None, name="iter_0000005"):
    """Writes a run with one checkpoint, or with one snapshot, which has no arguments."""
    state = {f"dwm.{key}": tensor.clone() for key, tensor in tensors.items()}
    dist_checkpoint.save(state, checkpoint_id=folder / name, no_dist=True)
    common = {"dwm": {"shape": shape}} if shape else {}
    if args is not None:
        common |= {"args": args, "iteration": 5}
        (folder / "latest_checkpointed_iteration.txt").write_text("5")
    torch.save(common, folder / name / "common.pt")
    return folder


def llm_args(**changes):
    given = {"tokenizer_type": "NullTokenizer", "vocab_size": VOCABULARY, "kv_channels": 4, **LLM}
    return megatron_args(**{**given, **changes})


def export(run, out, *flags):
    """Runs the command line; returns its status."""
    return main(["export-dwm", "--megatron-path", str(run), "--hf-path", str(out), *flags])


# ------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("family", list(FORMS))
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_layers_of_each_form_are_scored(tmp_path, family, pooling):
    """transformers finds every tensor, and the score is the head on the pooled states."""
    from transformers import AutoModelForSequenceClassification

    shape = described(pooling=pooling, **FORMS[family])
    tensors = tensors_of(family)
    run = write(tmp_path / "run", tensors, shape, llm_args(**FORMS[family]))
    out = tmp_path / f"{family}_{pooling}"
    assert export(run, out) == 0
    model, report = AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True, trust_remote_code=pooling == "mean"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert family in type(model).__mro__[1].__module__ or pooling == "last"
    stored = dict(iter_hf_tensors(out))
    assert torch.equal(stored["model.embed_tokens.weight"], tensors[WORDS][:VOCABULARY])
    assert torch.equal(stored["score.weight"], tensors["score.weight"])
    ids = torch.tensor([[1, 5, 2, 6]])
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
        pooled = states[-1] if pooling == "last" else states.mean(0)
        other = states.mean(0) if pooling == "last" else states[-1]
        expected, wrong = (tensors["score.weight"] @ v for v in (pooled, other))
        assert (model(ids).logits[0] - expected).abs() < 1e-5
    assert (expected - wrong).abs() > 1e-3
    config = json.loads((out / "config.json").read_text())
    assert (config["dwm_temperature"], config["dwm_seq_length"]) == (0.5, 16)


@pytest.mark.parametrize(("init", "offset"), [("llm:2", 1), ("random", 0)])
def test_zero_centered_norms_are_those_of_the_language_model_only(tmp_path, init, offset):
    args = llm_args(layernorm_zero_centered_gamma=True, dwm_init=init)
    tensors = tensors_of()
    assert export(write(tmp_path / "run", tensors, described(), args), tmp_path / "out") == 0
    found = dict(iter_hf_tensors(tmp_path / "out"))
    norm = tensors["decoder.final_layernorm.weight"]
    assert torch.equal(found["model.norm.weight"], norm + offset)


def test_scaled_rope_has_the_factor_that_it_was_built_with(tmp_path):
    """Kept by the model itself; the language model's flag is ignored by Megatron's builders."""
    for name, changes, args, factor in (
        ("hf", {"rope_scaling_factor": 32.0}, {"dwm_init": "hf:gone"}, 32.0),
        ("llm", {}, {"use_rope_scaling": True, "rope_scaling_factor": 4.0}, 8.0),
    ):
        shape = described(rope_scaling=True, **changes)
        run = write(tmp_path / name, tensors_of(), shape, llm_args(**args))
        assert export(run, tmp_path / f"{name}_out") == 0
        scaling = read_classifier(tmp_path / f"{name}_out").config["rope_scaling"]
        assert (scaling["rope_type"], scaling["factor"]) == ("llama3", factor)


def test_dtype_and_padding_of_the_vocabulary(tmp_path):
    run = write(tmp_path / "run", tensors_of(), described(), llm_args())
    assert export(run, tmp_path / "out", "--dtype", "bf16") == 0
    found = dict(iter_hf_tensors(tmp_path / "out"))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert found["model.embed_tokens.weight"].shape == (VOCABULARY, 12)


def test_snapshots_take_the_arguments_beside_them(tmp_path, capsys):
    run = write(tmp_path / "run", tensors_of(), described(), llm_args())
    for stage in (1, 2):
        changed = {**tensors_of(), "score.weight": torch.full((1, 12), float(stage))}
        write(run, changed, described(), name=f"dwm_stage_00{stage}")
    assert export(run, tmp_path / "out", "--all-stages") == 0
    for stage in (1, 2):
        folder = tmp_path / "out" / f"dwm_stage_00{stage}"
        assert dict(iter_hf_tensors(folder))["score.weight"].unique().tolist() == [stage]
        assert read_classifier(folder).config["max_position_embeddings"] == 16
    assert "carries no training arguments" not in capsys.readouterr().err
    assert export(run, tmp_path / "out", "--all-stages") == 2
    assert "is not empty; give another folder or --force" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "--all-stages", "--force") == 0
    alone = write(tmp_path / "alone", tensors_of(), described(), name="dwm_stage_001")
    assert export(alone / "dwm_stage_001", tmp_path / "one") == 0
    assert "carries no training arguments" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("shape", "args", "said"),
    [
        ({"normalization": "LayerNorm"}, {}, "normalization is 'LayerNorm', needs 'RMSNorm'"),
        ({"activation_func": "gelu"}, {}, "activation_func is 'gelu'"),
        ({"position_embedding_type": "none"}, {}, "position_embedding_type is 'none'"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, {}, "are both set"),
        ({"hidden_size": 24}, {"dwm_init": "random"}, "(1, 24) is needed"),
        ({"num_layers": 3}, {"dwm_init": "random"}, "decoder.layers.2.input_layernorm"),
        ({}, {"window_size": (4, 0)}, "--window-size"),
        ({}, {"num_experts": 4, "moe_router_topk": 2}, "--dwm-init llm:2"),
        ({"pooling": "max"}, {}, "the pooling is 'max'"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, capsys, shape, args, said):
    run = write(tmp_path / "run", tensors_of(), described(**shape), llm_args(**args))
    assert export(run, tmp_path / "out") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message and message.startswith("megatron-dwm convert export-dwm: error:")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("score.weight"), "lacks its score.weight"),
        (lambda t: t.pop("decoder.layers.1.mlp.linear_fc2.weight"), "linear_fc2.weight is missing"),
        (lambda t: t.update({"decoder.layers.0.x.weight": torch.rand(2)}), "x.weight (2,) is unkn"),
        (lambda t: t.update({"score.weight": torch.rand(2, 12)}), "(1, 12) is needed"),
        (lambda t: t.update({WORDS: torch.rand(6, 12)}), "6 rows of vocabulary, 7 are needed"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, capsys, change, said):
    tensors = tensors_of()
    change(tensors)
    assert export(write(tmp_path / "run", tensors, described(), llm_args()), tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(tmp_path, capsys):
    stock = write(tmp_path / "stock", tensors_of(), None, llm_args())
    run = write(tmp_path / "run", tensors_of(), described(), llm_args())
    for flags, said in (
        ([stock, tmp_path / "out"], "holds no weighting model"),
        ([tmp_path / "gone", tmp_path / "out"], "is not a folder"),
        ([tmp_path / "gone", tmp_path / "out", "--all-stages"], "is not a folder"),
        ([run, tmp_path / "out", "--all-stages"], "has no dwm_stage_* snapshots"),
        ([run, tmp_path / "out", "--iteration", "6"], "no checkpoint iter_0000006"),
    ):
        assert export(*flags) == 2
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1


# -------------------------------------------------------------------------------------- tokenizers


def write_tokenizer(folder, **tokens):
    """Writes a tokenizer of five words that puts <s> before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<e>": 1, "<u>": 2, "a": 3, "b": 4}
    raw = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "<e>", "unk_token": "<u>", **tokens}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tokens", [{}, {"pad_token": "<e>"}, {"pad_token": "<pad>"}])
@pytest.mark.parametrize("special", [True, False])
def test_tokenizer_reads_as_in_training_and_pads_with_a_token_of_its_own(tmp_path, tokens, special):
    """A text that ends with the end-of-document token keeps it when it is padded."""
    from transformers import AutoTokenizer

    args = llm_args(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=write_tokenizer(tmp_path / "tokenizer", **tokens),
        tokenizer_hf_no_include_special_tokens=not special,
    )
    size = 6 if tokens.get("pad_token") == "<pad>" else 5
    run = write(tmp_path / "run", tensors_of(), described(vocab_size=size), args)
    assert export(run, tmp_path / "out") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    begin = [0] if special else []
    padded = tokenizer(["a b <e>", "b"], padding=True).input_ids
    pad = tokenizer.pad_token_id
    assert padded[0] == [*begin, 3, 4, 1]
    assert padded[1] == [*begin, 4, pad, pad]
    assert pad == 5
    config = read_classifier(tmp_path / "out").config
    assert (config["pad_token_id"], config["vocab_size"]) == (5, 6)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    rows = dict(iter_hf_tensors(tmp_path / "out"))["model.embed_tokens.weight"]
    assert rows.shape[0] == 6


def test_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    other = write_tokenizer(tmp_path / "tokenizer")
    run = write(tmp_path / "run", tensors_of(), described(vocab_size=4), llm_args())
    assert export(run, tmp_path / "out", "--tokenizer-model", other) == 2
    assert "the tokenizer has 5 tokens" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "--tokenizer-model", "none") == 0


# ------------------------------------------------------------------------------- reading a folder


def test_labels_and_pooling_are_read_without_code(tmp_path):
    path = tmp_path / "config.json"
    for config, labels, pooling in (
        ({"architectures": ["LlamaForCausalLM"]}, 0, "last"),
        ({"architectures": ["LlamaForSequenceClassification"]}, 2, "last"),
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}, 1, "last"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "x"}}, 1, "last"),
        (
            {
                "architectures": ["MeanPooledLlamaForSequenceClassification"],
                "model_type": "dwm_mean_llama",
                "auto_map": {"AutoConfig": "modeling_dwm.X"},
                "id2label": {"0": "weight"},
                "dwm_pooling": "mean",
            },
            1,
            "mean",
        ),
    ):
        path.write_text(json.dumps(config))
        found = read_classifier(tmp_path)
        assert (found.labels, found.pooling) == (labels, pooling)
        assert "auto_map" not in found.config
    assert found.config["model_type"] == "llama"
    for text in ("[]", "{", json.dumps({"dwm_pooling": "max"})):
        path.write_text(text)
        with pytest.raises(ConversionError, match=r"config\.json"):
            read_classifier(tmp_path)
