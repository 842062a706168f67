"""`megatron-dwm preprocess` and what it reads with."""

import argparse
import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.cli import preprocess as preprocess_data
from megatron_dwm.corpus import ordered_pool, preprocess_workers, text_batches
from megatron_dwm.errors import InputError
from megatron_dwm.files.text_files import expand_inputs, input_format, read_texts


def preprocess(inputs, prefix, model, *more):
    argv = ["--input", *map(str, inputs), "--output-prefix", str(prefix)]
    argv += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    return preprocess_data.main([*argv, "--workers", "1", *more])


def dataset(prefix, key="text"):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(f"{prefix}_{key}_document")


# --- inputs -----------------------------------------------------------------------------------


def test_help_of_the_corpus_builder_needs_neither_torch_nor_megatron():
    tools = str(Path(__file__).parents[3] / "tools")
    code = (
        f"import sys; sys.path.insert(0, {tools!r}); sys.argv = ['build', '--help']\n"
        "import build_demo_corpus\n"
        "try: build_demo_corpus.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'megatron', 'sentencepiece'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_expand_inputs_sorts_patterns_and_drops_repeats(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c[1].txt"):
        (tmp_path / name).write_text("x")
    found = expand_inputs([f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl", f"{tmp_path}/c[1].txt"])
    assert [p.name for p in found] == ["a.jsonl", "b.jsonl", "c[1].txt"]
    with pytest.raises(InputError, match="no such file"):
        expand_inputs([f"{tmp_path}/none*"])
    with pytest.raises(InputError, match="not a file"):
        expand_inputs([str(tmp_path)])


def test_input_format_goes_by_name():
    assert input_format(Path("a.jsonl.gz")) == "jsonl"
    assert input_format(Path("a.v2.txt")) == "text"
    assert input_format(Path("a.dat"), "text") == "text"
    with pytest.raises(InputError, match="--input-format"):
        input_format(Path("a.dat.xz"))


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_compressed_inputs_read_alike(corpus, texts, tmp_path, suffix):
    data = corpus.read_bytes()
    path = tmp_path / f"c.jsonl{suffix}"
    if suffix == ".zst":
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(pack.get(suffix, bytes)(data))
    read = list(read_texts(path, "text"))
    assert [text for text, _ in read] == texts
    assert read[-1][1] <= path.stat().st_size


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compressed_input_is_one_clear_error(corpus, tmp_path, suffix):
    if suffix == ".zst":
        pytest.importorskip("zstandard")
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(b"this is no compressed file" * 10)
    with pytest.raises(InputError, match="damaged or truncated"):
        list(read_texts(path, "text"))


def test_truncated_gzip_is_an_error(corpus, tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(corpus.read_bytes())[:-500])
    with pytest.raises(InputError, match="damaged or truncated"):
        list(read_texts(path, "text"))


# --- preprocess_data --------------------------------------------------------------------------


def test_roundtrip_with_document_bounds_and_eod(corpus, texts, model, pieces, tmp_path, capsys):
    assert preprocess([corpus], tmp_path / "new/out", model, "--append-eod") == 0
    data = dataset(tmp_path / "new/out")
    assert len(data) == len(texts)
    assert data.document_indices.tolist() == list(range(len(texts) + 1))
    assert data.get(0).dtype == np.uint16
    for i, text in enumerate(texts):
        assert data.get(i).tolist() == [*pieces.encode(text), pieces.eos_id()]
    assert f"{len(texts)} documents" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "out_text_document.bin",
        "out_text_document.idx",
    ]


def test_output_is_the_same_for_any_number_of_workers(corpus, model, tmp_path, monkeypatch):
    # Many batches, so that their order is at stake.
    monkeypatch.setattr(text_batches, "BLOCK_BYTES", 2000)
    for workers in "123":
        assert preprocess([corpus], tmp_path / workers, model, "--workers", workers) == 0
    for suffix in ("bin", "idx"):
        paths = [tmp_path / f"{workers}_text_document.{suffix}" for workers in "123"]
        first, *others = [path.read_bytes() for path in paths]
        assert all(other == first for other in others)


def test_inputs_of_all_kinds_in_order(model, pieces, tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nstill first")
    (tmp_path / "b.jsonl").write_text(
        '\ufeff{"text": "second"}\r\n\n{"text": ["third", "", "and"]}'
    )
    (tmp_path / "c.dat").write_text('{"text": "fourth"}\n')
    assert preprocess([tmp_path / "[ab].*"], tmp_path / "o", model) == 0
    data = dataset(tmp_path / "o")
    expected = ["first\n\nstill first", "second", "third", "and"]
    assert [data.get(i).tolist() for i in range(len(data))] == [pieces.encode(t) for t in expected]
    # A list is one document of several sequences.
    assert data.document_indices.tolist() == [0, 1, 2, 4]
    assert preprocess([tmp_path / "c.dat"], tmp_path / "c", model) == 2
    assert preprocess([tmp_path / "c.dat"], tmp_path / "c", model, "--input-format", "jsonl") == 0


def test_several_keys_and_empty_documents(model, pieces, tmp_path, capsys):
    lines = [{"q": "one", "a": "1"}, {"q": "", "a": "2"}, {"q": "three", "a": ""}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert preprocess([tmp_path / "x.jsonl"], tmp_path / "o", model, "--json-keys", "q", "a") == 0
    out = capsys.readouterr().out
    assert out.count("2 documents") == 2
    assert out.count("1 empty documents skipped") == 2
    assert dataset(tmp_path / "o", "q").get(1).tolist() == pieces.encode("three")
    assert dataset(tmp_path / "o", "a").get(1).tolist() == pieces.encode("2")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": "a"', "x.jsonl, line 41: not JSON"),
        ("[1, 2]", "x.jsonl, line 41: a JSON list"),
        ('{"body": "a"}', "x.jsonl, line 41: no key 'text'"),
        ('{"text": 5}', "x.jsonl, line 41: key 'text' holds int"),
        (b'{"text": "\xff"}', "x.jsonl, line 41: not UTF-8"),
        ('{"text": "\\ud800"}', "x.jsonl, line 41: the tokenizer cannot take this text"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_line_names_file_and_line_and_leaves_nothing(
    tmp_path, model, capsys, monkeypatch, bad, message, workers
):
    monkeypatch.setattr(text_batches, "BLOCK_BYTES", 200)
    bad = bad if isinstance(bad, bytes) else bad.encode()
    good = b'{"text": "a line of text"}\n'
    # A second fault follows: the first in the input's order is the one to report.
    (tmp_path / "x.jsonl").write_bytes(good * 40 + bad + b"\n" + good * 40 + b"{\n")
    (tmp_path / "o_text_document.idx").write_bytes(b"earlier run")
    assert preprocess([tmp_path / "x.jsonl"], tmp_path / "o", model, "--workers", workers) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o_text_document.idx", "x.jsonl"]
    assert (tmp_path / "o_text_document.idx").read_bytes() == b"earlier run"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda: os._exit(9), "(exit code 9)"),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), "(signal SIGUSR1)"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "lack of memory. Set fewer --workers"),
    ],
)
def test_dead_worker_is_reported(corpus, tmp_path, model, capsys, monkeypatch, end, said):
    monkeypatch.setattr(preprocess_workers.Encoder, "encode", lambda *_: end())
    assert preprocess([corpus], tmp_path / "o", model) == 2
    error = capsys.readouterr().err
    assert "a worker process died" in error and said in error
    assert not list(tmp_path.iterdir())


def test_earlier_fault_wins_over_a_damaged_file(tmp_path, model, capsys):
    (tmp_path / "a.jsonl").write_text("{\n")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    assert preprocess([tmp_path / "*.jsonl*"], tmp_path / "o", model) == 2
    assert "a.jsonl, line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input", "none.jsonl"], "--input none.jsonl: no such file"),
        (["--tokenizer-type", "Foo"], "--tokenizer-type Foo: unknown"),
        (["--tokenizer-model", "none.model"], "--tokenizer-model none.model: no such file"),
        (["--tokenizer-type", "NullTokenizer"], "needs --vocab-size"),
        (["--tokenizer-type", "TikTokenizer"], "cannot build this tokenizer"),
        (["--json-keys", "id"], "key 'id' holds int"),
    ],
)
def test_bad_flags_are_one_line(corpus, model, tmp_path, capsys, argv, message):
    assert preprocess([corpus], tmp_path / "o", model, *argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_model_that_is_no_model(corpus, tmp_path, capsys):
    (tmp_path / "bad.model").write_bytes(b"nothing of the kind")
    assert preprocess([corpus], tmp_path / "o", tmp_path / "bad.model") == 2
    assert "cannot build this tokenizer" in capsys.readouterr().err


def test_no_text_at_all(tmp_path, model, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n\n{"text": [""]}\n')
    assert preprocess([tmp_path / "x.jsonl"], tmp_path / "o", model) == 2
    assert "2 documents, none with text" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--split-sentences"], "list of sentences"),
        (["--workers", "0"], "--workers 0"),
        (["--json-keys", "a", "a"], "named twice"),
    ],
)
def test_usage_errors(corpus, model, tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        preprocess([corpus], tmp_path / "o", model, *argv)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_null_tokenizer_and_ids_that_do_not_fit(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "1 2 3"}\n{"text": "70000"}\n')
    argv = ["--input", f"{tmp_path}/x.jsonl", "--output-prefix", f"{tmp_path}/o", "--workers", "1"]
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size"]
    assert preprocess_data.main([*argv, "100"]) == 2
    assert "line 2: token ids 70000 to 70000 do not fit uint16" in capsys.readouterr().err
    assert preprocess_data.main([*argv, "100000", "--append-eod"]) == 0
    assert dataset(tmp_path / "o").get(0).tolist() == [1, 2, 3, 99999]
    assert dataset(tmp_path / "o").get(0).dtype == np.int32


def test_hugging_face_tokenizer(corpus, texts, model, pieces, tmp_path):
    pytest.importorskip("transformers").LlamaTokenizer.from_pretrained(
        str(model.parent)
    ).save_pretrained(tmp_path / "hf")
    argv = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-hf-no-include-special-tokens"]
    assert preprocess([corpus], tmp_path / "o", tmp_path / "hf", *argv) == 0
    assert dataset(tmp_path / "o").get(0).tolist() == pieces.encode(texts[0])


def test_flags_of_megatrons_tool_are_accepted(corpus, model, tmp_path):
    more = "--partitions 2 --keep-sequential-samples --log-interval 7 --lang english "
    more += "--keep-newlines --workers 2 --max-documents 5 --padded-vocab-size 512"
    assert preprocess([corpus], tmp_path / "o", model, *more.split()) == 0


def test_tokenizer_flags_are_megatrons():
    from megatron.training.arguments import _add_tokenizer_args

    def flags(add):
        parser = argparse.ArgumentParser()
        add(parser)
        return {
            flag: (action.dest, action.default, action.nargs)
            for action in parser._actions
            for flag in action.option_strings
        }

    assert flags(preprocess_data.add_tokenizer_args) == flags(_add_tokenizer_args)


def test_find_optimal_num_workers_writes_nothing(corpus, model, tmp_path, capsys):
    more = "--find-optimal-num-workers --workers-to-check 1 2 --max-documents 50".split()
    assert preprocess([corpus], tmp_path / "o", model, *more) == 0
    assert capsys.readouterr().out.count("docs/s") == 2
    assert not list(tmp_path.iterdir())


def test_input_is_not_read_far_ahead_of_the_workers(model):
    args = preprocess_data.parse_args(
        f"--input x --output-prefix x --tokenizer-type SentencePieceTokenizer "
        f"--tokenizer-model {model}".split()
    )
    tokenizer = preprocess_workers.build_megatron_tokenizer(args)
    read = []

    def batches():
        for i in range(1000):
            read.append(i)
            yield text_batches.Batch("x", i + 1, b'{"text": "a"}\n', i)

    encoded = preprocess_workers.encode_in_order(batches(), args, tokenizer, np.uint16, 2)
    assert [next(encoded).position for _ in range(3)] == [0, 1, 2]
    assert len(read) <= 3 + 2 * ordered_pool.ITEMS_PER_WORKER
    encoded.close()
