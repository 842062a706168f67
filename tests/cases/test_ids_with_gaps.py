"""The vocabulary ends behind the largest id, special tokens included, not at the number of tokens.

The ids of a tokenizer may have gaps: tokens were taken out, or added with ids of their own. What is
right here comes from the tokenizers library, which gives the ids, and from the rows that were
stored.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_dwm.hosts import cpu

pytest.importorskip("transformers")
cpu.install()

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "conversion"))

import test_dwm_export as dwm  # noqa: E402
from test_convert_export import export, model_tensors, write_run  # noqa: E402

from megatron_dwm.cli import preprocess as preprocess_data  # noqa: E402
from megatron_dwm.conversion import iter_hf_tensors  # noqa: E402
from megatron_dwm.core.vocabulary import megatron_vocabulary_size, vocabulary_size  # noqa: E402
from megatron_dwm.corpus import preprocess_workers  # noqa: E402
from megatron_dwm.hosts.megatron_lm import build  # noqa: E402

WORDS = "embedding.word_embeddings.weight"


def write_tokenizer(folder: Path, ids: dict[str, int], special: dict[str, int]) -> str:
    """Writes a tokenizer of words with these ids; special tokens may lie beyond the model's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    # The library writes ids without gaps, for which it would take gigabytes; they come afterwards.
    dense = {word: number for number, word in enumerate({**ids, **special})}
    raw = Tokenizer(models.WordLevel(dense, unk_token="<u>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(list(special))
    folder.mkdir(parents=True)
    content = json.loads(raw.to_str())
    content["model"]["vocab"] = {**ids, **special}
    for token in content["added_tokens"]:
        token["id"] = special[token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<u>",
        "eos_token": list(special)[-1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def preprocess(tmp_path: Path, texts: list[str], *flags: str) -> int:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["--input", str(path), "--output-prefix", f"{tmp_path}/o", "--workers", "1"]
    return preprocess_data.main([*argv, *flags])


def written(tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(f"{tmp_path}/o_text_document")


# --- preprocess --------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [65498, 65499, 65536, 2**31 - 2])
@pytest.mark.parametrize("which", ["word", "eod"])
def test_the_type_holds_the_largest_id(tmp_path, capsys, largest, which):
    ids, special = {"<u>": 0, "a": 1, "b": 2}, {"<e>": 3}
    if which == "word":
        ids["b"] = largest
    else:
        special["<e>"] = largest
    model = write_tokenizer(tmp_path / "t", ids, special)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model]
    assert preprocess(tmp_path, ["a b a"], *flags, "--append-eod") == 0
    data = written(tmp_path)
    assert data.get(0).tolist() == [1, ids["b"], 1, special["<e>"]]
    # Megatron's own border, for a vocabulary of `largest + 1`.
    assert data.get(0).dtype == (np.uint16 if largest + 1 < 65500 else np.int32)
    note = capsys.readouterr().err
    assert f"ids go up to {largest}" in note and "--padded-vocab-size" in note


def test_tokens_that_a_flag_adds_count(tmp_path):
    model = write_tokenizer(tmp_path / "t", {"<u>": 0, "a": 1, "b": 2}, {"<e>": 65530})
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model]
    flags += ["--tokenizer-special-tokens", *(f"<{i}>" for i in range(100))]
    args = preprocess_data.parse_args(["--input", "x", "--output-prefix", "x", *flags])
    tokenizer = preprocess_workers.build_megatron_tokenizer(args)
    [last] = tokenizer.tokenize("<99>")
    assert last == 65630 and megatron_vocabulary_size(tokenizer) == last + 1
    assert preprocess(tmp_path, ["a b <99>"], *flags) == 0
    assert written(tmp_path).get(0).tolist() == [1, 2, last]


@pytest.mark.parametrize("text", ["5 100", "100", "65535"])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, capsys, text):
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    assert preprocess(tmp_path, ["1 99", text], *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "x.jsonl, line 2" in lines[0] and "--vocab-size" in lines[0]
    assert not list(tmp_path.glob("o_*"))


@pytest.mark.parametrize("eod", [100, 65499, 70000])
def test_an_end_of_document_beyond_the_flag_is_stored(tmp_path, eod):
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--append-eod"]
    assert preprocess(tmp_path, ["1 99"], *flags, "--null-tokenizer-eod-id", str(eod)) == 0
    assert written(tmp_path).get(0).tolist() == [1, 99, eod]


# --- Megatron's tokenizers ---------------------------------------------------------------------


def test_the_size_is_that_of_the_ids(tmp_path):
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "t", {"<u>": 0, "a": 1, "b": 9}, {"<s>": 4, "<e>": 12})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a b <s> <e>").input_ids
    assert ids == [1, 9, 4, 12] and len(tokenizer) == 5
    assert vocabulary_size(tokenizer) == 13


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SFTTokenizer"])
def test_the_weighting_model_knows_all_rows(tmp_path, monkeypatch, kind):
    """What a checkpoint says of its vocabulary is what export and scoring go by."""
    folder = write_tokenizer(tmp_path / "t", {"<u>": 0, "a": 1, "b": 9}, {"<s>": 4, "<e>": 12})
    args = SimpleNamespace(
        **vars(
            preprocess_data.parse_args(
                ["--input", "x", "--output-prefix", "x", "--tokenizer-type", kind]
                + ["--tokenizer-model", folder]
            )
        ),
        sft_tokenizer_prompt_format="default",
    )
    tokenizer = preprocess_workers.build_megatron_tokenizer(args)
    assert tokenizer.vocab_size == 5
    assert megatron_vocabulary_size(tokenizer) == 13
    monkeypatch.setattr(build, "get_tokenizer", lambda: tokenizer)
    numbers = dict.fromkeys(("rotary_base", "rotary_percent", "rope_scaling_factor"), 1.0)

    def description(rows: int) -> dict:
        embedding = SimpleNamespace(
            position_embedding_type="rope", rope_scaling=False, vocab_size=rows, **numbers
        )
        fields = "kv_channels normalization layernorm_epsilon gated_linear_unit add_bias_linear"
        fields += " add_qkv_bias qk_layernorm"
        transformer = SimpleNamespace(activation_func=len, **dict.fromkeys(fields.split(), 1))
        scorer = SimpleNamespace(
            transformer_config=transformer, module=SimpleNamespace(embedding_shape=embedding)
        )
        return build._description(SimpleNamespace(shape=dict), scorer)

    assert description(128)["vocab_size"] == 13
    # There are no more rows than the trainer has made.
    assert description(8)["vocab_size"] == 8


# --- export ------------------------------------------------------------------------------------


def test_export_keeps_the_row_of_the_largest_id(tmp_path):
    """Eight rows were trained; four tokens have the ids 0, 1, 2 and 6."""
    from transformers import AutoTokenizer

    model = write_tokenizer(tmp_path / "t", {"<u>": 0, "a": 1, "b": 2}, {"<e>": 6})
    tensors, _ = model_tensors()
    changes = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model}
    run = write_run(tmp_path / "run", tensors, **changes, vocab_size=None)
    assert export(run, tmp_path / "out") == 0
    rows = dict(iter_hf_tensors(tmp_path / "out"))
    eos = AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id
    assert eos == 6
    for name, stored in (
        ("model.embed_tokens.weight", tensors[WORDS]),
        ("lm_head.weight", tensors["output_layer.weight"]),
    ):
        assert torch.equal(rows[name], stored[:7])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (7, 6)


def test_a_flag_or_a_model_with_too_few_rows_is_refused(tmp_path, capsys):
    tensors, _ = model_tensors()
    for last, flags, said in (
        (6, ["--vocab-size", "6"], "ids up to 6"),
        (8, [], "the tokenizer's size is 9"),
    ):
        model = write_tokenizer(tmp_path / f"t{last}", {"<u>": 0, "a": 1}, {"<e>": last})
        changes = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model}
        run = write_run(tmp_path / f"run{last}", tensors, **changes)
        assert export(run, tmp_path / "out", *flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0]
        assert not (tmp_path / "out").exists()


def test_an_import_whose_tokenizer_has_more_ids_keeps_their_rows(tmp_path):
    model = write_tokenizer(tmp_path / "t", {"<u>": 0, "a": 1}, {"<e>": 6})
    tensors, _ = model_tensors()
    changes = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model}
    run = write_run(tmp_path / "run", tensors, **changes, hf_vocab_size=5)
    assert export(run, tmp_path / "out") == 0
    rows = dict(iter_hf_tensors(tmp_path / "out"))["model.embed_tokens.weight"]
    assert torch.equal(rows, tensors[WORDS][:7])


def test_tokens_that_the_run_added_keep_their_rows(tmp_path, capsys):
    """--tokenizer-special-tokens gives ids behind those of the files."""
    model = write_tokenizer(tmp_path / "t", {"<u>": 0, "a": 1}, {"<e>": 4})
    tensors, _ = model_tensors()
    changes = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model}
    run = write_run(tmp_path / "run", tensors, **changes, special_tokens=["<x>", "<y>", "a"])
    flags = ["--tokenizer-special-tokens", "<x>", "<y>", "a", "--tokenizer-model", model]
    args = ["--input", "x", "--output-prefix", "x", "--tokenizer-type", "HuggingFaceTokenizer"]
    megatron = preprocess_workers.build_megatron_tokenizer(
        preprocess_data.parse_args([*args, *flags])
    )
    [last] = megatron.tokenize("<y>")
    assert last == 6
    assert export(run, tmp_path / "out") == 0
    assert "<x>, <y> of the run's --tokenizer-special-tokens" in capsys.readouterr().err
    rows = dict(iter_hf_tensors(tmp_path / "out"))["model.embed_tokens.weight"]
    assert torch.equal(rows, tensors[WORDS][: last + 1])


def test_the_end_of_document_of_a_run_without_a_tokenizer_keeps_its_row(tmp_path):
    tensors, _ = model_tensors()
    run = write_run(tmp_path / "run", tensors, vocab_size=5, null_tokenizer_eod_id=6)
    assert export(run, tmp_path / "out") == 0
    rows = dict(iter_hf_tensors(tmp_path / "out"))["model.embed_tokens.weight"]
    assert torch.equal(rows, tensors[WORDS][:7])


def test_export_of_a_weighting_model_counts_ids(tmp_path, capsys):
    model = write_tokenizer(tmp_path / "t", {"<u>": 0, "a": 1, "b": 2}, {"<e>": 6})
    args = dwm.llm_args(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)
    tensors = dwm.tensors_of()
    run = dwm.write(tmp_path / "run", tensors, dwm.described(vocab_size=7), args)
    assert dwm.export(run, tmp_path / "out") == 0
    rows = dict(iter_hf_tensors(tmp_path / "out"))["model.embed_tokens.weight"]
    assert torch.equal(rows[:7], tensors[WORDS][:7])
    # No token of a text has the id of padding.
    pad = json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"]
    assert pad not in (0, 1, 2, 6) and pad < len(rows)

    short = dwm.write(tmp_path / "short", tensors, dwm.described(vocab_size=5), args)
    assert dwm.export(short, tmp_path / "none") == 2
    assert "the tokenizer has 4 tokens with ids up to 6" in capsys.readouterr().err


def test_padding_of_a_weighting_model_never_gets_the_id_of_a_word(tmp_path, capsys):
    """The tokenizers library numbers new tokens from their count, which is an id here."""
    from transformers import AutoTokenizer

    model = write_tokenizer(tmp_path / "t", {"<u>": 1, "a": 2, "b": 4}, {"<e>": 3})
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == tokenizer("b").input_ids[0] == 4
    args = dwm.llm_args(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)
    run = dwm.write(tmp_path / "run", dwm.tensors_of(), dwm.described(vocab_size=7), args)
    assert dwm.export(run, tmp_path / "out") == 2
    assert "cannot be given a padding token" in capsys.readouterr().err
    assert dwm.export(run, tmp_path / "out", "--tokenizer-model", "none") == 0
