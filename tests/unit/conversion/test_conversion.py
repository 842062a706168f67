"""Names and layouts between Megatron and Hugging Face, as pure functions on small tensors.

Head order is checked against a construction of its own, not only by inverses: a pair of functions
that is wrong in the same way would pass those.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from megatron_dwm.conversion import (
    ConversionError,
    ModelShape,
    find_checkpoint,
    hf_layer_to_megatron,
    iter_hf_tensors,
    iter_megatron_tensors,
    megatron_layer_to_hf,
    merge_gate_up,
    merge_qkv,
    read_hf_config,
    split_gate_up,
    split_qkv,
)
from megatron_dwm.conversion.dist_checkpoint import _MetadataUnpickler, load_restricted
from megatron_dwm.conversion.families import (
    hf_config,
    layer_shapes,
    llama_from_args,
    llama_from_config,
    shape_from_args,
)

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=10,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=7,
    max_position_embeddings=16,
    layernorm_epsilon=1e-5,
    rotary_base=500.0,
)


def megatron_args(**changes):
    """Arguments of a run that is dense Llama, with changes."""
    values = dict(
        num_layers=2,
        hidden_size=12,
        ffn_hidden_size=10,
        num_attention_heads=4,
        group_query_attention=True,
        num_query_groups=2,
        kv_channels=3,
        padded_vocab_size=8,
        max_position_embeddings=16,
        layernorm_epsilon=1e-5,
        rotary_base=500,
        rotary_percent=1.0,
        normalization="RMSNorm",
        position_embedding_type="rope",
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
    )
    return argparse.Namespace(**{**values, **changes})


def hf_layer(shape=SHAPE):
    """One layer of random tensors under Hugging Face's names."""
    template = {name: torch.rand(size) for name, size in layer_shapes(shape).items()}
    return megatron_layer_to_hf(template, shape)


# --------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 3), (4, 2, 3), (6, 1, 2), (8, 2, 5)])
def test_qkv_order_and_inverse(heads, groups, dim):
    """Each group is its query heads, its key head and its value head, in that order."""
    labels = []
    for group in range(groups):
        labels += [("q", group * (heads // groups) + i) for i in range(heads // groups)]
        labels += [("k", group), ("v", group)]
    # Row (head, r) holds the head's number and r, and the kind in a third column.
    rows = [(float("qkv".index(kind)), i, r) for kind, i in labels for r in range(dim)]
    qkv = torch.tensor(rows, dtype=torch.float32)
    parts = split_qkv(qkv, heads, groups, dim)
    for kind, (part, count) in enumerate(zip(parts, (heads, groups, groups), strict=True)):
        expected = [(float(kind), float(i), float(r)) for i in range(count) for r in range(dim)]
        assert part.tolist() == [list(row) for row in expected]
    assert torch.equal(merge_qkv(*parts, heads, groups, dim), qkv)


def test_qkv_of_a_vector():
    """The split works on vectors as well."""
    qkv = torch.arange(24.0)
    assert torch.equal(merge_qkv(*split_qkv(qkv, 4, 2, 3), 4, 2, 3), qkv)


def test_gate_comes_first():
    fc1 = torch.arange(8.0).reshape(4, 2)
    gate, up = split_gate_up(fc1)
    assert gate.tolist() == [[0, 1], [2, 3]] and up.tolist() == [[4, 5], [6, 7]]
    assert torch.equal(merge_gate_up(gate, up), fc1)


def test_layout_errors_name_the_sizes():
    with pytest.raises(ConversionError, match="10 rows; 4 heads in 2 query groups .* need 24"):
        split_qkv(torch.zeros(10, 2), 4, 2, 3)
    with pytest.raises(ConversionError, match="k_proj has 5 rows"):
        merge_qkv(torch.zeros(12, 2), torch.zeros(5, 2), torch.zeros(6, 2), 4, 2, 3)
    with pytest.raises(ConversionError, match="even"):
        split_gate_up(torch.zeros(3, 2))
    with pytest.raises(ConversionError, match="must agree"):
        merge_gate_up(torch.zeros(3, 2), torch.zeros(4, 2))


# --------------------------------------------------------------------------- layers


@pytest.mark.parametrize("fused", [False, True])
def test_layer_round_trip(fused):
    """A layer survives Hugging Face -> Megatron -> Hugging Face, under both norm names."""
    layer = hf_layer()
    megatron = hf_layer_to_megatron(layer, SHAPE, fused_layernorm=fused)
    assert ("self_attention.linear_qkv.layer_norm_weight" in megatron) is fused
    assert ("pre_mlp_layernorm.weight" in megatron) is not fused
    back = megatron_layer_to_hf(megatron, SHAPE)
    assert back.keys() == layer.keys()
    assert all(torch.equal(back[name], layer[name]) for name in layer)


def test_layer_errors_name_the_tensor():
    layer = hf_layer()
    bias = {**layer, "self_attn.q_proj.bias": torch.zeros(12)}
    with pytest.raises(ConversionError, match=r"self_attn.q_proj.bias is unknown"):
        hf_layer_to_megatron(bias, SHAPE)
    missing = {name: t for name, t in layer.items() if name != "mlp.up_proj.weight"}
    with pytest.raises(ConversionError, match=r"mlp.up_proj.weight is missing"):
        hf_layer_to_megatron(missing, SHAPE)
    narrow = {**layer, "self_attn.o_proj.weight": torch.zeros(12, 5)}
    with pytest.raises(ConversionError, match=r"o_proj.weight is \(12, 5\), needs \(12, 12\)"):
        hf_layer_to_megatron(narrow, SHAPE)


# --------------------------------------------------------------------------- shapes


def test_shape_from_args_and_config_agree():
    shape = llama_from_args(megatron_args())
    assert shape.vocab_size == 8 and not shape.tied and shape.rope_scaling is None
    assert llama_from_config(hf_config(shape, "float32")) == shape


def test_multi_head_attention_ignores_num_query_groups():
    """Megatron leaves `num_query_groups` at 1 when grouped-query attention is off."""
    args = megatron_args(group_query_attention=False, num_query_groups=1)
    assert llama_from_args(args).num_query_groups == 4


def test_rope_scaling_survives():
    shape = llama_from_args(megatron_args(use_rope_scaling=True, rope_scaling_factor=8.0), 32.0)
    config = hf_config(shape, "bfloat16")
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_parameters"]["factor"] == 32.0
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 500.0
    assert llama_from_config(config) == shape
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    new = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    assert llama_from_config(old) == llama_from_config(new) == shape


def test_rope_factor_is_never_guessed():
    """Megatron's builders ignore --rope-scaling-factor: a value that is not theirs is asked for."""
    args = megatron_args(use_rope_scaling=True, rope_scaling_factor=4.0)
    with pytest.raises(ConversionError, match="--rope-scaling-factor is 4, .* ignore it and use 8"):
        llama_from_args(args)
    assert llama_from_args(args, 8.0).rope_scaling["factor"] == 8.0
    with pytest.raises(ConversionError, match="--use-rope-scaling was off"):
        llama_from_args(megatron_args(), 8.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"add_bias_linear": True}, "--disable-bias-linear"),
        ({"normalization": "LayerNorm"}, "--normalization is 'LayerNorm', needs 'RMSNorm'"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type"),
        ({"num_experts": 8}, "--num-experts is 8"),
        ({"swiglu": False}, "--swiglu"),
        ({"qk_layernorm": True}, "--qk-layernorm"),
        ({"add_qkv_bias": True}, "--add-qkv-bias"),
        ({"rotary_percent": 0.5}, "--rotary-percent is 0.5"),
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"hidden_size": 13}, "--hidden-size 13"),
        ({"num_layers": None}, "num_layers is None"),
    ],
)
def test_other_models_are_refused_by_name(change, named):
    with pytest.raises(ConversionError) as error:
        llama_from_args(megatron_args(**change))
    assert named in str(error.value) and "\n" not in str(error.value)


LAYER_NORM = {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True}
GPT2 = {**LAYER_NORM, "position_embedding_type": "learned_absolute"}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2}


@pytest.mark.parametrize(
    ("changes", "label", "named"),
    [
        ({"add_qkv_bias": True, "add_bias_linear": True}, "dense Qwen2", "--add-bias-linear"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "dense Qwen3", "--add-qkv-bias is True"),
        ({**EXPERTS, "qk_layernorm": True}, "Mixtral", "--qk-layernorm is True"),
        ({**EXPERTS, "moe_router_pre_softmax": True}, "Mixtral", "--moe-router-pre-softmax"),
        ({**EXPERTS, "moe_shared_expert_intermediate_size": 8}, "Mixtral", "--moe-shared-expert"),
        ({**EXPERTS, "moe_layer_freq": [0, 1]}, "Mixtral", "--moe-layer-freq is [0, 1]"),
        ({**GPT2, "group_query_attention": True}, "GPT-2", "--group-query-attention is True"),
        ({**GPT2, "group_query_attention": False, "kv_channels": 4}, "GPT-2", "--kv-channels is 4"),
        ({**GPT2, "swiglu": True}, "GPT-2", "--swiglu is True, needs False"),
    ],
)
def test_each_family_names_what_does_not_fit(changes, label, named):
    with pytest.raises(ConversionError) as error:
        shape_from_args(megatron_args(**changes))
    assert f"cannot be written as a {label}: " in str(error.value) and named in str(error.value)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
        (EXPERTS, "mixtral"),
        ({**GPT2, "group_query_attention": False}, "gpt2"),
    ],
)
def test_the_family_follows_from_the_arguments(changes, family):
    assert shape_from_args(megatron_args(**changes)).family == family


def test_every_reason_is_named_at_once():
    with pytest.raises(ConversionError, match="--normalization.*--swiglu.*--num-experts"):
        llama_from_args(megatron_args(num_experts=2, normalization="LayerNorm", swiglu=False))


# --------------------------------------------------------------------------- folders


def write_folder(folder, sharded, tied=False):
    """Writes a two-layer model; returns its tensors."""
    shape = ModelShape(**{**vars(SHAPE), "tied": tied})
    tensors = {"model.embed_tokens.weight": torch.rand(7, 12), "model.norm.weight": torch.rand(12)}
    if not tied:
        tensors["lm_head.weight"] = torch.rand(7, 12)
    for index in range(2):
        tensors |= {
            f"model.layers.{index}.{n}": t.contiguous().clone() for n, t in hf_layer().items()
        }
    (folder / "config.json").write_text(json.dumps(hf_config(shape, "float32")))
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names = sorted(tensors)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("sharded", [False, True])
def test_folder_is_read(tmp_path, sharded):
    tensors = write_folder(tmp_path, sharded)
    found = dict(iter_hf_tensors(tmp_path))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    some = dict(iter_hf_tensors(tmp_path, lambda name: "norm" in name))
    assert some and all("norm" in name for name in some)
    assert read_hf_config(tmp_path) == SHAPE


@pytest.mark.parametrize("tied", [False, True])
def test_megatron_tensors_of_a_folder(tmp_path, tied):
    """All of a model comes in Megatron's names; fewer layers can be asked for."""
    write_folder(tmp_path, sharded=True, tied=tied)
    names = [name for name, _ in iter_megatron_tensors(tmp_path)]
    assert names[0] == "embedding.word_embeddings.weight"
    assert ("output_layer.weight" in names) is not tied
    assert sum(name.startswith("decoder.layers.1.") for name in names) == 6
    first = [name for name, _ in iter_megatron_tensors(tmp_path, num_layers=1)]
    assert not any(name.startswith("decoder.layers.1.") for name in first)
    with pytest.raises(ConversionError, match="has 2 layers; 3 were asked for"):
        list(iter_megatron_tensors(tmp_path, num_layers=3))


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(ConversionError, match=r"config.json is missing"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConversionError, match="model_type is 'gpt2'.*hidden_size is missing"):
        read_hf_config(tmp_path)
    with pytest.raises(ConversionError, match="only safetensors"):
        list(iter_hf_tensors(tmp_path))
    write_folder(tmp_path, sharded=True)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"part-1.safetensors, which is not there"):
        list(iter_hf_tensors(tmp_path))
    (tmp_path / "part-1.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ConversionError, match=r"part-1.safetensors cannot be read"):
        list(iter_hf_tensors(tmp_path))


# --------------------------------------------------------------------------- checkpoints


def test_checkpoint_is_found_or_the_way_out_is_named(tmp_path):
    with pytest.raises(ConversionError, match="is not a folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(ConversionError, match="has no latest_checkpointed_iteration.txt"):
        find_checkpoint(tmp_path)
    for number in (2, 40):
        (tmp_path / f"iter_{number:07d}").mkdir()
        (tmp_path / f"iter_{number:07d}" / ".metadata").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40\n")
    assert find_checkpoint(tmp_path).name == "iter_0000040"
    assert find_checkpoint(tmp_path, 2).name == "iter_0000002"
    assert find_checkpoint(tmp_path / "iter_0000002").name == "iter_0000002"
    with pytest.raises(ConversionError, match="no checkpoint iter_0000003; it has iter_0000002"):
        find_checkpoint(tmp_path, 3)
    with pytest.raises(ConversionError, match="leave out --iteration"):
        find_checkpoint(tmp_path / "iter_0000002", 40)
    (tmp_path / "iter_0000040" / ".metadata").unlink()
    with pytest.raises(ConversionError, match="--ckpt-format torch_dist"):
        find_checkpoint(tmp_path)


class _Touch:
    """Pickles to a call that leaves a file behind when it is executed."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call", [os.mkdir, subprocess.getoutput, eval])
def test_checkpoints_execute_nothing(tmp_path, call):
    """A call inside a checkpoint's pickles is refused or inert, and never made."""
    trace = tmp_path / "trace"
    argument = {
        os.mkdir: str(trace),
        subprocess.getoutput: f"mkdir {trace}",
        eval: f"__import__('os').mkdir({str(trace)!r})",
    }[call]
    path = tmp_path / "common.pt"
    torch.save({"args": argparse.Namespace(a=1), "bad": _Touch(call, argument)}, path)
    try:
        assert load_restricted(path.read_bytes(), path)["args"].a == 1
    except ConversionError as error:
        assert "common.pt cannot be read" in str(error)
    with open(tmp_path / ".metadata", "wb") as file:
        pickle.dump(_Touch(call, argument), file)
    with open(tmp_path / ".metadata", "rb") as file:
        _MetadataUnpickler(file).load()
    assert not trace.exists()


def test_package_needs_neither_megatron_nor_transformers():
    """The run-time imports the package early, before Megatron may be imported."""
    code = (
        "import sys, megatron_dwm.conversion; "
        "sys.exit(any(m in sys.modules for m in ('megatron', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
