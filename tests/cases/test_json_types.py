"""JSON is checked for its type before anything is taken out of it: one line, never a traceback.

Where transformers refuses a config.json, or cannot build the model, an import is refused; where it
takes one, the values are those that it takes. Stricter than transformers are numbers that no model
can be built with (NaN, below zero).
"""

import json
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]

from megatron_dwm.checkpoint.health import _manifest_problems  # noqa: E402
from megatron_dwm.cli import preprocess as preprocess_data  # noqa: E402
from megatron_dwm.cli import tokenizer as train_tokenizer  # noqa: E402
from megatron_dwm.cli import weights  # noqa: E402
from megatron_dwm.cli.convert.command import main as convert  # noqa: E402
from megatron_dwm.conversion import ConversionError, ModelShape  # noqa: E402
from megatron_dwm.conversion.dwm_classifier import read_classifier  # noqa: E402
from megatron_dwm.conversion.families import shape_from_config  # noqa: E402
from megatron_dwm.conversion.hf_folder import iter_hf_tensors, read_hf_config  # noqa: E402
from megatron_dwm.data.segment_cache import load_segment  # noqa: E402
from megatron_dwm.files.json_files import JsonError, parse_object  # noqa: E402
from megatron_dwm.logs.log_file import read_log  # noqa: E402

DIGITS = "9" * 5000
DEEP = "[" * 200_000
# Texts that Python's reader answers with different errors.
NO_JSON = {
    "digits": '{"a": ' + DIGITS + "}",
    "deep": DEEP,
    "deep object": '{"a":' * 100_000,
    "cut": '{"a": 1',
    "empty": "",
    "nul": "\0",
}
NO_OBJECT = {"null": "null", "list": "[1]", "string": '"a"', "number": "5", "nan": "NaN"}

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MIXTRAL = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}
BASES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "mixtral": MIXTRAL,
    "gpt2": GPT2,
}

ODD = [None, "1", "true", 0, 1, 1.0, True, [], [1], {}, {"a": 1}]
KEYS = {
    "llama": [
        *LLAMA,
        *("head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"),
        *("rope_parameters", "rope_scaling", "use_cache", "attention_dropout", "layer_types"),
    ],
    "qwen2": ["use_sliding_window", "tie_word_embeddings", "layer_types"],
    "qwen3": ["head_dim", "attention_bias", "use_sliding_window"],
    "mixtral": ["num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"],
    "gpt2": [*GPT2, "n_inner", "layer_norm_epsilon", "activation_function", "tie_word_embeddings"]
    + ["attn_pdrop", "embd_pdrop", "resid_pdrop", "scale_attn_weights", "add_cross_attention"],
}


def theirs(kind: str, config: dict):
    """Returns transformers' configuration, or None where it refuses."""
    try:
        # A copy: transformers completes what it is given.
        return transformers.AutoConfig.for_model(kind, **json.loads(json.dumps(config)))
    except Exception:  # whatever it raises, and it raises many kinds, it refuses
        return None


def ours(kind: str, config: dict) -> ModelShape | None:
    try:
        return shape_from_config({"model_type": kind, **config})
    except ConversionError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize(("kind", "key"), [(k, key) for k, keys in KEYS.items() for key in keys])
def test_what_transformers_refuses_is_refused(kind, key):
    refused = 0
    for value in ODD:
        config = {**BASES[kind], key: value}
        found, expected = ours(kind, config), theirs(kind, config)
        if expected is None:
            assert found is None, f"{key}: {value!r}"
            refused += 1
        elif found is not None:
            assert found.tied == expected.tie_word_embeddings
            assert found.hidden_size == expected.hidden_size
            assert found.num_query_groups == getattr(
                expected, "num_key_value_heads", expected.num_attention_heads
            )
            assert found.max_position_embeddings == expected.max_position_embeddings
    # transformers checks rope_scaling where it is not empty.
    assert refused >= 3


ROPES = [
    {"rope_theta": 500.0},
    {"rope_theta": None},
    {"rope_theta": "500"},
    {"rope_theta": [500]},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"type": "linear", "factor": "2"}},
    {"rope_scaling": {"type": "linear", "factor": None}},
    {"rope_scaling": "linear"},
    {"rope_scaling": []},
    {"rope_parameters": {"rope_type": None}},
    {"rope_parameters": {"rope_type": ["linear"]}},
    {"rope_parameters": {"rope_type": 5}},
    {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 9.0},
    {"rope_parameters": {"rope_theta": "7"}},
    {"rope_parameters": {"rope_type": "default", "factor": 3.0, "rope_theta": 7.0}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}},
    {"rope_parameters": {"full_attention": None}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 7.0}},
    {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        "rope_theta": 9.0,
    },
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "max_position_embeddings": 8192,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=json.dumps)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mixtral"])
def test_rope_is_read_as_transformers_computes_it(kind, rope):
    """The truth is the rotary embedding that transformers builds."""
    import importlib

    config = {**BASES[kind], "head_dim": 8, **rope}
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    rotary = next(v for k, v in vars(module).items() if k.endswith("RotaryEmbedding"))
    found = ours(kind, config)
    try:
        built = rotary(theirs(kind, config))
    except Exception:  # as above: then we must have refused, too
        assert found is None
        return
    assert found is not None
    assert found.rotary_base == built.config.rope_parameters["rope_theta"]
    scaling = found.rope_scaling or {"rope_type": "default"}
    given = built.config.rope_parameters
    assert {k: given[k] for k in scaling} == dict(scaling)


# --- files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = transformers.AutoConfig.for_model("llama", **LLAMA)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10KB")
    return folder


def changed(model: Path, tmp_path: Path, name: str, text: str) -> Path:
    """A copy of a model folder with another text in one file."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(text)
    return folder


def one_line(capsys, *named: str) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in named) and len(lines[0]) < 1000
    return lines[0]


@pytest.mark.parametrize("case", [*NO_JSON, *NO_OBJECT])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_import_of_a_file_that_is_no_object(model, tmp_path, capsys, name, case):
    folder = changed(model, tmp_path, name, {**NO_JSON, **NO_OBJECT}[case])
    flags = ["--hf-path", str(folder), "--megatron-path", str(tmp_path / "out")]
    assert convert(["import", *flags]) == 2
    one_line(capsys, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "weight_map",
    [None, [], "x", 5, {"lm_head.weight": None}, {"lm_head.weight": 5}, {"a": ["b.safetensors"]}]
    + [{"a": "\ud800.safetensors"}, {"a": "\0.safetensors"}, {"a": "../b.safetensors"}],
)
def test_an_index_of_other_types_is_refused(model, tmp_path, capsys, weight_map):
    name = "model.safetensors.index.json"
    folder = changed(model, tmp_path, name, json.dumps({"weight_map": weight_map}))
    with pytest.raises(Exception) as refused:  # noqa: B017 (transformers' own, of any class)
        transformers.LlamaForCausalLM.from_pretrained(folder)
    assert refused.value is not None
    with pytest.raises(ConversionError, match="index.json"):
        list(iter_hf_tensors(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**4000},
        {"intermediate_size": 10**4000, "hidden_size": 10**4000},
        {"model_type": ["llama"]},
        {"model_type": {"a": 1}},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"rope_theta": float("inf"), "rope_parameters": None},
        {"rope_theta": 10**400, "rope_parameters": None},
        {"hidden_act": "\ud800"},
        {"rms_norm_eps": "1e-6"},
        {"tie_word_embeddings": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_import_of_values_that_no_model_has(model, tmp_path, capsys, change):
    config = json.loads((model / "config.json").read_text())
    folder = changed(model, tmp_path, "config.json", json.dumps({**config, **change}))
    flags = ["--hf-path", str(folder), "--megatron-path", str(tmp_path / "out")]
    assert convert(["import", *flags]) == 2
    one_line(capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": 5},
        {"architectures": [5]},
        {"architectures": {"a": 1}},
        {"architectures": ["LlamaForSequenceClassification"], "num_labels": "two"},
        {"architectures": ["LlamaForSequenceClassification"], "id2label": 5},
        {"dwm_pooling": ["mean"]},
        {"dwm_vocab_size": "7"},
        {"dwm_seq_length": "16"},
        {"dwm_temperature": "0.5"},
        {"dwm_temperature": float("nan")},
    ],
    ids=json.dumps,
)
def test_a_classifier_of_other_types_is_refused(tmp_path, change):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **LLAMA, **change}))
    with pytest.raises(ConversionError, match=r"config\.json: "):
        read_classifier(tmp_path)


@pytest.mark.parametrize("case", [*NO_JSON, *NO_OBJECT])
def test_readers_of_a_folder_name_the_file(tmp_path, case):
    (tmp_path / "config.json").write_text({**NO_JSON, **NO_OBJECT}[case])
    for read in (read_classifier, read_hf_config):
        with pytest.raises(ConversionError, match=r"config\.json is ") as refused:
            read(tmp_path)
        assert "\n" not in str(refused.value)


MANIFESTS = [*NO_JSON.values(), *NO_OBJECT.values(), "{}", '{"files": null}']
MANIFESTS += ['{"files": [[1, "a"]]}', '{"files": "ab"}', '{"files": [["a", "b"]]}']


@pytest.mark.parametrize("text", MANIFESTS, ids=lambda text: text[:20])
def test_a_manifest_of_other_types_is_damaged(tmp_path, text):
    from megatron_dwm.checkpoint.health import MANIFEST

    path = tmp_path / MANIFEST
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    [problem] = _manifest_problems(tmp_path, deep=False)
    assert "is damaged" in problem and "\n" not in problem


@pytest.mark.parametrize("text", [*NO_JSON.values(), *NO_OBJECT.values(), "{}"])
def test_a_stored_plan_of_other_types_is_no_plan(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    assert load_segment(str(tmp_path / "plan"), None) is None


def test_a_log_keeps_the_lines_that_are_its_own(tmp_path):
    good = '{"iteration": 3, "loss": NaN}'
    others = [NO_JSON["digits"], DEEP, "null", "[1]", "{}", '{"iteration": "4"}', '{"iterat']
    (tmp_path / "log").write_text("\n".join([good, *others]))
    assert [line["iteration"] for line in read_log(str(tmp_path / "log"))] == [3]


# --- JSON Lines --------------------------------------------------------------------------------

RECORDS = {
    **{case: text for case, text in NO_JSON.items() if case != "empty"},
    **NO_OBJECT,
    "text null": '{"text": null}',
    "text number": '{"text": 5}',
    "text object": '{"text": {"a": "b"}}',
    "text list of others": '{"text": ["a", null]}',
    "digits elsewhere": '{"text": "1", "id": ' + DIGITS + "}",
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_is_named_by_file_and_line(tmp_path, capsys, case):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "1 2"}\n' + RECORDS[case] + '\n{"text": "3"}\n')
    flags = ["--input", str(path), "--output-prefix", f"{tmp_path}/o", "--workers", "1"]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    assert preprocess_data.main(flags) == 2
    one_line(capsys, f"{path}, line 2")
    assert train_tokenizer.main(["--input", str(path), "--out", f"{tmp_path}/t"]) == 2
    one_line(capsys, f"{path}, line 2")
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_what_python_reads_in_other_keys_is_read(tmp_path):
    """As in Megatron's tool, the last of two keys counts, and NaN elsewhere does not matter."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    line = '{"text": "1", "text": "2 3", "score": NaN, "a": Infinity, "b": "\\ud800"}'
    (tmp_path / "x.jsonl").write_text(line)
    flags = ["--input", f"{tmp_path}/x.jsonl", "--output-prefix", f"{tmp_path}/o"]
    flags += ["--workers", "1", "--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    assert preprocess_data.main(flags) == 0
    numbers = [int(word) for word in json.loads(line)["text"].split()]
    assert IndexedDataset(f"{tmp_path}/o_text_document").get(0).tolist() == numbers


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path_factory.mktemp("data") / "d")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for _ in range(3):
        builder.add_document([1, 2], [2])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(
    "line",
    [
        *(text for case, text in NO_JSON.items() if case != "empty"),
        *NO_OBJECT.values(),
        '{"weight": null}',
        '{"weight": "1"}',
        '{"weight": true}',
        '{"weight": [1]}',
        '{"weight": NaN}',
        '{"weight": -Infinity}',
        '{"weight": 1e999}',
        '{"weight": ' + DIGITS + "}",
        '{"weight": ' + "9" * 400 + "}",
        '{"weight": 1, "weight": 2}',
        '{"weight": 1, "\\u0077eight": 2}',
    ],
    ids=lambda line: line[:30],
)
def test_weights_of_other_types_are_refused(dataset, tmp_path, capsys, line):
    path = tmp_path / "w.jsonl"
    path.write_text('{"weight": 1}\n' + line + '\n{"weight": 1}\n')
    out = tmp_path / "o.weights"
    assert weights.main(["make", dataset, "--from", str(path), "--output", str(out)]) == 2
    # A number that is no weight is named by its document.
    finite = not any(word in line for word in ('": NaN', "Infinity", "1e999"))
    one_line(capsys, str(path) if finite else "document 1")
    assert not out.exists()


def test_keys_twice_that_are_not_read_do_not_matter(dataset, tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_text('{"weight": 1, "a": {"weight": 2, "weight": 3}, "a": "\\"weight\\""}\n' * 3)
    out = tmp_path / "o.weights"
    assert weights.main(["make", dataset, "--from", str(path), "--output", str(out)]) == 0


@pytest.mark.parametrize("case", [*NO_JSON, *NO_OBJECT])
def test_one_reader_has_one_error(case):
    with pytest.raises(JsonError) as refused:
        parse_object({**NO_JSON, **NO_OBJECT}[case].encode())
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)
