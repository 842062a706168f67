"""What lies beside the weights of a Hugging Face folder comes back from import and export.

Shown for an export of the import itself, and of a checkpoint with a run's arguments, which know of
the import only by --tokenizer-model. The truth is the folder that went in: its files byte by byte,
and what transformers reads of them.
"""

import argparse
import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from megatron_dwm.cli.convert.command import main
from megatron_dwm.conversion import TorchDistCheckpoint, find_checkpoint
from tests import tiny_hf_models

TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
FILES = {
    "generation_config.json": json.dumps(
        {"bos_token_id": 1, "eos_token_id": [0, 7, 9], "do_sample": True, "temperature": 0.6}
    ),
    "chat_template.jinja": TEMPLATES["default"],
    "additional_chat_templates/tool_use.jinja": TEMPLATES["tool_use"],
    "additional_chat_templates/rag.jinja": TEMPLATES["rag"],
    "special_tokens_map.json": '{"eos_token": "<e>", "bos_token": "t1"}',
    "added_tokens.json": '{"t9": 9}',
}


def write_tokenizer(folder):
    # Some families' classes add special tokens of their own, which need rows too.
    vocabulary = {"<e>": 0} | {f"t{i}": i for i in range(1, 240)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<e>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>").save_pretrained(folder)


def write_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def write_source(folder, name="qwen2", **config):
    tiny_hf_models.write(name, folder)
    write_tokenizer(folder)
    write_files(folder, FILES)
    values = {"eos_token_id": [0, 7, 9], "initializer_range": 0.123, **config}
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **values}))
    return folder


def take_in(source, run, *flags):
    return main(["import", "--hf-path", str(source), "--megatron-path", str(run), *flags])


def write_out(run, out, *flags):
    return main(["export", "--megatron-path", str(run), "--hf-path", str(out), *flags])


def trained(run, out, **changes):
    """Writes an import's weights as a run does that began with it: with the run's arguments."""
    checkpoint = TorchDistCheckpoint(find_checkpoint(run))
    state = {key: checkpoint.load(key).clone() for key in checkpoint.tensors}
    dist_checkpoint.save(state, checkpoint_id=out / "iter_0000003", no_dist=True)
    args = {k: v for k, v in vars(checkpoint.args).items() if k != "hf_vocab_size"}
    saved = {"args": argparse.Namespace(**{**args, **changes}), "iteration": 3}
    torch.save(saved, out / "iter_0000003" / "common.pt")
    return out / "iter_0000003"


def configuration(folder):
    """Returns what transformers reads of config.json, but where it lies and who wrote it."""
    values = AutoConfig.from_pretrained(folder).to_dict()
    return {k: v for k, v in values.items() if k not in ("_name_or_path", "transformers_version")}


@pytest.mark.parametrize("after_training", [False, True], ids=["import", "run"])
def test_every_file_comes_back(tmp_path, after_training):
    source = write_source(tmp_path / "hf")
    assert take_in(source, tmp_path / "run") == 0
    run = trained(tmp_path / "run", tmp_path / "later") if after_training else tmp_path / "run"
    back = tmp_path / "back"
    assert write_out(run, back) == 0
    for name in (*FILES, "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    assert GenerationConfig.from_pretrained(back).eos_token_id == [0, 7, 9]
    assert AutoTokenizer.from_pretrained(back).chat_template == TEMPLATES
    assert not (back / "import.json").exists()


@pytest.mark.parametrize("after_training", [False, True], ids=["import", "run"])
@pytest.mark.parametrize("name", tiny_hf_models.MODELS)
def test_the_configuration_comes_back(tmp_path, name, after_training):
    """All that transformers reads, with numbers that the model's family does not know."""
    gpt2 = tiny_hf_models.MODELS[name][0] == "gpt2"
    dropout = {"attn_pdrop": 0.05} if gpt2 else {"attention_dropout": 0.05}
    more = {"use_cache": False, "unknown_to_all": [1, {"a": 2}], "bos_token_id": 3}
    source = write_source(tmp_path / "hf", name, **dropout, **more)
    assert take_in(source, tmp_path / "run") == 0
    run = trained(tmp_path / "run", tmp_path / "later") if after_training else tmp_path / "run"
    assert write_out(run, tmp_path / "back") == 0
    truth, found = configuration(source), configuration(tmp_path / "back")
    # Said where transformers computes it from the rest; tests of the logits cover it.
    computed = {"head_dim", "n_inner"}
    for key, value in truth.items():
        if key != "use_cache" and not (key in computed and value is None):
            assert found[key] == value, key
    # transformers 4 spells RoPE in two more keys, which are written for it.
    assert found.keys() - truth.keys() <= {"rope_theta", "rope_scaling", "n_ctx", *computed}


def test_dropout_of_the_attention_goes_both_ways(tmp_path, capsys):
    source = write_source(tmp_path / "hf", attention_dropout=0.25)
    assert take_in(source, tmp_path / "run") == 0
    assert "--attention-dropout 0.25" in capsys.readouterr().out
    run = trained(tmp_path / "run", tmp_path / "later", attention_dropout=0.0)
    assert write_out(run, tmp_path / "back") == 0
    assert json.loads((tmp_path / "back/config.json").read_text())["attention_dropout"] == 0.0


def test_what_stays_behind_is_named(tmp_path, capsys):
    source = write_source(tmp_path / "hf")
    left = ["LICENSE", "README.md", "modeling_own.py", "onnx/model.onnx", ".gitattributes"]
    write_files(source, dict.fromkeys([*left, "additional_chat_templates/notes.txt"], "x"))
    assert take_in(source, tmp_path / "run") == 0
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("Not carried"))
    for name in ("LICENSE", "README.md", "modeling_own.py", "onnx/", ".gitattributes", "notes.txt"):
        assert name in line
    assert not any(name in line for name in (*FILES, "config.json", "tokenizer.json", "model-"))


def test_files_of_sentencepiece_models_come_back(tmp_path, monkeypatch):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tiny"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    source = tmp_path / "hf"
    tiny_hf_models.write("llama", source)
    shutil.copyfile(tmp_path / "tiny.model", source / "tokenizer.model")
    names = ("generation_config.json", "chat_template.jinja")
    write_files(source, {name: FILES[name] for name in names})
    assert take_in(source, tmp_path / "run") == 0
    run = trained(tmp_path / "run", tmp_path / "later")
    assert write_out(run, tmp_path / "back") == 0
    for name in (*names, "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    """The import's own export has its files; what a run cannot know is said at once."""
    source = tmp_path / "hf"
    tiny_hf_models.write("llama", source)
    write_files(source, {"generation_config.json": FILES["generation_config.json"]})
    assert take_in(source, tmp_path / "run") == 0
    assert "no tokenizer beside which an export" in capsys.readouterr().err
    assert write_out(tmp_path / "run", tmp_path / "back") == 0
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == [0, 7, 9]


def test_another_tokenizer_or_model_gets_nothing_of_the_import(tmp_path, capsys):
    """Ids and settings are those of one tokenizer and one model."""
    source = write_source(tmp_path / "hf")
    assert take_in(source, tmp_path / "run") == 0
    other = tmp_path / "other"
    write_tokenizer(other)
    assert write_out(tmp_path / "run", tmp_path / "a", "--tokenizer-model", str(other)) == 0
    assert "config.json of the import are not carried" in capsys.readouterr().err
    assert GenerationConfig.from_pretrained(tmp_path / "a").eos_token_id == 0

    tiny_hf_models.write("llama", tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    assert take_in(tmp_path / "llama", tmp_path / "run2") == 0
    run = trained(
        tmp_path / "run2", tmp_path / "x", tokenizer_model=str(tmp_path / "run/tokenizer")
    )
    assert write_out(run, tmp_path / "b") == 0
    assert "are another model's" in capsys.readouterr().err
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == 0
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert "initializer_range" not in config


def test_templates_of_a_tokenizer_that_was_not_imported(tmp_path):
    """A run from scratch that names a tokenizer's own folder."""
    source = write_source(tmp_path / "hf")
    assert take_in(source, tmp_path / "run") == 0
    tokenizer = tmp_path / "tokenizer"
    write_tokenizer(tokenizer)
    write_files(tokenizer, {name: text for name, text in FILES.items() if "template" in name})
    run = trained(tmp_path / "run", tmp_path / "x", tokenizer_model=str(tokenizer))
    assert write_out(run, tmp_path / "back") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATES
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == 0


def test_a_damaged_record_is_refused_in_one_line(tmp_path, capsys):
    source = write_source(tmp_path / "hf")
    assert take_in(source, tmp_path / "run") == 0
    (tmp_path / "run/tokenizer/import.json").write_text('{"vocab_size": "many"}')
    capsys.readouterr()
    assert write_out(tmp_path / "run", tmp_path / "back") != 0
    message = capsys.readouterr().err
    assert "import.json has vocab_size 'many'" in message and message.count("\n") == 1
