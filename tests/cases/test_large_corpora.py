"""Corpora of very many documents: what a rank reads and keeps of them at the start of a run.

Right values are those of the arrays that the files were written from, and the tokens themselves:
in the small corpora each token is the number of its document. Ranks are played one after the other
in this process: what rank 0 broadcasts is recorded, and handed to the one that plays rank 1.

NOT exercised: real process groups (tests/functional/test_sampling.py), memory of the plan itself.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402

from megatron_dwm import _data_engine  # noqa: E402
from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.core import weighted_dataset  # noqa: E402
from megatron_dwm.data.index import IndexSummary, read_index  # noqa: E402
from megatron_dwm.data.weight_file import document_chunks, write_weights  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.hosts.megatron_lm import weighted_sampling as module  # noqa: E402
from megatron_dwm.hosts.megatron_lm.checks import check_data  # noqa: E402
from megatron_dwm.scoring.documents import chunk_bounds  # noqa: E402
from megatron_dwm.scoring.run import plan  # noqa: E402

MANY = 2_000_000  # documents
LENGTH = 16  # tokens of a sample
SMALL = 100  # bytes; what is hashed beyond that is the content of a file


def write_corpus(prefix: Path, sizes: np.ndarray, lengths: np.ndarray, with_tokens=True) -> str:
    """Writes a data set.

    Args:
        prefix: its path.
        sizes: `[D]` sequences of each document.
        lengths: `[S]` tokens of each sequence.
        with_tokens: whether each token is its document's number; else a hole in the file.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<QBQQ", 1, 8, len(lengths), len(sizes) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((2 * (ends - lengths)).astype("<i8").tobytes())
        file.write(np.append(0, np.cumsum(sizes)).astype("<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        if with_tokens:
            owners = np.repeat(np.arange(len(sizes)), sizes)
            file.write(np.repeat(owners, lengths).astype("<u2").tobytes())
        else:
            file.truncate(2 * int(ends[-1]))
    return str(prefix)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> SimpleNamespace:
    """Documents of none to three sequences, with weights and domains far apart."""
    rng = np.random.default_rng(0)
    sizes = np.tile([1, 2, 0, 1, 3], MANY // 5)
    lengths = rng.integers(0, 20, size=int(sizes.sum()))
    prefix = write_corpus(tmp_path_factory.mktemp("large") / "data", sizes, lengths, False)
    bounds = np.append(0, np.cumsum(lengths))[np.append(0, np.cumsum(sizes))]
    weights = rng.random(MANY, dtype=np.float32)
    domains = rng.integers(-1, 50, size=MANY) * 1000
    domains[domains < 0] = -1
    domains[sizes == 0] = 7  # of no token
    write_weights(f"{prefix}.weights", weights, read_index(prefix), domains)
    return SimpleNamespace(prefix=prefix, lengths=lengths, tokens=np.diff(bounds))


class Peak:
    """Within it, memory is measured: `bytes` at most at once, mapped files not counted."""

    def __enter__(self) -> Peak:
        tracemalloc.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


class Ranks:
    """Plays one rank after the other; rank 0 first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank = 0
        self.sent: list[bytes] = []
        self.waiting: list[bytes] = []
        self.reads: list[tuple[str, int]] = []
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: self.rank)
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", self.broadcast)
        # One rank at a time, each of which succeeds: it hears of no failure but its own.
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 1)
        monkeypatch.setattr(torch.distributed, "all_gather_object", self.gather)
        # What reads files in full.
        for place, name in (
            (hashlib, "sha256"),
            (zlib, "crc32"),
            (_data_engine, "check_index"),
        ):
            monkeypatch.setattr(place, name, self.counted(name, getattr(place, name)))
        monkeypatch.setattr(IndexSummary, "document_tokens", self.document_tokens)

    def play(self, rank: int) -> None:
        self.rank, self.waiting = rank, list(self.sent)
        self.reads.clear()

    def broadcast(self, objects: list, src: int) -> None:
        if self.rank == src:
            self.sent.append(pickle.dumps(objects))
        else:
            objects[:] = pickle.loads(self.waiting.pop(0))

    def document_tokens(self, first: int, last: int) -> None:
        """Nothing at the start of a run asks for the tokens of documents."""
        self.reads.append(("document_tokens", last - first))

    @staticmethod
    def gather(found: list, mine: object) -> None:
        found[0] = mine

    def counted(self, name: str, function):
        def call(*args):
            size = memoryview(args[0]).nbytes if args else 0
            if size > SMALL:
                self.reads.append((name, size))
            return function(*args)

        return call


@pytest.fixture
def ranks(monkeypatch) -> Ranks:
    return Ranks(monkeypatch)


def arguments(prefix: str, save: Path | None = None) -> SimpleNamespace:
    """Returns as much of Megatron's arguments as is looked at."""
    nothing = dict.fromkeys(
        "data_args_path train_data_path valid_data_path test_data_path "
        "per_split_data_args_path load".split()
    )
    return SimpleNamespace(
        **nothing,
        data_path=[prefix],
        split="100,0,0",
        seed=3,
        seq_length=LENGTH,
        save=None if save is None else str(save),
        consumed_train_samples=0,
        eval_iters=0,
        full_validation=False,
    )


def sampling_of(run: SimpleNamespace) -> module.Sampling:
    return module.Sampling(DWMConfig(sampling="weights"), run, lambda line: None)


class Tokenizer:
    """As much of a tokenizer as the data sets ask for."""

    vocab_size, eod, pad = 256, 255, -1
    unique_identifiers = {"class": "Tokenizer"}  # noqa: RUF012
    special_tokens_dict = {"eod_token": 255}  # noqa: RUF012


def training_data(sampling: module.Sampling, cache: Path, samples: int | None = None):
    """Builds data iterators as the trainer does, but for the loaders; returns the training data."""

    def provider(sizes):
        config = GPTDatasetConfig(
            random_seed=3,
            sequence_length=LENGTH,
            blend=(sampling.prefixes, None),
            split="100,0,0",
            tokenizer=Tokenizer(),
            path_to_cache=str(cache),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()

    provider.is_distributed = True
    return sampling.build_data_iterators(lambda build: build([samples, None, None]), provider)[0]


def test_an_index_is_read_in_little_memory(large) -> None:
    with Peak() as peak:
        index = read_index(large.prefix)
        assert index.tokens == large.lengths.sum()
    assert peak.bytes < MANY
    with Peak() as peak:
        for part in document_chunks(MANY):
            found = index.document_tokens(part.start, part.stop)
            assert np.array_equal(found, large.tokens[part])
    assert peak.bytes < 8 * MANY


@pytest.mark.parametrize("chunk_tokens", [1000, 777_777, 10**9])
def test_a_corpus_is_cut_for_scoring_in_little_memory(large, chunk_tokens) -> None:
    """A chunk begins with the first document at or behind each multiple of `chunk_tokens`."""
    cost = np.append(0, np.cumsum(large.tokens + 8))
    first = np.searchsorted(cost[:-1], np.arange(0, cost[-1], chunk_tokens))
    with Peak() as peak:
        bounds = chunk_bounds(read_index(large.prefix), chunk_tokens)
    assert np.array_equal(bounds, np.unique(np.append(first, MANY)))
    assert peak.bytes < 8 * MANY + 3 * bounds.nbytes


def test_only_rank_0_reads_files_in_full(large, ranks, tmp_path, monkeypatch) -> None:
    """The others open the same files, keep nothing of the corpus' size, and read the same."""
    run = arguments(large.prefix, tmp_path / "run")

    def start() -> module.Sampling:
        """All but the data sets, which Megatron builds, and plans."""
        sampling = sampling_of(run)
        sampling.build_data_iterators(lambda build: None, lambda: None)
        return sampling

    with Peak() as peak:
        check_data(DWMConfig(sampling="weights", policy="uniform"), run)
        first = start()
    assert peak.bytes < 8 * MANY
    wanted = training_data(first, tmp_path / "cache")
    assert {name for name, _ in ranks.reads} >= {"sha256", "crc32", "check_index"}

    ranks.play(1)
    monkeypatch.setattr(weighted_dataset, "first_segment", lambda *_: pytest.fail("planned again"))
    with Peak() as peak:
        second = start()
    assert peak.bytes < MANY
    assert second.state_dict() == first.state_dict()
    assert second.domain_names == first.domain_names == [*map(str, range(0, 50000, 1000)), "data"]

    found = training_data(second, tmp_path / "cache")
    assert ranks.reads == [] and ranks.waiting == []
    with Peak() as peak:
        samples = [found[k] for k in range(0, len(found), len(found) // 50)]
    assert peak.bytes < MANY
    for k, sample in zip(range(0, len(found), len(found) // 50), samples, strict=True):
        assert all(torch.equal(sample[name], value) for name, value in wanted[k].items())


def test_only_rank_0_reads_the_corpora_to_score(large, ranks, tmp_path) -> None:
    flags = [large.prefix], [str(tmp_path / "out.weights")], None, False, False
    plan(*flags)
    assert ranks.reads
    ranks.reads.clear()
    (corpus,) = plan(*flags, verify=False)
    assert ranks.reads == []
    assert corpus.index.documents == MANY


@pytest.mark.parametrize(
    "sizes",
    [
        [2, 0, 1, 3, 0, 0],  # as many sequences as documents
        [0, 0, 3, 1, 0, 4],
        [1, 2, 0, 1, 1, 0],
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_documents_of_several_sequences_and_of_none(ranks, tmp_path, sizes, named) -> None:
    """Each token is the number of its document; domains are those of the tokens."""
    sizes = np.tile(sizes, 20)
    lengths = np.random.default_rng(1).integers(0, 12, size=int(sizes.sum()))
    prefix = write_corpus(tmp_path / "data", sizes, lengths)
    documents = np.arange(len(sizes))
    weights = np.where(documents % 3 == 2, 0, 1 + documents % 4)
    domains = documents % 5 - 1
    names = ["a", "b", "c", "d"] if named else []
    write_weights(f"{prefix}.weights", weights, read_index(prefix), domains, names)
    sampling = sampling_of(arguments(prefix))
    train = training_data(sampling, tmp_path / "cache", 400)
    called = ["data", *(names or map(str, range(4)))]
    seen = np.zeros(len(sizes), int)
    for k in range(len(train)):
        sample = train[k]
        tokens = sample["tokens"].numpy()
        assert sample["document_ids"].tolist() == tokens.tolist()
        counts = np.bincount(domains[tokens] + 1, minlength=5)
        place = called.index(sampling.domain_names[int(sample["domain_id"])])
        assert counts[place] == counts.max()
        seen += np.bincount(tokens, minlength=len(sizes))
    tokens = np.bincount(np.repeat(documents, sizes), lengths, minlength=len(sizes))
    assert not seen[weights == 0].any()
    assert seen[(weights > 0) & (tokens > 0)].all()


def test_a_file_that_rank_0_misses_is_one_error_on_all_ranks(ranks, tmp_path) -> None:
    prefix = write_corpus(tmp_path / "data", np.ones(9, int), np.full(9, 5))
    write_weights(f"{prefix}.weights", np.ones(9), read_index(prefix))
    errors = []
    for rank in (0, 1):
        ranks.play(rank)
        sampling = sampling_of(arguments(prefix))
        state = sampling.state_dict() | {"stages": {prefix: [(0, "0" * 64)]}}
        sampling.load_state_dict(state)
        with pytest.raises(DWMError, match="put it back") as error:
            training_data(sampling, tmp_path / "cache")
        assert not error.value.this_rank_only, "it would be printed by every rank"
        errors.append(str(error.value))
        assert not ranks.waiting
    assert errors[0] == errors[1]


@pytest.mark.parametrize("changed", ["weights", "idx"])
def test_a_file_that_changes_between_the_ranks_is_refused(ranks, tmp_path, changed) -> None:
    """Rank 1 does not read all of it, and sees it all the same."""
    prefix = write_corpus(tmp_path / "data", np.ones(9, int), np.full(9, 5))
    write_weights(f"{prefix}.weights", np.arange(9), read_index(prefix))
    training_data(sampling_of(arguments(prefix)), tmp_path / "cache")
    if changed == "weights":
        write_weights(f"{prefix}.weights", np.arange(9)[::-1], read_index(prefix))
        words = "is not what rank 0 has read"
    else:
        write_corpus(tmp_path / "data", np.ones(8, int), np.full(8, 5))
        words = r"are \(8, 8, 'uint16', 80\) here and \(9, 9, 'uint16', 90\) on rank 0"
    ranks.play(1)
    with pytest.raises(DWMError, match=words):
        training_data(sampling_of(arguments(prefix)), tmp_path / "cache")
