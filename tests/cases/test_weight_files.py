"""Which files hold the weights of a Hugging Face folder: those that transformers takes.

Every folder holds weights twice or more, each copy with values of its own, so that the values say
which copy was read. The truth is what `from_pretrained` loads. Read are: `convert import`,
`--dwm-init hf:` (`iter_megatron_tensors`) and the plain reader. `verify` and scoring load through
transformers itself and share the refusals.

NOT exercised: adapters with PEFT installed.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_dwm.cli.convert.command import main
from megatron_dwm.conversion import (
    ConversionError,
    TorchDistCheckpoint,
    find_checkpoint,
    iter_hf_tensors,
    iter_megatron_tensors,
)
from megatron_dwm.errors import DWMError
from megatron_dwm.scoring.huggingface import HuggingFaceScorer
from tests import tiny_hf_models

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns folder and tensors of a model in shards; tests must not change the folder."""
    folder = tmp_path_factory.mktemp("source")
    return folder, tiny_hf_models.write("llama_tied", folder)


def marked(tensors, value):
    """Returns the tensors with a value of their own in the last norm."""
    return {**tensors, NORM: torch.full_like(tensors[NORM], value)}


def only(folder, out, *names):
    """Copies the configuration, and files of these names."""
    out.mkdir()
    for name in ("config.json", *names):
        shutil.copyfile(folder / name, out / name)
    return out


def shards(out, tensors, index=INDEX, stem="part"):
    """Writes tensors into two files and an index."""
    names = sorted(tensors)
    weight_map = {name: f"{stem}-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, out / file)
    (out / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_config(out, **values):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **values}))


def single_beside_shards(out, tensors):
    save_file(marked(tensors, 1.0), out / SINGLE)
    shards(out, marked(tensors, 2.0))


def index_of_files_that_are_gone(out, tensors):
    """What saving twice leaves: the second time as one file."""
    shards(out, marked(tensors, 2.0))
    for path in out.glob("part-*"):
        path.unlink()
    save_file(marked(tensors, 1.0), out / SINGLE)


def safetensors_beside_bin(out, tensors):
    torch.save(marked(tensors, 1.0), out / "pytorch_model.bin")
    shards(out, marked(tensors, 2.0))


def named_by_the_config(out, tensors):
    save_file(marked(tensors, 1.0), out / SINGLE)
    shards(out, marked(tensors, 2.0), index="other.safetensors.index.json")
    with_config(out, transformers_weights="other.safetensors.index.json")


def one_tensor_in_two_shards(out, tensors):
    """The index names the first; the second has a copy of its own."""
    tensors = marked(tensors, 1.0)
    shards(out, tensors)
    path = out / INDEX
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "part-0.safetensors"
    path.write_text(json.dumps(index))
    for number in range(2):
        file = out / f"part-{number}.safetensors"
        save_file({**load_file(file), NORM: torch.full_like(tensors[NORM], 4.0 + number)}, file)


def index_that_names_the_other_shard(out, tensors):
    shards(out, marked(tensors, 1.0))
    path = out / INDEX
    index = json.loads(path.read_text())
    other = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
    index["weight_map"] = {name: other[file] for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


FOLDERS = (
    single_beside_shards,
    index_of_files_that_are_gone,
    safetensors_beside_bin,
    named_by_the_config,
    one_tensor_in_two_shards,
    index_that_names_the_other_shard,
)


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_every_reader_takes_what_transformers_takes(tmp_path, source, make):
    folder, tensors = source
    out = only(folder, tmp_path / "hf")
    make(out, tensors)
    truth = AutoModelForCausalLM.from_pretrained(out).state_dict()[NORM]
    assert len(truth.unique()) == 1, "one of the copies, whole"

    assert torch.equal(dict(iter_hf_tensors(out))[NORM], truth)
    assert torch.equal(dict(iter_megatron_tensors(out))["decoder.final_layernorm.weight"], truth)
    run = tmp_path / "run"
    assert main(["import", "--hf-path", str(out), "--megatron-path", str(run)]) == 0
    stored = TorchDistCheckpoint(find_checkpoint(run)).load("decoder.final_layernorm.weight")
    assert torch.equal(stored, truth)


def test_saving_twice_in_two_sizes(tmp_path, source):
    """`save_pretrained` itself, in shards and as one file, in both orders."""
    model = AutoModelForCausalLM.from_pretrained(source[0])
    for order in (("20KB", "1GB"), ("1GB", "20KB"), ("20KB", "40KB")):
        out = tmp_path / "-".join(order)
        for number, size in enumerate(order):
            with torch.no_grad():
                model.model.norm.weight.fill_(number + 1)
            model.save_pretrained(out, max_shard_size=size)
        truth = AutoModelForCausalLM.from_pretrained(out).state_dict()[NORM]
        assert torch.equal(dict(iter_hf_tensors(out))[NORM], truth), order


def test_weights_that_are_not_read_are_named(tmp_path, source, capsys):
    folder, tensors = source
    out = only(folder, tmp_path / "hf")
    single_beside_shards(out, tensors)
    torch.save({}, out / "pytorch_model.bin")
    assert main(["import", "--hf-path", str(out), "--megatron-path", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "not read" in line)
    assert SINGLE in line
    assert all(name in line for name in (INDEX, "part-0.safetensors", "pytorch_model.bin"))


def refusals(out):
    """Returns what each reader says of a folder that none must read."""
    found = []
    with pytest.raises(ConversionError) as error:
        dict(iter_hf_tensors(out))
    found.append(str(error.value))
    with pytest.raises(DWMError) as error:
        HuggingFaceScorer(str(out), torch.device("cpu"))
    found.append(str(error.value))
    return found


def adapter(out, tensors):
    save_file(tensors, out / SINGLE)
    (out / "adapter_config.json").write_text("{}")


def distributed(out, tensors):
    """transformers 5 takes such files before all others."""
    save_file(tensors, out / SINGLE)
    save_file(tensors, out / "shard-00000-model-00001-of-00001.safetensors")


def named_and_not_there(out, tensors):
    save_file(tensors, out / SINGLE)
    with_config(out, transformers_weights="elsewhere.safetensors")


def named_outside(out, tensors):
    save_file(tensors, out.parent / SINGLE)
    save_file(tensors, out / SINGLE)
    with_config(out, transformers_weights="../" + SINGLE)


def map_is_a_list(out, tensors):
    (out / INDEX).write_text('{"weight_map": ["a.safetensors"]}')


def map_names_a_number(out, tensors):
    (out / INDEX).write_text('{"weight_map": {"a": 3}}')


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (adapter, "adapter_config.json"),
        (distributed, "shard-00000-model-00001-of-00001.safetensors"),
        (named_and_not_there, "elsewhere.safetensors"),
        (named_outside, "../model.safetensors"),
        (map_is_a_list, "weight_map is a JSON list, not an object"),
        (map_names_a_number, "names the file 3, not a string"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_no_reader_can_read_is_refused_by_all(tmp_path, source, capsys, make, named):
    folder, tensors = source
    out = only(folder, tmp_path / "hf")
    make(out, tensors)
    for message in refusals(out):
        assert named in message and "\n" not in message
    words = ["--hf-path", str(out), "--megatron-path", str(tmp_path / "run")]
    assert main(["import", *words]) != 0
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_index_that_promises_too_much_is_refused(tmp_path, source):
    folder, tensors = source
    out = only(folder, tmp_path / "hf")
    shards(out, {name: t for name, t in tensors.items() if name != NORM})
    index = json.loads((out / INDEX).read_text())
    index["weight_map"][NORM] = "part-0.safetensors"
    (out / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=rf"names {NORM}, which none of its files holds"):
        dict(iter_hf_tensors(out))


def test_a_classifier_in_bin_files_still_scores(tmp_path, source):
    """transformers reads these; that import does not is no reason to refuse them."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    values = tiny_hf_models.MODELS["llama_tied"][1]
    config = LlamaConfig(**{**values, "num_labels": 1, "pad_token_id": 0})
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / SINGLE).unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    scorer = HuggingFaceScorer(str(tmp_path / "hf"), torch.device("cpu"))
    assert scorer.vocab_size == tiny_hf_models.VOCAB_SIZE
