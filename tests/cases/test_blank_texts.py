"""Strings of spaces are text, as for Megatron's own tools/preprocess_data.py.

Its rule, in `Encoder.encode`: every string is tokenized; what has a token is a sequence; a document
is its sequences, with the end-of-document token behind the last one.
"""

import json
from pathlib import Path

import pytest

from megatron_dwm.cli import preprocess as preprocess_data
from megatron_dwm.corpus import preprocess_workers

SPACES = [" ", "   ", "\n", "\t", "\n    ", "   \n\n   ", "\u00a0", "\u3000", "\x0b\x0c", "\x1c"]
DOCUMENTS = [
    *SPACES,
    ["def f():", "\n    ", "return 1"],
    ["", " ", ""],
    ["a", "", "  "],
    "plain",
    "",
    [],
    [""],
]


def sentencepiece_model(folder: Path, extra_spaces: str) -> list[str]:
    """A model that keeps spaces, or one that strips them; returns its flags."""
    import sentencepiece

    sentences = ["def f():", "    return 1", "plain  text\twith a tab", "the cat sat on a mat"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / extra_spaces),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=extra_spaces == "stripped",
        minloglevel=2,
    )
    return [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        f"{folder}/{extra_spaces}.model",
    ]


def hugging_face(folder: Path, with_bos: bool) -> list[str]:
    """A byte-level tokenizer, with a token in front of every text or without; its flags."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<s>", "</s>", *alphabet])}
    fast = Tokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if with_bos:
        fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder / "hf")
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{folder}/hf"]


@pytest.fixture(params=["kept", "stripped", "byte level", "byte level with bos"])
def tokenizer_flags(request, tmp_path):
    if request.param in ("kept", "stripped"):
        return sentencepiece_model(tmp_path, request.param)
    return hugging_face(tmp_path, request.param == "byte level with bos")


def by_the_rule(tokenizer, documents: list, eod: bool) -> list[list[list[int]]]:
    """Returns the sequences of each document that has tokens."""
    expected = []
    for value in documents:
        found = [
            list(tokenizer.tokenize(s)) for s in (value if isinstance(value, list) else [value])
        ]
        found = [ids for ids in found if len(ids) > 0]
        if found and eod:
            found[-1].append(tokenizer.eod)
        if found:
            expected.append(found)
    return expected


@pytest.mark.parametrize("eod", [False, True])
def test_every_string_is_tokenized(tmp_path, capsys, tokenizer_flags, eod):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in DOCUMENTS))
    argv = ["--input", str(path), "--output-prefix", f"{tmp_path}/o", "--workers", "1"]
    argv += [*tokenizer_flags, *(["--append-eod"] if eod else [])]
    assert preprocess_data.main(argv) == 0
    tokenizer = preprocess_workers.build_megatron_tokenizer(preprocess_data.parse_args(argv))
    expected = by_the_rule(tokenizer, DOCUMENTS, eod)
    data = IndexedDataset(f"{tmp_path}/o_text_document")
    bounds = data.document_indices.tolist()
    written = [
        [data.get(i).tolist() for i in range(start, stop)]
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    assert written == expected
    skipped = len(DOCUMENTS) - len(expected)
    assert f"{skipped} empty documents skipped" in capsys.readouterr().out


def test_a_plain_text_of_spaces_is_a_document(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (tmp_path / "x.txt").write_text("   \n\n   ")
    flags = sentencepiece_model(tmp_path, "kept")
    argv = ["--input", f"{tmp_path}/x.txt", "--output-prefix", f"{tmp_path}/o", "--workers", "1"]
    assert preprocess_data.main([*argv, *flags]) == 0
    args = preprocess_data.parse_args([*argv, *flags])
    ids = preprocess_workers.build_megatron_tokenizer(args).tokenize("   \n\n   ")
    assert len(ids) > 1
    assert IndexedDataset(f"{tmp_path}/o_text_document").get(0).tolist() == list(ids)


def test_spaces_that_are_no_number_are_refused(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "1 2"}\n{"text": ""}\n{"text": "  "}\n')
    argv = ["--input", f"{tmp_path}/x.jsonl", "--output-prefix", f"{tmp_path}/o", "--workers", "1"]
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    assert preprocess_data.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "x.jsonl, line 3" in lines[0]
