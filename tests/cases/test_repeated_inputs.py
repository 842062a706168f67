"""A file that `--input` names twice, by whatever name, is read once and a line says so."""

import json
import os
from pathlib import Path

import pytest

from megatron_dwm.cli import preprocess as preprocess_data
from megatron_dwm.cli import tokenizer as train_tokenizer
from megatron_dwm.files.text_files import expand_inputs


def another_name(path: Path, kind: str) -> str:
    """Another name of a file: the path again, another spelling, or a link."""
    if kind == "same":
        return str(path)
    if kind == "spelling":
        return f"{path.parent}/../{path.parent.name}/./{path.name}"
    if kind == "relative":
        return os.path.relpath(path)
    if kind == "folder":
        folder = path.parent.parent / "linked"
        folder.symlink_to(path.parent)
        return str(folder / path.name)
    link = path.with_name("z.jsonl")
    if kind == "symlink":
        link.symlink_to(path)
    else:
        os.link(path, link)
    return str(link)


KINDS = ["same", "spelling", "relative", "folder", "symlink", "hard link"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    path = folder / "a.jsonl"
    path.write_text('{"text": "1 2 3"}\n{"text": "4 5"}\n')
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_file_is_one_file_and_one_line(corpus, capsys, kind):
    name = another_name(corpus, kind)
    # `samefile` is what the system says.
    assert os.path.samefile(corpus, name)
    assert expand_inputs([str(corpus), name]) == [corpus]
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and f"--input {name}: " in notes[0] and "once" in notes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_preprocess_writes_its_documents_once(corpus, tmp_path, capsys, kind):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    argv = ["--input", str(corpus), another_name(corpus, kind), "--workers", "1"]
    argv += ["--output-prefix", str(tmp_path / "o")]
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    assert preprocess_data.main(argv) == 0
    assert "read once" in capsys.readouterr().err
    data = IndexedDataset(f"{tmp_path}/o_text_document")
    assert [data.get(i).tolist() for i in range(len(data))] == [[1, 2, 3], [4, 5]]


def test_train_tokenizer_samples_a_repeated_file_once(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"the cat number {i} sat on a mat"}) for i in range(50)]
    path.write_text("\n".join(lines))
    argv = ["--input", str(path), f"{tmp_path}/./a.jsonl", "--out", f"{tmp_path}/t"]
    assert train_tokenizer.main([*argv, "--vocab-size", "300"]) == 0
    out, err = capsys.readouterr()
    assert "(50 of 50 documents)" in out and err.count("read once") == 1


def test_two_files_of_the_same_content_are_two(tmp_path, capsys):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "1"}\n')
    assert len(expand_inputs([f"{tmp_path}/*.jsonl"])) == 2
    assert capsys.readouterr().err == ""
