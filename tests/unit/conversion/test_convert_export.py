"""`megatron-dwm convert export` on checkpoints written by hand, in the layouts that a run may have.

The checkpoints have what a trainer's have: optimizer and weighting-model tensors beside the model's
and arguments in `common.pt` (as Megatron wrote them before 0.18). Logits are compared in
tests/functional; here it is names, cuts, dtypes and refusals.
"""

import json

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from test_conversion import hf_layer, megatron_args

from megatron_dwm.cli.convert.command import main
from megatron_dwm.conversion import (
    TorchDistCheckpoint,
    hf_layer_to_megatron,
    iter_hf_tensors,
)
from megatron_dwm.conversion.families import llama_from_args

LAYOUTS = ("stacked", "per_layer", "per_layer_local_norms", "per_layer_split_gate")


def model_tensors(layout="stacked", tied=False):
    """Returns Megatron's tensors of a two-layer model and Hugging Face's of the same."""
    shape = llama_from_args(megatron_args())
    embedding, output, norm = torch.rand(8, 12), torch.rand(8, 12), torch.rand(12)
    megatron = {
        "embedding.word_embeddings.weight": embedding,
        "decoder.final_layernorm.weight": norm,
    }
    hf = {"model.embed_tokens.weight": embedding[:7], "model.norm.weight": norm}
    if not tied:
        megatron["output_layer.weight"], hf["lm_head.weight"] = output, output[:7]
    layers = []
    for index in range(2):
        layer = hf_layer(shape)
        hf |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
        fused = layout != "per_layer_local_norms"
        layers.append(hf_layer_to_megatron(layer, shape, fused_layernorm=fused))
    for index, layer in enumerate(layers):
        if layout == "per_layer_split_gate":
            gate, up = layer.pop("mlp.linear_fc1.weight").chunk(2)
            layer |= {"mlp.linear_fc1.weight_w": gate, "mlp.linear_fc1.weight_v": up}
        if layout != "stacked":
            megatron |= {f"decoder.layers.{index}.{name}": t for name, t in layer.items()}
    if layout == "stacked":
        for name in layers[0]:
            megatron[f"decoder.layers.{name}"] = torch.stack([layer[name] for layer in layers])
    return megatron, hf


def write_run(folder, tensors, **args):
    """Writes iteration 5 of a run with these model tensors."""
    iteration = folder / "iter_0000005"
    state = {
        **tensors,
        "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight": torch.rand(3),
        "dwm.decoder.layers.0.mlp.linear_fc2.weight": torch.rand(3),
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": torch.rand(1),
    }
    state = {name: tensor.clone() for name, tensor in state.items()}
    dist_checkpoint.save(state, checkpoint_id=iteration, no_dist=True)
    given = {"tokenizer_type": "NullTokenizer", "vocab_size": 7, **args}
    common = {"args": megatron_args(**given), "iteration": 5}
    torch.save(common, iteration / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return folder


def export(run, out, *flags):
    """Runs the command line; returns its status."""
    return main(["export", "--megatron-path", str(run), "--hf-path", str(out), *flags])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_gives_the_same_model(tmp_path, layout, tied):
    tensors, expected = model_tensors(layout, tied)
    run = write_run(tmp_path / "run", tensors, untie_embeddings_and_output_weights=not tied)
    assert export(run, tmp_path / "out", "--max-shard-size", "1KB") == 0
    found = dict(iter_hf_tensors(tmp_path / "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"], "scratch left behind"


def test_a_layer_of_a_stack_is_read_alone(tmp_path):
    tensors, _ = model_tensors()
    checkpoint = TorchDistCheckpoint(write_run(tmp_path, tensors) / "iter_0000005")
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.load(name), tensor)
        assert torch.equal(checkpoint.load(name, 1), tensor[1])


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype_and_single_file(tmp_path, flag, dtype):
    tensors, expected = model_tensors()
    assert export(write_run(tmp_path / "run", tensors), tmp_path / "out", "--dtype", flag) == 0
    found = dict(iter_hf_tensors(tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").is_file()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_zero_centered_norms_become_plain(tmp_path):
    """Megatron stores gamma - 1 with `--apply-layernorm-1p`; Llama multiplies by gamma."""
    tensors, expected = model_tensors()
    run = write_run(tmp_path / "run", tensors, layernorm_zero_centered_gamma=True)
    assert export(run, tmp_path / "out") == 0
    found = dict(iter_hf_tensors(tmp_path / "out"))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor + 1 if "norm" in name else tensor), name


def test_vocabulary_is_cut_as_told(tmp_path, capsys):
    tensors, _ = model_tensors()
    run = write_run(tmp_path / "run", tensors, vocab_size=None)
    assert export(run, tmp_path / "padded") == 0
    assert "all 8 rows are kept" in capsys.readouterr().err
    assert export(run, tmp_path / "cut", "--vocab-size", "6") == 0
    sizes = [
        json.loads((tmp_path / n / "config.json").read_text())["vocab_size"]
        for n in ("padded", "cut")
    ]
    assert sizes == [8, 6]
    assert export(run, tmp_path / "long", "--vocab-size", "9") == 2
    assert "--vocab-size is 9, and the checkpoint's embedding has 8 rows" in capsys.readouterr().err


# --------------------------------------------------------------------------- refusals


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _put(name, *size):
    return lambda tensors: tensors.update({name: torch.zeros(size)})


FC2 = "mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("layout", "change", "named"),
    [
        ("stacked", _drop("output_layer.weight"), "output_layer.weight is missing"),
        ("stacked", _drop(f"decoder.layers.{FC2}"), f"{FC2} is missing"),
        ("per_layer", _drop(f"decoder.layers.1.{FC2}"), f"decoder.layers.1.{FC2} is missing"),
        ("per_layer", _put(f"decoder.layers.2.{FC2}", 12, 10), f"decoder.layers.2.{FC2}"),
        ("stacked", _put(f"decoder.layers.{FC2}", 2, 12, 9), "(12, 9), needs (12, 10)"),
        ("stacked", _put("decoder.layers.mlp.linear_fc1.bias", 2, 20), "bias (20,) is unknown"),
        ("stacked", _put("decoder.layers.mlp.router.weight", 3, 3), "mlp.router.weight (3, 3)"),
        ("stacked", _put("mtp.layers.0.eh_proj.weight", 3), "mtp.layers.0.eh_proj.weight"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, capsys, layout, change, named):
    tensors, _ = model_tensors(layout)
    change(tensors)
    assert export(write_run(tmp_path / "run", tensors), tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_model_is_one_line(tmp_path, capsys):
    tensors, _ = model_tensors()
    run = write_run(tmp_path / "run", tensors, normalization="LayerNorm")
    assert export(run, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "--normalization is 'LayerNorm'" in message and message.count("\n") == 1


def test_output_folder_is_protected(tmp_path, capsys):
    tensors, _ = model_tensors()
    run, out = write_run(tmp_path / "run", tensors), tmp_path / "out"
    out.mkdir()
    assert export(run, out) == 0, "an empty folder may be filled"
    (out / "stale.txt").touch()
    assert export(run, out) == 2
    assert "is not empty; give another folder or --force" in capsys.readouterr().err
    assert export(run, out, "--force") == 0
    assert not (out / "stale.txt").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").touch()
    assert export(run, tmp_path / "home", "--force") == 2
    assert "is not an exported model" in capsys.readouterr().err
    assert (tmp_path / "home" / "letters.txt").exists()


def test_flags_are_refused_by_name(tmp_path, capsys):
    tensors, _ = model_tensors()
    run = write_run(
        tmp_path / "run",
        tensors,
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model="/absent/t.model",
    )
    assert export(run, tmp_path / "out") == 2
    assert "--tokenizer-model /absent/t.model (from the checkpoint)" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "--max-shard-size", "much") == 2
    assert "--max-shard-size is 'much'" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "--iteration", "6") == 2
    assert "no checkpoint iter_0000006; it has iter_0000005" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "--tokenizer-model", "none") == 0
    assert "No tokenizer is written" in capsys.readouterr().err


def test_damaged_weights_leave_nothing_behind(tmp_path, capsys):
    tensors, _ = model_tensors()
    run = write_run(tmp_path / "run", tensors)
    for path in (run / "iter_0000005").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:2000])
    assert export(run, tmp_path / "out") == 2
    assert "failed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("symbols", [[], ["<sep>", "<|im|>"]])
def test_sentencepiece_ids_are_kept(tmp_path, kind, rule, symbols):
    """`AutoTokenizer` reads probe texts as SentencePiece does, with symbols inside words too."""
    import sentencepiece
    from transformers import AutoTokenizer

    from megatron_dwm.conversion.tokenizer_files import PROBES, find_tokenizer

    words = (
        "the weight of a sample is what the model learns from it Straße naïve 日本 123 x".split()
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{a} {b} {a}{b}" for a in words for b in words]),
        model_prefix=str(tmp_path / "tiny"),
        vocab_size=330,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        user_defined_symbols=symbols,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = str(tmp_path / "tiny.model")
    tokenizer = find_tokenizer(megatron_args(tokenizer_model=model, tokenizer_type="X"), None)
    out = tmp_path / "out"
    out.mkdir()
    assert tokenizer.write(out) is None
    (out / "config.json").write_text('{"model_type": "llama"}')
    ours = AutoTokenizer.from_pretrained(out)
    truth = sentencepiece.SentencePieceProcessor(model_file=model)
    assert tokenizer.vocab_size == truth.get_piece_size() == len(ours)
    for text in (*PROBES, "the<sep>model <|im|> learns<sep>"):
        ids = truth.encode(text)
        assert ours(text).input_ids == ids, text
        assert ours.decode(ids) == truth.decode(ids), text


def test_hugging_face_tokenizer_is_copied(tmp_path):
    """A tokenizer folder is carried without what lies beside it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder, out = tmp_path / "tokenizer", tmp_path / "out"
    raw = Tokenizer(models.WordLevel({"<e>": 0, "<u>": 1, "a": 2, "b": 3}, unk_token="<u>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", unk_token="<u>")
    fast.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    tensors, _ = model_tensors()
    changes = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}
    assert export(write_run(tmp_path / "run", tensors, **changes), out) == 0
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (4, 0, None)
