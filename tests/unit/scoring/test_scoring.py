"""Scoring a corpus: chunks, windows, batches, pooling, finished chunks on disk, weights, input.

No model and no second rank: those are in tests/functional/test_score_corpus.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dwm.data.index import read_index
from megatron_dwm.data.token_reader import TokenReader
from megatron_dwm.data.weight_file import read_weights, write_weights
from megatron_dwm.errors import DWMError
from megatron_dwm.scoring.documents import (
    EMPTY_SCORE,
    Windows,
    batches,
    chunk_bounds,
    cut_into_windows,
    pool_windows,
)
from megatron_dwm.scoring.run import plan, window_length
from megatron_dwm.scoring.score_chunk import score_chunk
from megatron_dwm.scoring.weighing import summary, weights_of
from megatron_dwm.scoring.work_folder import WorkFolder, work_key
from megatron_dwm.weighting_model.pooling import pool_tokens

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Documents of 5, 0, 9 (in three sequences), 1 and 4 tokens."""
    return write_corpus(tmp_path / "corpus", [[5], [], [2, 0, 7], [1], [4]])


def write_corpus(prefix: Path, documents: list[list[int]]) -> str:
    """Writes documents of sequences of given lengths; the tokens count up from 0 through all."""
    import struct

    lengths = np.array([n for document in documents for n in document], "<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8") * 4
    firsts = np.append([0], np.cumsum([len(d) for d in documents])).astype("<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(lengths), len(firsts))
    content = header + lengths.tobytes() + pointers.tobytes() + firsts.tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    Path(f"{prefix}.bin").write_bytes(np.arange(lengths.sum(), dtype="<i4").tobytes())
    return str(prefix)


class Sum:
    """Scores a window by the sum of its tokens, and keeps what it was given."""

    where, vocab_size, max_length, default_length, temperature = "sum", 100, 8, None, None
    notes: list[str] = []

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def scores(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        self.batches.append((tokens.size(0), tokens.size(1)))
        padding = torch.arange(tokens.size(1)) >= lengths.unsqueeze(1)
        return tokens.masked_fill(padding, 0).sum(dim=1).float()

    def identity(self) -> str:
        return "sum"


# ------------------------------------------------------------------------------------ documents


@pytest.mark.parametrize("chunk_tokens", [1, 10, 17, 40, 10**6])
def test_chunks_cover_all_documents_in_order(corpus: str, chunk_tokens: int) -> None:
    bounds = chunk_bounds(read_index(corpus), chunk_tokens)
    assert bounds[0] == 0 and bounds[-1] == 5
    assert (np.diff(bounds) > 0).all()
    if chunk_tokens == 1:
        assert len(bounds) == 6
    if chunk_tokens == 10**6:
        assert len(bounds) == 2


def test_chunks_have_about_as_many_tokens_as_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [[int(n)] for n in rng.integers(0, 200, size=2000)]
    index = read_index(write_corpus(tmp_path / "many", documents))
    bounds = chunk_bounds(index, 5000)
    tokens = np.add.reduceat(index.document_tokens(0, 2000), bounds[:-1])
    assert tokens.max() <= 5200 and tokens[:-1].min() > 4000


def test_windows_of_long_short_and_empty_documents() -> None:
    windows = cut_into_windows(np.array([5, 0, 8, 9, 1]), 4)
    assert windows.document.tolist() == [0, 0, 2, 2, 3, 3, 3, 4]
    assert windows.start.tolist() == [0, 4, 0, 4, 0, 4, 8, 0]
    assert windows.length.tolist() == [4, 1, 4, 4, 4, 4, 1, 1]
    assert len(cut_into_windows(np.array([0, 0]), 4).length) == 0


def test_batches_hold_each_window_once_within_the_limit() -> None:
    lengths = np.random.default_rng(1).integers(1, 33, size=200)
    found = list(batches(lengths, 64))
    assert sorted(np.concatenate(found).tolist()) == list(range(200))
    padded = [len(batch) * int(lengths[batch].max()) for batch in found]
    assert max(padded) <= 64
    # Windows of about the same length go together, so little is padding.
    assert sum(padded) < 1.1 * lengths.sum()
    assert [b.tolist() for b in batches(np.array([9, 3, 3]), 6)] == [[0], [1, 2]]


def test_document_score_is_the_mean_of_its_windows_by_tokens() -> None:
    windows = Windows(np.array([0, 0, 2]), np.array([0, 4, 0]), np.array([4, 1, 3]))
    pooled = pool_windows(np.array([1.0, 6.0, -2.0], np.float32), windows, 3)
    assert pooled.dtype == np.float32
    assert pooled.tolist() == [2.0, EMPTY_SCORE, -2.0]


def test_tokens_of_all_sequences_of_a_document(corpus: str) -> None:
    reader = TokenReader(read_index(corpus), vocab_size=19)
    found = [reader.document(d).tolist() for d in range(5)]
    assert found == [list(range(5)), [], list(range(5, 14)), [14], list(range(15, 19))]


def test_token_outside_the_vocabulary_is_named(corpus: str) -> None:
    reader = TokenReader(read_index(corpus), vocab_size=17)
    reader.document(3)
    with pytest.raises(DWMError, match=r"corpus\.bin: document 4 .* id 17 at its token 2.* 17 ids"):
        reader.document(4)
    with pytest.raises(DWMError, match="document 4 has the token id 18"):
        TokenReader(read_index(corpus), vocab_size=18).document(4)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooling_leaves_padding_out(pooling: str) -> None:
    hidden = torch.randn(6, 3, 4)
    lengths = torch.tensor([6, 1, 4])
    for column, length in enumerate(lengths):
        hidden[length:, column] = float("nan")
    pooled = pool_tokens(hidden, lengths, pooling)
    for column, length in enumerate(lengths):
        own = hidden[:length, column]
        assert torch.allclose(pooled[column], own[-1] if pooling == "last" else own.mean(dim=0))


# ----------------------------------------------------------------------------------- a chunk


def test_chunk_of_documents_is_scored_in_batches(corpus: str) -> None:
    scorer = Sum()
    reader = TokenReader(read_index(corpus), scorer.vocab_size)
    scores = score_chunk(scorer, reader, 0, 5, seq_length=4, micro_batch_size=2)
    first = (4 * (0 + 1 + 2 + 3) + 4) / 5
    long = (4 * (5 + 6 + 7 + 8) + 4 * (9 + 10 + 11 + 12) + 13) / 9
    expected = [first, EMPTY_SCORE, long, 14, 15 + 16 + 17 + 18]
    assert scores.tolist() == pytest.approx(expected)
    # Two windows of four tokens or eight of one: always eight tokens at most.
    assert scorer.batches == [(2, 4), (2, 4), (3, 1)]


def test_chunk_without_tokens_needs_no_model(corpus: str) -> None:
    scorer = Sum()
    reader = TokenReader(read_index(corpus), scorer.vocab_size)
    assert score_chunk(scorer, reader, 1, 2, 4, 2).tolist() == [EMPTY_SCORE]
    assert scorer.batches == []


def test_score_that_is_not_finite_is_an_error(corpus: str) -> None:
    class Broken(Sum):
        def scores(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            found = super().scores(tokens, lengths)
            return torch.where(found == 14, float("nan"), found)

    reader = TokenReader(read_index(corpus), 100)
    with pytest.raises(DWMError, match=r"score of document 3 of .*corpus is nan"):
        score_chunk(Broken(), reader, 1, 5, 4, 2)


def test_window_length_is_the_models_unless_given() -> None:
    scorer = Sum()
    assert window_length(scorer, 8) == 8
    with pytest.raises(DWMError, match="--seq-length 9 is longer than the 8 positions"):
        window_length(scorer, 9)
    with pytest.raises(DWMError, match="give --seq-length"):
        window_length(scorer, None)


# ------------------------------------------------------------------------------- work folder


BOUNDS = np.array([0, 2, 5, 6])
CHUNKS = [np.array(values, np.float32) for values in ([1, 2], [3, EMPTY_SCORE, 5], [6])]


def folder_at(path: Path, key: str = "key") -> WorkFolder:
    return WorkFolder(str(path / "w.scores"), key, BOUNDS)


def test_chunks_of_several_processes_are_put_together(tmp_path: Path) -> None:
    one, two, reader = folder_at(tmp_path), folder_at(tmp_path), folder_at(tmp_path)
    one.append(2, CHUNKS[2])
    assert reader.scan() == [2] and reader.scan() == []
    two.append(0, CHUNKS[0])
    with pytest.raises(DWMError, match="scores of 1 of 3 chunks are not there"):
        reader.scores()
    one.append(1, CHUNKS[1])
    two.append(1, CHUNKS[1])
    assert reader.scan() == [1]
    assert np.array_equal(reader.scores(), np.concatenate(CHUNKS))


@pytest.mark.parametrize("damage", ["cut", "scores", "count", "chunk"])
def test_chunk_that_a_kill_damaged_counts_as_not_done(tmp_path: Path, damage: str) -> None:
    writer = folder_at(tmp_path)
    writer.append(0, CHUNKS[0])
    writer.append(1, CHUNKS[1])
    writer.close()
    (path,) = writer.path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-1]
    else:
        # The record is 8 + 8 + 4 bytes and three scores long; the highest byte is what differs.
        content[{"scores": -1, "count": -17, "chunk": -25}[damage]] ^= 1
    path.write_bytes(content)
    again = folder_at(tmp_path)
    assert again.scan() == [0]
    # What comes after it goes into a file of its own.
    again.append(1, CHUNKS[1])
    again.append(2, CHUNKS[2])
    assert np.array_equal(folder_at(tmp_path).scores(), np.concatenate(CHUNKS))


def test_record_that_is_being_written_is_found_later(tmp_path: Path) -> None:
    writer = folder_at(tmp_path)
    writer.append(1, CHUNKS[1])
    writer.append(0, CHUNKS[0])
    (path,) = writer.path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    reader = folder_at(tmp_path)
    assert reader.scan() == [1]
    path.write_bytes(content)
    assert reader.scan() == [0]


def test_other_settings_have_another_folder(tmp_path: Path) -> None:
    settings = {"model": "m", "seq_length": 4}
    keys = {work_key(**settings), work_key(**{**settings, "seq_length": 5})}
    assert len(keys) == 2 and work_key(**settings) in keys
    one, two = (folder_at(tmp_path, key) for key in sorted(keys))
    one.append(0, CHUNKS[0])
    assert two.scan() == [] and two.others() == [one.path.name]
    two.remove()
    assert one.path.is_dir()
    one.remove()
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------- weights


def test_weights_compare_across_files() -> None:
    scores = [np.array([0.0, 1.0, EMPTY_SCORE], np.float32), np.array([2.0], np.float32)]
    one, two = weights_of(scores, ["one", "two"], temperature=2.0, top_fraction=None)
    expected = np.exp([0, 0.5, 1.0]) / np.exp([0, 0.5, 1.0]).mean()
    assert one.tolist() == pytest.approx([*expected[:2], 0.0], rel=1e-6)
    assert two.tolist() == pytest.approx([expected[2]], rel=1e-6)


def test_top_fraction_is_of_the_documents_with_tokens() -> None:
    scores = [np.array([3, EMPTY_SCORE, 1, EMPTY_SCORE, 2, 0], np.float32)]
    (weights,) = weights_of(scores, ["one"], 1.0, 0.5)
    assert np.flatnonzero(weights).tolist() == [0, 4]


def test_corpus_without_weight_is_named() -> None:
    scores = [np.array([0.0, 1.0], np.float32), np.array([5.0, 6.0], np.float32)]
    with pytest.raises(DWMError, match="low: no document keeps a weight"):
        weights_of(scores, ["low", "high"], 1.0, 0.5)
    with pytest.raises(DWMError, match="low: no document has tokens"):
        weights_of([np.array([EMPTY_SCORE], np.float32)], ["low"], 1.0, None)


def test_summary_adds_up_domains_of_all_files(tmp_path: Path) -> None:
    one = read_index(write_corpus(tmp_path / "one", [[3], [1], [4]]))
    two = read_index(write_corpus(tmp_path / "two", [[2]]))
    three = read_index(write_corpus(tmp_path / "three", [[2], [2]]))
    files = [
        write_weights(tmp_path / "1", np.array([1.0, 0, 2]), one, np.array([0, 0, 1]), ["a", "b"]),
        write_weights(tmp_path / "2", np.array([3.0]), two, np.array([0]), ["b"]),
        write_weights(tmp_path / "3", np.array([1.0, 1.0]), three),
    ]
    head, *rows, _, last = summary(files, [one, two, three]).splitlines()
    assert head.split()[:2] == ["domain", "documents"]
    # Documents, tokens, mean weight, share of the weight (8), share of w * tokens (3 + 14 + 4).
    assert [row.split() for row in rows] == [
        ["a", "2", "4", "0.500", "12.5%", "14.3%"],
        ["b", "2", "6", "2.500", "62.5%", "66.7%"],
        ["three", "2", "4", "1.000", "25.0%", "19.0%"],
    ]
    assert last == "effective sample size: 4 of 6 documents (66.7%)"


# ------------------------------------------------------------------------------------- input


def test_plan_names_what_is_wrong(corpus: str, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", [[1]])
    none = write_corpus(tmp_path / "none", [])
    out = [str(tmp_path / "out.weights")]

    def refused(words: str, prefixes: list[str], **changes: object) -> None:
        defaults = {"outputs": None, "domains": None, "force": False, "keep_scores": False}
        with pytest.raises(DWMError, match=words):
            plan(prefixes, **{**defaults, **changes})  # type: ignore[arg-type]

    refused("--output has 1 values and --data 2", [corpus, other], outputs=out)
    refused("--domain has 1 values and --data 2", [corpus, other], domains=["a"])
    refused("are the same", [corpus, corpus])
    refused(r"nothing\.idx", [str(tmp_path / "nothing")])
    refused(r"none\.idx has no documents", [none])
    refused("folder .*gone is missing", [corpus], outputs=[str(tmp_path / "gone" / "x")])
    Path(out[0]).touch()
    refused(r"out\.weights is there already; .* --force", [corpus], outputs=out)
    (tmp_path / "corpus.scores.npy").touch()
    refused(r"corpus\.scores\.npy is there already", [corpus], keep_scores=True)
    plan([corpus], None, None, False, False)


def test_domains_come_from_the_flag_or_the_file_that_is_there(corpus: str, tmp_path: Path) -> None:
    def planned(*args: object) -> tuple[list[int] | None, tuple[str, ...]]:
        (found,) = plan([corpus], *args, True, False)  # type: ignore[arg-type]
        return None if found.domains is None else found.domains.tolist(), found.domain_names

    assert planned(None, None) == (None, ())
    assert planned(None, ["web"]) == ([0] * 5, ("web",))
    index = read_index(corpus)
    names = ("a", "b")
    write_weights(f"{corpus}.weights", np.ones(5), index, np.array([0, 1, -1, 1, 0]), names)
    assert planned(None, None) == ([0, 1, -1, 1, 0], names)
    assert planned([str(tmp_path / "elsewhere")], None) == ([0, 1, -1, 1, 0], names)
    assert planned(None, ["web"]) == ([0] * 5, ("web",))
    assert read_weights(f"{corpus}.weights").domain_names == names


def test_hf_without_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_dwm.scoring.huggingface import HuggingFaceScorer

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DWMError, match=r"--hf needs transformers.*megatron-dwm\[convert\]"):
        HuggingFaceScorer("folder", torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint", "x", "--hf", "y"], "not allowed with"),
        ([], "one of the arguments --checkpoint --hf"),
        (["--hf", "y", "--temperature", "0"], "expected a number above 0, found 0"),
        (["--hf", "y", "--seq-length", "-3"], "expected a number above 0, found -3"),
        (["--hf", "y", "--top-fraction", "1.5"], "--top-fraction 1.5: expected at most 1"),
        (["--hf", "y", "--temperature", "nan"], "expected a number above 0, found nan"),
    ],
)
def test_bad_flags_are_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_dwm.cli.score import parse_args

    with pytest.raises(SystemExit) as refused:
        parse_args(["--data", "x", *flags])
    assert refused.value.code == 2
    assert words in capsys.readouterr().err


def test_missing_corpus_is_one_line_and_code_2(tmp_path: Path) -> None:
    """As a process of its own: nothing is on the path but what the tool puts there."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "score_corpus.py")]
        + ["--data", str(tmp_path / "nothing"), "--hf", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "MEGATRON_DWM_HOST": "cpu"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-dwm score: error: ") and done.stderr.count("\n") == 1
    assert "nothing.idx" in done.stderr
