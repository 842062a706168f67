"""`megatron-dwm tokenizer`: Llama's layout, determinism, sampling and errors."""

import gzip
import re

import pytest

from megatron_dwm.cli import tokenizer as train_tokenizer
from megatron_dwm.corpus.train_tokenizer import TextSample, sentences


def test_model_has_llama_layout(pieces, texts):
    assert len(pieces) == 320
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert pieces.id_to_piece(3) == "<0x00>"
    for text in texts[:20] + ["日本\n\t  x", " leading", "trailing  "]:
        assert pieces.decode(pieces.encode(text)) == text
    # Digits stand alone.
    assert len(pieces.encode("4242")) >= 4


def test_training_is_deterministic_and_independent_of_file_split(corpus, texts, model, tmp_path):
    lines = corpus.read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:100]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[100:])))
    argv = ["--input", f"{tmp_path}/*.jsonl*", "--out", f"{tmp_path}/again", "--vocab-size", "320"]
    assert train_tokenizer.main(argv) == 0
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    assert (tmp_path / "again.vocab").read_text().startswith("<unk>\t0\n<s>\t0\n</s>\t0\n")


def test_transformers_llama_tokenizer_reads_the_model(model, pieces, texts):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.LlamaTokenizer.from_pretrained(str(model.parent))
    for text in texts[:5]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_sample_keeps_the_budget_and_ignores_order(texts):
    def sample(order):
        taken = TextSample(20_000, seed=3)
        for text in order:
            taken.add(text)
        return taken

    forwards, backwards = sample(texts), sample(reversed(texts))
    assert forwards.texts() == backwards.texts()
    assert 15_000 < forwards.bytes <= 20_000
    assert forwards.dropped == len(texts) - len(forwards) > 0


def test_sentences_are_cut_and_lose_no_text():
    text = "a" * 50 + " " + "bc " * 100 + "\n\n" + "ü" * 300
    cut = list(sentences([text], max_bytes=64))
    assert max(len(s.encode()) for s in cut) <= 64
    assert "".join(cut) == text.rstrip().replace("\n\n", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a b"}', "text is too small.*--vocab-size 26"),
        ('{"text": "   "}', "no text in it"),
        ('{"body": "a b"}', "no key 'text'.*body"),
        ('{"text": "a"', "line 1: not JSON"),
        ('{"text": "' + "".join(map(chr, range(200, 700))) + '"}', "larger --vocab-size"),
    ],
)
def test_tokenizer_errors_are_one_line(tmp_path, capsys, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    argv = ["--input", f"{tmp_path}/x.jsonl", "--out", f"{tmp_path}/t", "--vocab-size", "400"]
    assert train_tokenizer.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not list(tmp_path.glob("t.*"))


def test_existing_model_is_refused_kept_or_overwritten(corpus, tmp_path, capsys):
    argv = ["--input", str(corpus), "--out", f"{tmp_path}/t", "--vocab-size", "320"]
    (tmp_path / "t.model").write_bytes(b"old")
    assert train_tokenizer.main(argv) == 2
    assert "--force" in capsys.readouterr().err
    assert train_tokenizer.main([*argv, "--skip-existing"]) == 0
    assert (tmp_path / "t.model").read_bytes() == b"old"
    assert train_tokenizer.main([*argv, "--force"]) == 0
    assert (tmp_path / "t.model").read_bytes() != b"old"
