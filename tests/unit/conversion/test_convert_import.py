"""`megatron-dwm convert import` and back again, in one process, for every family.

The Hugging Face folders are transformers' own; that the stock trainer loads what is written, and
computes the same logits, is shown in tests/functional. Here it is bits, names, layouts, padding,
memory and refusals.
"""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from safetensors.torch import load_file, save_file

from megatron_dwm.cli.convert.command import main
from megatron_dwm.conversion import (
    TorchDistCheckpoint,
    find_checkpoint,
    iter_hf_tensors,
)
from megatron_dwm.conversion.families import (
    FAMILIES,
    hf_config,
    shape_from_args,
    shape_from_config,
)
from tests import tiny_hf_models

ROOT = Path(__file__).resolve().parents[3]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Returns folder and tensors of a model by name; tests must not change the folder."""
    return tiny_hf_models.cached(tmp_path_factory.mktemp)


def convert(command, *words):
    """Runs the command line; returns its status."""
    return main([command, *map(str, words)])


def take_in(source, out, *flags):
    return convert("import", "--hf-path", source, "--megatron-path", out, *flags)


def write_out(run, out, *flags):
    return convert("export", "--megatron-path", run, "--hf-path", out, *flags)


def changed(folder, out, *, drop=(), put=None, **config):
    """Copies a model into one file, with tensors and keys of config.json changed."""
    shutil.copytree(folder, out)
    tensors = dict(iter_hf_tensors(folder))
    for path in out.glob("model*"):
        path.unlink()
    tensors = {name: t.clone() for name, t in tensors.items() if name not in drop} | (put or {})
    save_file(tensors, out / "model.safetensors")
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, **config}))
    return out


# --------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", tiny_hf_models.MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact(tmp_path, hf, name, dtype):
    """Import and export give back every bit, in every dtype and size of file."""
    folder, tensors = hf(name)
    assert take_in(folder, tmp_path / "run", "--dtype", dtype) == 0
    flags = ("--max-shard-size", "30KB") if dtype == "bf16" else ()
    assert write_out(tmp_path / "run", tmp_path / "back", *flags) == 0
    found = dict(iter_hf_tensors(tmp_path / "back"))
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == DTYPES[dtype]
        assert torch.equal(found[key], tensor.to(DTYPES[dtype])), key
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 if flags else len(files) == 1
    shapes = [
        shape_from_config(json.loads((path / "config.json").read_text()))
        for path in (folder, tmp_path / "back")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", tiny_hf_models.MODELS)
def test_transformers_reads_the_export_completely(tmp_path, hf, name):
    """No tensor is left over or made up, and the logits are those of the original."""
    from transformers import AutoModelForCausalLM

    folder, _ = hf(name)
    assert take_in(folder, tmp_path / "run") == 0
    assert write_out(tmp_path / "run", tmp_path / "back") == 0
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        ours = model.eval()(tokens).logits
        truth = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert torch.equal(ours, truth)


@pytest.mark.parametrize("name", tiny_hf_models.MODELS)
def test_arguments_say_what_the_model_is(tmp_path, hf, name):
    """The shape read from the import's arguments is that of config.json."""
    folder, _ = hf(name)
    assert take_in(folder, tmp_path / "run", "--make-vocab-size-divisible-by", "7") == 0
    checkpoint = TorchDistCheckpoint(find_checkpoint(tmp_path / "run"))
    shape = shape_from_args(checkpoint.args)
    expected = shape_from_config(json.loads((folder / "config.json").read_text()))
    assert shape.vocab_size == 252
    assert dataclasses.replace(shape, vocab_size=250) == expected
    assert checkpoint.iteration == 0 and checkpoint.folder.name == "release"


# --------------------------------------------------------------------------- layouts


def test_gpt2_heads_are_interleaved(tmp_path, hf):
    """`c_attn` has all queries, keys, values side by side; Megatron has them head by head."""
    folder, tensors = hf("gpt2")
    assert take_in(folder, tmp_path) == 0
    checkpoint = TorchDistCheckpoint(find_checkpoint(tmp_path))
    theirs = tensors["transformer.h.2.attn.c_attn.weight"]
    bias = tensors["transformer.h.2.attn.c_attn.bias"]
    ours = checkpoint.load("decoder.layers.self_attention.linear_qkv.weight", 2)
    our_bias = checkpoint.load("decoder.layers.self_attention.linear_qkv.bias", 2)
    for head in range(4):
        for part in range(3):
            for row in range(8):
                column = part * 32 + head * 8 + row
                place = (head * 3 + part) * 8 + row
                assert torch.equal(ours[place], theirs[:, column])
                assert our_bias[place] == bias[column]
    fc1 = checkpoint.load("decoder.layers.mlp.linear_fc1.weight", 1)
    assert torch.equal(fc1, tensors["transformer.h.1.mlp.c_fc.weight"].t())


def test_experts_are_stacked_with_gate_first(tmp_path, hf):
    folder, tensors = hf("mixtral")
    assert take_in(folder, tmp_path) == 0
    checkpoint = TorchDistCheckpoint(find_checkpoint(tmp_path))
    fc1 = checkpoint.load("decoder.layers.mlp.experts.experts.linear_fc1.weight")
    fc2 = checkpoint.load("decoder.layers.mlp.experts.experts.linear_fc2.weight")
    assert fc1.shape == (4, 4, 96, 32) and fc2.shape == (4, 4, 32, 48)
    for layer, expert in ((0, 0), (1, 3), (3, 2)):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        assert torch.equal(fc1[layer, expert, :48], tensors[prefix + "w1.weight"])
        assert torch.equal(fc1[layer, expert, 48:], tensors[prefix + "w3.weight"])
        assert torch.equal(fc2[layer, expert], tensors[prefix + "w2.weight"])
    norms = [
        checkpoint.load(f"decoder.layers.{name}")
        for name in ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    ]
    assert torch.equal(*norms), "both of Megatron's layer implementations must find it"


def test_vocabulary_is_padded_with_zeros(tmp_path, hf):
    folder, tensors = hf("llama")
    flags = "--make-vocab-size-divisible-by 10 --tensor-model-parallel-size 3".split()
    assert take_in(folder, tmp_path, *flags) == 0
    checkpoint = TorchDistCheckpoint(find_checkpoint(tmp_path))
    assert checkpoint.args.padded_vocab_size == 270
    for ours, theirs in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        stored = checkpoint.load(ours)
        assert torch.equal(stored[:250], tensors[theirs])
        assert stored.shape == (270, 32) and not stored[250:].any()


def relaid(run, out, layout):
    """Writes an imported checkpoint again with layers under names of their own."""
    checkpoint = TorchDistCheckpoint(find_checkpoint(run))
    state = {}
    for key in checkpoint.tensors:
        stored = checkpoint.load(key)
        if not key.startswith("decoder.layers."):
            state[key] = stored
            continue
        for layer, tensor in enumerate(stored):
            name = key.replace("decoder.layers.", f"decoder.layers.{layer}.")
            experts = {name: tensor}
            if layout == "singleton" and ".experts.experts." in name:
                experts = {
                    name.replace(".experts.experts.", f".experts.experts.{i}."): part
                    for i, part in enumerate(tensor)
                }
            for own, part in experts.items():
                if layout == "singleton" and own.endswith("linear_fc1.weight"):
                    gate, up = part.chunk(2)
                    state |= {f"{own}_w": gate, f"{own}_v": up}
                else:
                    state[own] = part
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    dist_checkpoint.save(state, checkpoint_id=out / "iter_0000003", no_dist=True)
    torch.save({"args": checkpoint.args, "iteration": 3}, out / "iter_0000003" / "common.pt")
    return out / "iter_0000003"


@pytest.mark.parametrize("layout", ["per_layer", "singleton"])
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_other_layouts_of_layers_and_experts(tmp_path, hf, name, layout):
    folder, tensors = hf(name)
    assert take_in(folder, tmp_path / "run") == 0
    run = relaid(tmp_path / "run", tmp_path / "other", layout)
    assert write_out(run, tmp_path / "back") == 0
    found = dict(iter_hf_tensors(tmp_path / "back"))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_two_copies_of_a_norm_must_agree(tmp_path, hf, capsys):
    folder, _ = hf("mixtral")
    assert take_in(folder, tmp_path / "run") == 0
    run = relaid(tmp_path / "run", tmp_path / "other", "per_layer")
    checkpoint = TorchDistCheckpoint(run)
    state = {key: checkpoint.load(key) for key in checkpoint.tensors}
    state["decoder.layers.2.pre_mlp_layernorm.weight"] += 1
    shutil.rmtree(run)
    dist_checkpoint.save(state, checkpoint_id=run, no_dist=True)
    torch.save({"args": checkpoint.args, "iteration": 3}, run / "common.pt")
    assert write_out(run, tmp_path / "back") == 2
    message = capsys.readouterr().err
    assert "are both decoder.layers.2.pre_mlp_layernorm.weight and differ" in message


# --------------------------------------------------------------------------- what is accepted


def test_a_bare_base_model_and_old_buffers(tmp_path, hf):
    """GPT-2 as the hub has it: no prefix, causal masks beside the weights."""
    folder, tensors = hf("gpt2")
    put = {name.removeprefix("transformer."): t.clone() for name, t in tensors.items()}
    put["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    put["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    bare = changed(folder, tmp_path / "bare", drop=tensors.keys(), put=put)
    assert take_in(bare, tmp_path / "run") == 0
    assert write_out(tmp_path / "run", tmp_path / "back") == 0
    found = dict(iter_hf_tensors(tmp_path / "back"))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_tied_output_layer_must_be_the_embedding(tmp_path, hf, capsys):
    folder, tensors = hf("qwen2")
    embedding = tensors["model.embed_tokens.weight"]
    same = changed(folder, tmp_path / "same", put={"lm_head.weight": embedding.clone()})
    assert take_in(same, tmp_path / "run") == 0
    other = changed(folder, tmp_path / "other", put={"lm_head.weight": embedding + 1})
    assert take_in(other, tmp_path / "run2") == 2
    assert "has lm_head.weight of its own" in capsys.readouterr().err


def test_tokenizer_is_carried_and_named(tmp_path, hf, capsys):
    """The printed flags name the carried tokenizer, which the export then takes by itself."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder, _ = hf("llama")
    source = changed(folder, tmp_path / "source")
    vocabulary = {f"t{i}": i for i in range(249)} | {"<e>": 249}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<e>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>").save_pretrained(source)
    assert take_in(source, tmp_path / "run") == 0
    words = flags_of(capsys.readouterr().out)
    path = words[words.index("--tokenizer-model") + 1]
    assert words[words.index("--tokenizer-type") + 1] == "HuggingFaceTokenizer"
    assert "--vocab-size" not in words
    assert len(AutoTokenizer.from_pretrained(path)) == 250
    assert write_out(tmp_path / "run", tmp_path / "back") == 0
    json_file = "tokenizer.json"
    assert (tmp_path / "back" / json_file).read_bytes() == (source / json_file).read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] == 249


def flags_of(printed):
    """Returns the words of the copyable block."""
    return shlex.split(printed.partition("needs:\n\n")[2].replace("\\\n", " "))


def test_flags_are_one_block(tmp_path, hf, capsys):
    """The block says what config.json says; that it is enough is shown with the trainer."""
    folder, _ = hf("mixtral")
    assert take_in(folder, tmp_path / "run") == 0
    words = flags_of(capsys.readouterr().out)
    values = dict(zip(words, words[1:], strict=False))
    assert values["--num-experts"] == "4" and values["--moe-router-topk"] == "2"
    assert values["--norm-epsilon"] == "0.0001" and values["--num-query-groups"] == "2"
    assert values["--vocab-size"] == "250" and values["--load"] == str(tmp_path / "run")
    assert {"--swiglu", "--disable-bias-linear", "--group-query-attention"} <= set(words)


# --------------------------------------------------------------------------- memory


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from megatron_dwm.conversion import export, import_model, iter_hf_tensors
from megatron_dwm.cli.convert.command import main

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def growth(call):
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = status("VmRSS")
    call()
    return status("VmHWM") - before

def run(words):
    assert main(words) == 0

warm_up, source, measured = json.loads(sys.argv[1])
for words in warm_up:
    run(words)
found = [growth(lambda: run(words)) for words in measured]
found.append(growth(lambda: [t.clone() for _, t in iter_hf_tensors(source)]))
print(json.dumps(found))
"""


def test_memory_is_that_of_a_layer_not_of_the_model(tmp_path):
    """A model of 32 layers is converted both ways in a few layers' memory.

    The same measure sees the whole model where all its tensors are held.
    """
    values = tiny_hf_models.MODELS["llama"][1]
    large = {"num_hidden_layers": 32, "hidden_size": 240, "intermediate_size": 640}
    shape = shape_from_config({"model_type": "llama", **values, **large})
    source = tmp_path / "source"
    source.mkdir()
    tensors = {
        name: torch.ones(size)
        for rule in FAMILIES["llama"].rules(shape)
        for name, size in rule.hf_shapes().items()
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    # Two files: reading a tensor must not keep its file.
    names = list(tensors)
    files = {"part-0.safetensors": names[: len(names) // 2]}
    files["part-1.safetensors"] = names[len(names) // 2 :]
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, source / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "config.json").write_text(json.dumps(hf_config(shape, "float32")))
    tiny_hf_models.write("llama", tmp_path / "small")

    def words(command, hf_path, run, *flags):
        paths = ["--hf-path", str(tmp_path / hf_path), "--megatron-path", str(tmp_path / run)]
        return [command, *paths, *flags]

    warm_up = [words("import", "small", "run0"), words("export", "back0", "run0")]
    measured = [
        words("import", "source", "run"),
        words("export", "back", "run", "--max-shard-size", "4MB"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([warm_up, str(source), measured])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    importing, exporting, holding = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{total / 1e6:.0f} MB: import {importing / 1e6:.0f} MB, export {exporting / 1e6:.0f} MB, "
        f"all tensors held {holding / 1e6:.0f} MB"
    )
    assert total > 50e6 and holding > 0.8 * total
    assert importing < 0.3 * total and exporting < 0.3 * total


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        (
            "llama",
            {"model_type": "mamba"},
            "model_type 'mamba'; llama, qwen2, qwen3, mixtral, gpt2",
        ),
        ("llama", {"attention_bias": True}, "attention_bias is True, needs False"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types has sliding_attention"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096, needs None"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"n_head": 0}, "n_head is 0, needs a positive number"),
        ("llama", {"hidden_size": None}, "hidden_size is None, needs a positive number"),
        ("qwen2", {"num_attention_heads": 3}, "heads do not divide into the groups"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (
            "llama_tied",
            {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type 'yarn'; Megatron knows linear and llama3",
        ),
        (
            "llama_tied",
            {"rope_parameters": {"rope_type": "linear", "factor": 1.5}},
            "factor 1.5, and Megatron's --rotary-seq-len-interpolation-factor takes integers",
        ),
        ("qwen2", {"rope_parameters": {"rope_theta": 1000.5}}, "rope_theta is 1000.5"),
    ],
)
def test_what_megatron_cannot_compute_is_refused(tmp_path, hf, capsys, name, config, named):
    folder, _ = hf(name)
    other = changed(folder, tmp_path / "other", **config)
    assert take_in(other, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_rope_factor_of_the_stock_trainer(tmp_path, hf, capsys):
    """Another factor than Megatron's own would train another model: the user must vouch for it."""
    folder, _ = hf("llama")
    rope = {**tiny_hf_models.MODELS["llama"][1]["rope_parameters"], "factor": 32.0}
    other = changed(folder, tmp_path / "other", rope_parameters=rope)
    assert take_in(other, tmp_path / "run") == 2
    assert "scales RoPE by 32, and Megatron's own builders use 8" in capsys.readouterr().err
    assert take_in(folder, tmp_path / "run", "--rope-scaling-factor", "4") == 2
    assert "--rope-scaling-factor is 4" in capsys.readouterr().err
    assert take_in(other, tmp_path / "run", "--rope-scaling-factor", "32") == 0
    assert write_out(tmp_path / "run", tmp_path / "back") == 2
    assert write_out(tmp_path / "run", tmp_path / "back", "--rope-scaling-factor", "32") == 0
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["rope_parameters"]["factor"] == 32.0


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"drop": [NORM]}, f"{NORM} is missing"),
        ({"put": {"model.layers.4.x.weight": torch.ones(2)}}, "model.layers.4.x.weight is unknown"),
        ({"put": {"norm.weight": torch.ones(32)}}, "has norm.weight and model.norm.weight"),
        ({"put": {NORM: torch.ones(31)}}, f"{NORM} is (31,), needs (32,)"),
        ({"put": {NORM: torch.ones(32, dtype=torch.int8)}}, f"{NORM} is stored as I8"),
        ({"put": {NORM: torch.ones(32, dtype=torch.float64)}}, f"{NORM} is stored as F64"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, hf, capsys, changes, named):
    folder, _ = hf("qwen3")
    assert take_in(changed(folder, tmp_path / "other", **changes), tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_mixed_dtypes_and_overflow(tmp_path, hf, capsys):
    folder, tensors = hf("qwen3")
    put = {NORM: tensors[NORM].to(torch.bfloat16)}
    mixed = changed(folder, tmp_path / "mixed", put=put)
    assert take_in(mixed, tmp_path / "run") == 2
    assert "mixes bfloat16, float32; give --dtype" in capsys.readouterr().err
    assert take_in(mixed, tmp_path / "run", "--dtype", "fp32") == 0
    large = changed(folder, tmp_path / "large", put={NORM: torch.full((32,), 1e6)})
    assert take_in(large, tmp_path / "run2", "--dtype", "fp16") == 2
    assert f"--dtype fp16 cannot hold the values of {NORM}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "mixed", "run"]


def test_output_folder_is_protected(tmp_path, hf, capsys):
    folder, _ = hf("llama")
    run = tmp_path / "run"
    assert take_in(folder, run) == 0
    assert take_in(folder, run) == 2
    assert "--megatron-path" in capsys.readouterr().err
    (run / "stale").touch()
    assert take_in(folder, run, "--force") == 0
    assert not (run / "stale").exists()
    (run / "iter_0000010").mkdir()
    assert take_in(folder, run, "--force") == 2
    assert "holds iter_0000010, which a run has saved there" in capsys.readouterr().err
    assert (run / "iter_0000010").is_dir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").touch()
    assert take_in(folder, tmp_path / "home", "--force") == 2
    assert "so it is not an import" in capsys.readouterr().err


def test_flags_and_folders_are_refused_by_name(tmp_path, hf, capsys):
    folder, _ = hf("llama")
    assert take_in(folder, tmp_path / "run", "--tensor-model-parallel-size", "0") == 2
    assert "--tensor-model-parallel-size is 0" in capsys.readouterr().err
    assert take_in(tmp_path / "absent", tmp_path / "run") == 2
    assert "absent is not a folder" in capsys.readouterr().err
    broken = changed(folder, tmp_path / "broken")
    data = load_file(broken / "model.safetensors")
    assert data
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert take_in(broken, tmp_path / "run") == 2
    assert "model.safetensors cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
