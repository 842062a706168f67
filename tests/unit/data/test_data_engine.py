"""The C++ data engine and `megatron_dwm.data.index` against a plain Python model.

Proves: the kernels agree with a model that lays every token out; sizes that overflow, empty
inputs and malformed arrays give a `ValueError` that names the argument; and a damaged `.idx`
or `.bin` always gives a one-line `DatasetError`, never a crash or a summary of wrong data.
What this file does NOT exercise: Megatron's own reader (tests/contract) and files so large that
they do not fit in memory.
"""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm import _data_engine as engine
from megatron_dwm.data import (
    DatasetError,
    IndexSummary,
    num_packed_samples,
    read_index,
    sample_documents,
)
from megatron_dwm.data.index import documents_of

INT64_MAX = 2**63 - 1
HEADER_BYTES = 34


def i32(*values):
    return np.array(values, dtype=np.int32)


def i64(*values):
    return np.array(values, dtype=np.int64)


# A corpus is a list of documents, a document a list of sequence lengths; both may be empty.
corpora = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=12)


def arrays_of(corpus):
    lengths = i32(*(length for document in corpus for length in document))
    document_indices = np.cumsum([0] + [len(document) for document in corpus]).astype(np.int64)
    return lengths, document_indices


def prefix_sums_of(corpus):
    return np.cumsum([0] + [sum(document) for document in corpus]).astype(np.int64)


def samples_by_layout(document_lengths, order, sequence_length, num_samples, extra):
    """The model: one (position, offset) per token of the concatenation, then plain slicing."""
    tokens = [
        (position, offset)
        for position, document in enumerate(order)
        for offset in range(document_lengths[document])
    ]
    first, last, offset = [], [], []
    for sample in range(num_samples):
        window = tokens[sample * sequence_length : (sample + 1) * sequence_length + extra]
        first.append(window[0][0])
        last.append(window[-1][0])
        offset.append(window[0][1])
    return first, last, offset


class TestPrefixSums:
    @given(corpora)
    def test_agrees_with_the_model(self, corpus):
        sums = engine.document_token_prefix_sums(*arrays_of(corpus))
        assert sums.dtype == np.int64
        assert sums.tolist() == prefix_sums_of(corpus).tolist()

    def test_tokens_beyond_32_bits(self):
        lengths = np.full(5, 2**31 - 1, dtype=np.int32)
        assert engine.document_token_prefix_sums(lengths, i64(0, 2, 5)).tolist() == [
            0,
            2 * (2**31 - 1),
            5 * (2**31 - 1),
        ]

    def test_reads_strided_and_misaligned_arrays(self):
        wide = i32(3, -1, 4, -1, 5, -1)
        raw = np.frombuffer(b"xx" + i64(0, 1, 3).tobytes(), dtype=np.uint8)[2:].view(np.int64)
        assert not raw.flags.aligned
        assert engine.document_token_prefix_sums(wide[::2], raw).tolist() == [0, 3, 12]
        assert engine.document_token_prefix_sums(wide[4::-2], raw).tolist() == [0, 5, 12]

    @pytest.mark.parametrize(
        ("lengths", "documents", "message"),
        [
            (i32(3, -4), i64(0, 2), r"sequence_lengths\[1\]: -4 is negative"),
            (i32(3), i64(), r"document_indices: expected at least one entry"),
            (i32(3), i64(1, 1), r"document_indices\[0\]: expected 0, found 1"),
            (i32(3, 4), i64(0, 2, 1, 2), r"document_indices\[2\]: 1 is less than"),
            (i32(3, 4), i64(0, 9), r"document_indices\[1\]: 9 is beyond the 2 sequences"),
            (i32(3, 4), i64(0, 1), r"document_indices\[1\]: .* expected the number of sequences"),
            (i32(), i64(0, -(2**62), INT64_MAX), r"document_indices\[1\]"),
            (i64(3), i64(0, 1), r"sequence_lengths: .*array of int32, found 1 dim.*int64"),
            (i32(3).reshape(1, 1), i64(0, 1), r"sequence_lengths: .*found 2 dimension"),
            (i32(3).astype(">i4"), i64(0, 1), r"sequence_lengths: .*int32"),
            ([3], i64(0, 1), r"sequence_lengths: expected a NumPy array of int32, found list"),
            (None, i64(0, 1), r"sequence_lengths: .*found NoneType"),
            (i32(3), np.array(0), r"document_indices: .*found 0 dimension"),
        ],
    )
    def test_malformed_input_is_named(self, lengths, documents, message):
        with pytest.raises(ValueError, match=message):
            engine.document_token_prefix_sums(lengths, documents)


class TestSamples:
    @given(corpora, st.integers(1, 12), st.booleans(), st.data())
    def test_agrees_with_the_model(self, corpus, sequence_length, add_extra_token, data):
        lengths = [sum(document) for document in corpus]
        order = None
        if corpus and data.draw(st.booleans()):
            order = data.draw(st.lists(st.integers(0, len(corpus) - 1), max_size=20))
        visited = range(len(corpus)) if order is None else order
        extra = int(add_extra_token)
        available = max(sum(lengths[d] for d in visited) - extra, 0) // sequence_length
        num_samples = data.draw(st.none() | st.integers(0, available))

        found = sample_documents(
            prefix_sums_of(corpus),
            sequence_length,
            num_samples,
            add_extra_token=add_extra_token,
            document_order=order,
        )

        wanted = available if num_samples is None else num_samples
        model = samples_by_layout(lengths, visited, sequence_length, wanted, extra)
        assert (found.first.tolist(), found.last.tolist(), found.offset.tolist()) == model
        assert len(found) == wanted
        if order is None:
            assert available == num_packed_samples(
                sum(lengths), sequence_length, add_extra_token=add_extra_token
            )

    def test_positions_tell_repeated_documents_apart(self):
        # Documents of 3 and 2 tokens, visited as 1 0 1 1: the last samples lie in different
        # visits of document 1.
        found = sample_documents(
            i64(0, 3, 5), 3, document_order=[1, 0, 1, 1], add_extra_token=False
        )
        assert found.first.tolist() == [0, 1, 2]
        assert found.last.tolist() == [1, 2, 3]
        assert [found.documents(k).tolist() for k in range(3)] == [[1, 0], [0, 1], [1, 1]]

    def test_empty_inputs(self):
        for sums in (i64(0), i64(0, 0, 0)):
            assert len(sample_documents(sums, 8)) == 0
            assert len(sample_documents(sums, 8, 0)) == 0
        assert len(sample_documents(i64(0, 9), 1, document_order=[])) == 0
        assert num_packed_samples(0, 8) == 0

    def test_the_extra_token_decides_the_last_sample(self):
        assert num_packed_samples(8, 4) == 1
        assert num_packed_samples(8, 4, add_extra_token=False) == 2
        assert num_packed_samples(9, 4) == 2

    def test_token_counts_near_the_limit(self):
        sums = i64(0, INT64_MAX - 1, INT64_MAX)
        found = sample_documents(sums, INT64_MAX, add_extra_token=False)
        assert (found.first.tolist(), found.last.tolist()) == ([0], [1])
        half = 2**62
        found = sample_documents(sums, half, 1)
        assert (found.first.tolist(), found.last.tolist()) == ([0], [0])
        assert len(sample_documents(sums, INT64_MAX)) == 0

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (dict(sequence_length=0), "sequence_length: expected at least 1, found 0"),
            (dict(sequence_length=-3), "sequence_length: expected at least 1, found -3"),
            (dict(sequence_length=2**63), "sequence_length: 9223372036854775808 does not fit"),
            (dict(sequence_length=2.5), "sequence_length: expected an integer, found float"),
            (dict(num_samples=-1), "num_samples: expected at least 0, found -1"),
            (dict(num_samples=3), "num_samples: 3 samples of 4 .* 9 tokens make only 2"),
            (dict(num_samples=2**61), "num_samples: .* make only 2"),
            (dict(num_samples=2**64), "num_samples: .*does not fit"),
            (dict(prefix_sums=i64()), "prefix_sums: expected at least one entry"),
            (dict(prefix_sums=i64(1, 2)), r"prefix_sums\[0\]: expected 0, found 1"),
            (dict(prefix_sums=i64(0, 5, 4)), r"prefix_sums\[2\]: 4 is less than"),
            (dict(prefix_sums=i64(0, -1)), r"prefix_sums\[1\]: -1 is less than"),
            (dict(prefix_sums=[0.0, 5.0]), "prefix_sums: expected integers"),
            (dict(document_order=[0, 2]), r"document_order\[1\]: 2 is not one of the 2"),
            (dict(document_order=[-1]), r"document_order\[0\]: -1 is not one"),
            (dict(document_order=[[0]]), "document_order: .*found 2 dimension"),
            (
                dict(prefix_sums=i64(0, INT64_MAX), document_order=[0, 0]),
                "document_order: the number of tokens: .*does not fit",
            ),
        ],
    )
    def test_malformed_input_is_named(self, call, message):
        arguments = dict(prefix_sums=i64(0, 4, 9), sequence_length=4) | call
        with pytest.raises(ValueError, match=message):
            sample_documents(**arguments)

    def test_more_samples_than_memory_is_an_error(self):
        with pytest.raises((ValueError, MemoryError)):
            sample_documents(i64(0, INT64_MAX), 1)

    def test_num_packed_samples_checks_its_arguments(self):
        with pytest.raises(ValueError, match="sequence_length"):
            num_packed_samples(4, 0)
        with pytest.raises(ValueError, match="tokens"):
            num_packed_samples(-1, 4)


class TestCheckIndex:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (dict(pointers=i64(0)), "sequence_pointers: 1 entries for 2 sequence lengths"),
            (dict(pointers=i64(-1, 6)), r"sequence_pointers\[0\]: -1 is negative"),
            (dict(pointers=i64(6, 0)), r"sequence_pointers\[1\]: 0 is less than"),
            (dict(pointers=i64(0, 7)), r"sequence_pointers\[1\]: .*8 bytes from byte 7.*14 bytes"),
            (dict(pointers=i64(0, INT64_MAX)), r"sequence_pointers\[1\]: .*outside"),
            (dict(lengths=i32(3, -1)), r"sequence_lengths\[1\]: -1 is negative"),
            (dict(documents=i64(0, 1)), r"document_indices\[1\]: the last entry is 1"),
            (dict(bin_bytes=13), r"sequence_pointers\[1\]: .*outside the .bin's 13 bytes"),
            (dict(bin_bytes=-1), "bin_size_bytes: expected at least 0"),
            (dict(bin_bytes=2**63), "bin_size_bytes: .*does not fit"),
            (dict(itemsize=0), "itemsize: expected at least 1"),
            (dict(itemsize=INT64_MAX), "itemsize: .*does not fit"),
        ],
    )
    def test_names_the_first_bad_entry(self, call, message):
        valid = dict(
            lengths=i32(3, 4), pointers=i64(0, 6), documents=i64(0, 1, 2), itemsize=2, bin_bytes=14
        )
        engine.check_index(*valid.values())
        with pytest.raises(ValueError, match=message):
            engine.check_index(*(valid | call).values())

    def test_empty(self):
        engine.check_index(i32(), i64(), i64(0), 2, 0)


def write_pair(
    folder: Path,
    lengths=(3, 4, 0, 5),
    documents=(0, 1, 3, 4),
    *,
    magic=b"MMIDIDX\x00\x00",
    version=1,
    code=8,
    itemsize=2,
    pointers=None,
    modes=b"",
) -> Path:
    """Writes a pair as Megatron does; returns its prefix."""
    prefix = folder / "corpus"
    if pointers is None:
        pointers = np.cumsum([0, *lengths])[:-1] * itemsize
    prefix.with_suffix(".idx").write_bytes(
        magic
        + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
        + np.array(lengths, "<i4").tobytes()
        + np.array(pointers, "<i8").tobytes()
        + np.array(documents, "<i8").tobytes()
        + modes
    )
    prefix.with_suffix(".bin").write_bytes(bytes(max(sum(lengths), 0) * itemsize))
    return prefix


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


class TestReadIndex:
    def test_summary(self, tmp_path):
        index = read_index(write_pair(tmp_path))
        assert (index.documents, index.sequences, index.tokens) == (3, 4, 12)
        assert index.dtype == np.uint16
        assert index.sequence_lengths.tolist() == [3, 4, 0, 5]
        assert index.sequence_pointers.tolist() == [0, 6, 14, 14]
        assert index.document_indices.tolist() == [0, 1, 3, 4]
        assert index.document_tokens(0, 3).tolist() == [3, 4, 5]
        assert index.document_tokens(1, 2).tolist() == [4]
        assert index.document_tokens(2, 2).tolist() == []
        assert index.bin_bytes == 24
        assert isinstance(index.sequence_lengths, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            index.sequence_lengths[0] = 1

    @pytest.mark.parametrize(
        ("code", "itemsize", "name"),
        [
            (1, 1, "uint8"),
            (2, 1, "int8"),
            (3, 2, "int16"),
            (4, 4, "int32"),
            (5, 8, "int64"),
            (8, 2, "uint16"),
        ],
    )
    def test_token_types(self, tmp_path, code, itemsize, name):
        index = read_index(write_pair(tmp_path, code=code, itemsize=itemsize))
        assert index.dtype.name == name

    def test_empty_corpus(self, tmp_path):
        index = read_index(write_pair(tmp_path, lengths=(), documents=(0,)))
        assert (index.documents, index.sequences, index.tokens) == (0, 0, 0)
        assert index.document_tokens(0, 0).tolist() == []

    def test_multimodal_modes_are_allowed(self, tmp_path):
        assert read_index(write_pair(tmp_path, modes=bytes(4))).tokens == 12

    def test_truncated_anywhere(self, tmp_path):
        prefix = write_pair(tmp_path)
        path = prefix.with_suffix(".idx")
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(DatasetError) as error:
                read_index(prefix)
            assert_one_line(error, str(path), f"found {size}", "truncated", "preprocess")
            expected = len(whole) if size >= HEADER_BYTES else HEADER_BYTES
            assert f"{expected} bytes" in str(error.value)

    def test_too_long(self, tmp_path):
        with pytest.raises(DatasetError) as error:
            read_index(write_pair(tmp_path, modes=bytes(3)))
        assert_one_line(error, "longer than its header says")

    @pytest.mark.parametrize(
        ("damage", "parts"),
        [
            (dict(magic=b"TNTIDX\x00\x00\x00"), ["expected Megatron's index header", "TNTIDX"]),
            (dict(version=2), ["expected index version 1, found 2"]),
            (dict(code=0), ["token type code 0", "8 (uint16)"]),
            (dict(code=6), ["token type code 6"]),
            (dict(code=7), ["token type code 7"]),
            (dict(code=9), ["token type code 9"]),
            (dict(code=255), ["token type code 255"]),
            (dict(lengths=(-4, 9), documents=(0, 2)), ["sequence_lengths[0]: -4 is negative"]),
            (dict(pointers=(0, 6, 14, 15)), ["sequence_pointers[3]", "outside the .bin's 24"]),
            (dict(pointers=(0, 6, 14, 2**62)), ["sequence_pointers[3]", "outside"]),
            (dict(pointers=(-2, 6, 14, 14)), ["sequence_pointers[0]: -2 is negative"]),
            (dict(pointers=(6, 0, 14, 14)), ["sequence_pointers[1]: 0 is less than"]),
            (dict(documents=()), ["document_indices: expected at least one entry"]),
            (dict(documents=(0, 3, 1, 4)), ["document_indices[2]: 1 is less than"]),
            (dict(documents=(0, 1, 5)), ["document_indices[2]: 5 is beyond the 4 sequences"]),
            (dict(documents=(0, 1)), ["document_indices[1]: the last entry is 1"]),
            (dict(documents=(-1, 4)), ["document_indices[0]: expected 0, found -1"]),
        ],
    )
    def test_damage_is_named(self, tmp_path, damage, parts):
        prefix = write_pair(tmp_path, **damage)
        with pytest.raises(DatasetError) as error:
            read_index(prefix)
        assert_one_line(error, f"{prefix}.idx", "preprocess", *parts)

    @pytest.mark.parametrize("field", [18, 26])  # the two counts
    @pytest.mark.parametrize("count", [2**32, 2**61, 2**63, 2**64 - 1])
    def test_absurd_counts(self, tmp_path, field, count):
        prefix = write_pair(tmp_path)
        path = prefix.with_suffix(".idx")
        whole = bytearray(path.read_bytes())
        whole[field : field + 8] = struct.pack("<Q", count)
        path.write_bytes(whole)
        with pytest.raises(DatasetError) as error:
            read_index(prefix)
        assert_one_line(error, "truncated", str(count))

    def test_short_bin(self, tmp_path):
        prefix = write_pair(tmp_path)
        prefix.with_suffix(".bin").write_bytes(bytes(23))
        with pytest.raises(DatasetError) as error:
            read_index(prefix)
        assert_one_line(error, f"{prefix}.idx", f"{prefix}.bin (23 bytes)")

    def test_missing_files(self, tmp_path):
        prefix = write_pair(tmp_path)
        for wrong, parts in [
            (tmp_path / "nothing", ["nothing.idx: no such file", "check the path"]),
            (f"{prefix}.idx", ["pass the prefix without the ending", str(prefix)]),
            (f"{prefix}.bin", ["pass the prefix without the ending"]),
            (tmp_path, ["the prefix is a folder"]),
            ("bad\x00name", ["no such file"]),
        ]:
            with pytest.raises(DatasetError) as error:
                read_index(wrong)
            assert_one_line(error, *parts)
        prefix.with_suffix(".bin").unlink()
        with pytest.raises(DatasetError) as error:
            read_index(prefix)
        assert_one_line(error, f"{prefix}.bin: no such file")
        prefix.with_suffix(".bin").mkdir()
        with pytest.raises(DatasetError) as error:
            read_index(prefix)
        assert_one_line(error, f"{prefix}.bin: expected a file, found a folder")

    @settings(deadline=None)
    @given(corpora.filter(any))
    def test_documents_of_any_number_of_sequences(self, tmp_path_factory, corpus):
        lengths, documents = arrays_of(corpus)
        prefix = write_pair(tmp_path_factory.mktemp("any"), lengths, documents)
        index = read_index(prefix)
        assert index.document_tokens(0, len(corpus)).tolist() == [sum(d) for d in corpus]
        for first in range(len(corpus)):
            assert index.document_tokens(first, first + 1).tolist() == [sum(corpus[first])]
        owners = np.repeat(np.arange(len(corpus)), np.diff(documents))
        found = documents_of(index.document_indices, np.arange(len(lengths)))
        assert found.tolist() == owners.tolist()

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_any_flipped_bytes(self, tmp_path_factory, data):
        """Random damage either is refused or leaves an index that is safe to read."""
        prefix = write_pair(tmp_path_factory.mktemp("flip"))
        path = prefix.with_suffix(".idx")
        whole = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(whole)
        try:
            index = read_index(prefix)
        except DatasetError as error:
            assert "\n" not in str(error)
        else:
            self.assert_safe(index)

    def assert_safe(self, index: IndexSummary) -> None:
        ends = index.sequence_pointers + index.sequence_lengths * np.int64(index.dtype.itemsize)
        assert (index.sequence_lengths >= 0).all()
        assert (index.sequence_pointers >= 0).all()
        assert (ends <= index.bin_bytes).all()
        assert index.tokens == index.sequence_lengths.sum()


class TestInspectIndex:
    def run(self, repo_root, *args):
        return subprocess.run(
            [sys.executable, repo_root / "tools" / "inspect_index.py", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=60,
        )

    def test_prints_the_counts(self, tmp_path, repo_root):
        done = self.run(repo_root, write_pair(tmp_path), "--sequence-length", 4)
        assert done.returncode == 0, done.stderr
        printed = dict(line.rsplit("  ", 1) for line in done.stdout.splitlines())
        printed = {name.strip(): value for name, value in printed.items()}
        assert printed["documents"] == "3"
        assert printed["tokens"] == "12"
        assert printed["samples of 4 tokens"] == "2"

    def test_damage_is_one_line_and_exit_code_2(self, tmp_path, repo_root):
        done = self.run(repo_root, write_pair(tmp_path, version=7))
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("megatron-dwm inspect: error: ")

    def test_bad_sequence_length(self, tmp_path, repo_root):
        done = self.run(repo_root, write_pair(tmp_path), "--sequence-length", 0)
        assert done.returncode == 2
        assert "--sequence-length: expected at least 1, found 0" in done.stderr

    def test_imports_neither_torch_nor_megatron(self):
        code = (
            "import sys, megatron_dwm.data;"
            "sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
        )
        assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
