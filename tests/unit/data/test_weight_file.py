"""The weight file and the numbers made from document weights.

Proves: what is written is read again bit for bit, with and without domains; the bytes are those
of the documented layout; bad weights, domains and names are refused before anything is written;
a file appears complete or not at all; scores, the best fraction and the summaries agree with
plain NumPy on whole arrays, also when the documents fill several chunks.
What this file does NOT exercise: damaged files (test_damaged_files.py).
"""

import dataclasses
import hashlib
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm.data import weight_file
from megatron_dwm.data.document_weights import (
    NO_DOMAIN,
    domain_summary,
    keep_top_fraction,
    weight_summary,
    weights_from_scores,
)
from megatron_dwm.data.index import DatasetError, IndexSummary
from megatron_dwm.data.weight_file import read_weights, weights_path, write_weights


def make_index(lengths, prefix="corpus"):
    """An index with one sequence a document, as far as weights look at one."""
    sums = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)
    documents = len(lengths)
    return IndexSummary(
        prefix=prefix,
        documents=documents,
        sequences=documents,
        dtype=np.dtype("u1"),
        bin_bytes=int(sums[-1]),
        sequence_lengths=np.asarray(lengths, np.int32),
        sequence_pointers=sums[:-1],
        document_indices=np.arange(documents + 1),
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 7 documents, so that few documents fill several."""
    monkeypatch.setattr(weight_file, "CHUNK_DOCUMENTS", 7)


weight_lists = st.lists(
    st.floats(0, 2.0**100, width=32, allow_subnormal=True), min_size=1, max_size=40
).filter(any)
name_lists = st.lists(st.text(st.characters(codec="utf-8"), max_size=5), unique=True, max_size=6)


class TestRoundTrip:
    @settings(deadline=None, max_examples=60)
    @given(weights=weight_lists, data=st.data(), names=name_lists, named=st.booleans())
    def test_comes_back_bit_for_bit(self, tmp_path_factory, weights, data, names, named):
        path = tmp_path_factory.getbasetemp() / "round_trip.weights"
        weights = np.array(weights, np.float32)
        index = make_index([3] * len(weights))
        top = len(names) - 1 if names else 2**31 - 1
        domains = None
        if named or names:
            ids = st.lists(st.integers(-1, top), min_size=len(weights), max_size=len(weights))
            domains = np.array(data.draw(ids))
        written = write_weights(path, weights, index, domains, names)
        read = read_weights(path, index)
        for file in (written, read):
            assert file.weights.dtype == np.float32
            assert file.weights.tobytes() == weights.tobytes()
            assert (file.documents, file.tokens) == (len(weights), 3 * len(weights))
            assert file.domain_names == tuple(names)
            if domains is None:
                assert file.domains is None
            else:
                assert file.domains.dtype == np.int32
                assert file.domains.tolist() == domains.tolist()
        assert written.digest == read.digest == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_bytes_are_those_of_the_layout(self, tmp_path):
        path = tmp_path / "a.weights"
        write_weights(path, np.array([0.5, 2.0]), make_index([3, 4]), np.array([1, -1]), ["é", "b"])
        payload = struct.pack("<ffii", 0.5, 2.0, 1, -1) + '["é", "b"]'.encode()
        fields = struct.pack(
            "<8sIIQQQQI",
            b"DWMWGT\0\0",
            1,
            1,
            2,
            2,
            7,
            len('["é", "b"]'.encode()),
            zlib.crc32(payload),
        )
        header = fields + struct.pack("<I", zlib.crc32(fields)) + bytes(8)
        assert path.read_bytes() == header + payload

    def test_other_number_types_and_strides(self, tmp_path):
        index = make_index([1] * 3)
        for weights in (np.array([1, 0, 3]), np.array([1, 9, 0, 9, 3, 9], np.float64)[::2]):
            file = write_weights(tmp_path / "a.weights", weights, index)
            assert file.weights.tolist() == [1, 0, 3]

    def test_arrays_are_read_only(self, tmp_path):
        file = write_weights(
            tmp_path / "a.weights", np.ones(2), make_index([1, 1]), np.zeros(2, int)
        )
        for array in (file.weights, file.domains):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1

    def test_another_weight_file_stands_in_for_the_index(self, tmp_path):
        first = write_weights(tmp_path / "a.weights", np.ones(2), make_index([1, 4]))
        second = write_weights(tmp_path / "b.weights", np.array([1, 2]), first)
        assert (second.documents, second.sequences, second.tokens) == (2, 2, 5)
        with pytest.raises(DatasetError, match=r"a\.weights"):
            write_weights(tmp_path / "b.weights", np.ones(3), first)

    def test_digest_tells_files_apart(self, tmp_path):
        index = make_index([1, 1])
        one = write_weights(tmp_path / "a.weights", np.array([1, 2]), index)
        two = write_weights(tmp_path / "b.weights", np.array([2, 1]), index)
        assert one.digest != two.digest

    def test_path_of_a_prefix(self):
        assert weights_path("data/web_text_document") == "data/web_text_document.weights"


class TestRefused:
    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1, 1, np.nan, -1], "document 2 has the weight nan"),
            ([1, -0.5, 1, 1], "document 1 has the weight -0.5"),
            ([1, 1, 1, np.inf], "document 3 has the weight inf"),
            ([1, 1, 1, 1e39], r"document 3 has the weight 1e\+39"),
            ([0, 0, 0, 0], "all 4 weights are zero"),
            ([1e-60, 0, 0, 0], "all 4 weights are zero"),
            ([1, 1, 1], "each of the 4 documents of corpus"),
            ([[1, 1, 1, 1]], "each of the 4 documents of corpus"),
            ([1, 1, 1, 1j], "each of the 4 documents of corpus"),
            (["1", "1", "1", "1"], "each of the 4 documents of corpus"),
        ],
    )
    def test_weights(self, tmp_path, weights, message):
        with pytest.raises(DatasetError, match=message) as caught:
            write_weights(tmp_path / "a.weights", np.array(weights), make_index([1] * 4))
        assert str(tmp_path / "a.weights") in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_bad_weight_in_a_later_chunk(self, tmp_path, small_chunks):
        weights = np.ones(50)
        weights[33] = np.nan
        with pytest.raises(DatasetError, match="document 33 has"):
            write_weights(tmp_path / "a.weights", weights, make_index([1] * 50))

    @pytest.mark.parametrize(
        ("domains", "names", "message"),
        [
            ([0, 1], ["a"], "document 1 has the domain 1"),
            ([-2, 0], ["a"], "document 0 has the domain -2"),
            ([0, 2**31], [], "document 1 has the domain 2147483648"),
            ([0], [], "each of the 2 documents"),
            ([0.0, 1.0], [], "each of the 2 documents"),
            ([0, 1], ["a", "a"], "two domains have the name 'a'"),
            ([0, 1], ["a", 7], "the name of domain 1 is 7"),
            ([0, 1], ["a", "\ud800"], "not valid Unicode"),
            (None, ["a"], "1 domain names, but no domains"),
        ],
    )
    def test_domains(self, tmp_path, domains, names, message):
        domains = None if domains is None else np.array(domains)
        with pytest.raises(DatasetError, match=message):
            write_weights(tmp_path / "a.weights", np.ones(2), make_index([1, 1]), domains, names)
        assert list(tmp_path.iterdir()) == []

    def test_no_documents(self, tmp_path):
        with pytest.raises(DatasetError, match="all 0 weights are zero"):
            write_weights(tmp_path / "a.weights", np.ones(0), make_index([]))

    @pytest.mark.parametrize("what", ["documents", "sequences", "tokens"])
    def test_weights_of_another_dataset(self, tmp_path, what):
        path = tmp_path / "a.weights"
        write_weights(path, np.ones(2), make_index([1, 1]))
        other = {
            "documents": make_index([1, 1, 1]),
            "sequences": dataclasses.replace(make_index([1, 1]), sequences=9),
            "tokens": make_index([1, 8]),
        }[what]
        with pytest.raises(DatasetError, match=rf"made for 2 {what}, but corpus\.idx has"):
            read_weights(path, other)
        with pytest.raises(DatasetError, match=what):
            read_weights(path, other, verify=False)

    def test_folder_that_is_missing(self, tmp_path):
        with pytest.raises(DatasetError, match=r"none.a\.weights.*cannot be written.*No such"):
            write_weights(tmp_path / "none" / "a.weights", np.ones(1), make_index([1]))

    def test_folder_without_permission(self, tmp_path):
        tmp_path.chmod(0o500)
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        try:
            with pytest.raises(DatasetError, match="Permission denied"):
                write_weights(tmp_path / "a.weights", np.ones(1), make_index([1]))
        finally:
            tmp_path.chmod(0o700)


class TestAtomic:
    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.weights"
        write_weights(path, np.ones(2), make_index([1, 1]))
        before = path.read_bytes()

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DatasetError, match="No space left on device"):
            write_weights(path, np.array([1, 2]), make_index([1, 1]))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_reader_keeps_the_file_that_was_replaced(self, tmp_path):
        path = tmp_path / "a.weights"
        old = write_weights(path, np.array([1, 2]), make_index([1, 1]))
        write_weights(path, np.array([5, 6]), make_index([1, 1]))
        assert old.weights.tolist() == [1, 2]
        assert old.digest != read_weights(path).digest

    def test_writes_over_the_file_that_the_weights_are_read_from(self, tmp_path):
        path = tmp_path / "a.weights"
        old = write_weights(path, np.array([1, 2]), make_index([1, 1]))
        assert write_weights(path, old.weights, old).weights.tolist() == [1, 2]


class TestScores:
    @settings(deadline=None)
    @given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30), st.floats(0.1, 20))
    def test_formula(self, scores, temperature):
        scores = np.array(scores, np.float32)
        weights = weights_from_scores(scores, temperature)
        assert weights.dtype == np.float32
        raw = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
        np.testing.assert_allclose(weights, raw / raw.mean(), rtol=1e-6, atol=1e-38)
        assert weights.mean(dtype=np.float64) == pytest.approx(1, rel=1e-6)

    def test_several_chunks(self, small_chunks):
        scores = np.random.default_rng(0).normal(size=100)
        raw = np.exp(scores / 0.5)
        np.testing.assert_allclose(weights_from_scores(scores, 0.5), raw / raw.mean(), rtol=1e-6)

    def test_a_constant_added_to_all_scores_changes_nothing(self):
        scores = np.array([0.0, 1.0, 2.5])
        moved = weights_from_scores(scores + 2048, 0.5)
        assert moved.tolist() == weights_from_scores(scores, 0.5).tolist()

    def test_extreme_scores_and_temperatures(self, recwarn):
        assert weights_from_scores(np.array([-1e308, 1e308]), 1.0).tolist() == [0, 2]
        assert weights_from_scores(np.array([0.0, 1.0]), 1e-300).tolist() == [0, 2]
        assert weights_from_scores(np.array([0.0, 1.0]), 1e300).tolist() == [1, 1]
        assert weights_from_scores(np.array([3, 3]), 1.0).tolist() == [1, 1]
        assert len(recwarn) == 0

    @pytest.mark.parametrize("temperature", [0, -1, np.inf, np.nan])
    def test_bad_temperature(self, temperature):
        with pytest.raises(ValueError, match="temperature"):
            weights_from_scores(np.ones(2), temperature)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_bad_score(self, small_chunks, bad):
        scores = np.zeros(20)
        scores[16] = bad
        with pytest.raises(ValueError, match=f"document 16 has the score {bad}"):
            weights_from_scores(scores, 1.0)

    @pytest.mark.parametrize("scores", [np.ones(0), np.ones((2, 2)), np.array(["a"])])
    def test_malformed(self, scores):
        with pytest.raises(ValueError, match="one number for each document"):
            weights_from_scores(scores, 1.0)


class TestTopFraction:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.floats(0, 1, exclude_min=True))
    def test_agrees_with_a_stable_sort(self, weights, fraction):
        weights = np.array(weights, np.float64) / 4
        best = np.argsort(-weights, kind="stable")[: max(1, round(fraction * len(weights)))]
        expected = np.zeros(len(weights))
        expected[best] = weights[best]
        result = keep_top_fraction(weights, fraction)
        assert result.dtype == np.float32
        assert result.tolist() == expected.tolist()

    def test_does_not_touch_its_input(self):
        weights = np.array([1, 2, 3], np.float32)
        keep_top_fraction(weights, 0.4)
        assert weights.tolist() == [1, 2, 3]

    @pytest.mark.parametrize("fraction", [0, -0.1, 1.01, np.nan])
    def test_bad_fraction(self, fraction):
        with pytest.raises(ValueError, match="fraction"):
            keep_top_fraction(np.ones(2), fraction)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
    def test_bad_weight(self, bad):
        with pytest.raises(ValueError, match=f"document 1 has the weight {bad}"):
            keep_top_fraction(np.array([1.0, bad]), 0.5)


class TestSummaries:
    @pytest.mark.parametrize("documents", [1, 2, 7, 8, 300])
    def test_agrees_with_numpy(self, tmp_path, small_chunks, documents):
        rng = np.random.default_rng(documents)
        weights = rng.exponential(size=documents).astype(np.float32)
        weights[1::3] = 0
        weights[2::5] = -0.0
        file = write_weights(tmp_path / "a.weights", weights, make_index([2] * documents))
        summary = weight_summary(file)
        exact = weights.astype(np.float64)
        assert summary["documents"] == documents
        assert summary["tokens"] == 2 * documents
        assert summary["digest"] == file.digest
        assert (summary["min"], summary["max"]) == (exact.min(), exact.max())
        assert summary["mean"] == pytest.approx(exact.mean(), rel=1e-12)
        assert summary["zero_share"] == np.mean(exact == 0)
        effective = exact.sum() ** 2 / (exact**2).sum() / documents
        assert summary["effective_sample_size"] == pytest.approx(effective, rel=1e-12)
        for level, value in summary["quantiles"].items():
            assert value == np.quantile(exact, float(level), method="inverted_cdf"), level
        json.dumps(summary, allow_nan=False)

    def test_effective_sample_size_of_known_cases(self, tmp_path):
        for weights, expected in (([3, 3, 3, 3], 1), ([0, 0, 5, 0], 0.25), ([1, 1, 0, 0], 0.5)):
            file = write_weights(tmp_path / "a.weights", np.array(weights), make_index([1] * 4))
            assert weight_summary(file)["effective_sample_size"] == expected

    def test_domains_by_hand(self, tmp_path):
        index = make_index([10, 0, 30, 5])
        file = write_weights(
            tmp_path / "a.weights",
            np.array([1, 2, 1, 4]),
            index,
            np.array([2, 2, 0, -1]),
            ["web", "unused", "code"],
        )
        rows = domain_summary(file, index)
        assert [row["domain"] for row in rows] == ["web", "unused", "code", NO_DOMAIN]
        assert [row["documents"] for row in rows] == [1, 0, 2, 1]
        assert [row["tokens"] for row in rows] == [30, 0, 10, 5]
        assert [row["weight_share"] for row in rows] == [1 / 8, 0, 3 / 8, 4 / 8]
        assert [row["expected_token_share"] for row in rows] == [30 / 60, 0, 10 / 60, 20 / 60]
        without = domain_summary(file, None)
        assert [row["weight_share"] for row in without] == [1 / 8, 0, 3 / 8, 4 / 8]
        assert {row["tokens"] for row in without} == {None}
        assert {row["expected_token_share"] for row in without} == {None}
        json.dumps(rows, allow_nan=False)

    def test_domains_as_numbers_far_apart_over_several_chunks(self, tmp_path, small_chunks):
        domains = np.array([2**31 - 1, 5, -1, 5, 0] * 10)
        index = make_index(range(50))
        file = write_weights(tmp_path / "a.weights", np.ones(50), index, domains)
        rows = domain_summary(file, index)
        assert [row["domain"] for row in rows] == ["0", "5", str(2**31 - 1), NO_DOMAIN]
        assert [row["documents"] for row in rows] == [10, 20, 10, 10]
        lengths = np.arange(50)
        expected = [int(lengths[domains == d].sum()) for d in (0, 5, 2**31 - 1, -1)]
        assert [row["tokens"] for row in rows] == expected
        shares = [row["expected_token_share"] for row in rows]
        np.testing.assert_allclose(shares, np.array(expected) / lengths.sum())

    def test_no_domains(self, tmp_path):
        index = make_index([1, 1])
        assert domain_summary(write_weights(tmp_path / "a.weights", np.ones(2), index), index) == []

    def test_no_row_for_no_domain_when_all_have_one(self, tmp_path):
        index = make_index([0, 0])
        file = write_weights(tmp_path / "a.weights", np.ones(2), index, np.zeros(2, int), ["a"])
        (row,) = domain_summary(file, index)
        assert row["domain"] == "a"
        # No drawn document has a token.
        assert row["expected_token_share"] == 0
