"""`visit_order`, `sample_index` and `remaining` against models that lay every token out.

`sample_index` against Megatron's own is in tests/contract/test_sample_index_contract.py.
What this file does NOT exercise: epochs of more than 2^31 entries, for their size.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm import _data_engine as engine
from megatron_dwm.data.draws import (
    DOCUMENTS,
    Permutation,
    draw_counts,
    epoch_tokens,
    remaining,
    sample_index,
    visit_order,
)

THREADS = [1, 2, 3, 7]
INT32_MAX = 2**31 - 1


def i32(*values):
    return np.array(values, dtype=np.int32)


class TestVisitOrder:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 4), max_size=40), st.integers(0, 5), st.integers(0, 100))
    def test_agrees_with_the_model(self, counts, extra, first_document):
        draws = [first_document + d for d, count in enumerate(counts) for _ in range(count)]
        draws += [-1 - k for k in range(extra)]
        permutation = Permutation(len(draws), 6, 2, DOCUMENTS)
        order = visit_order(counts, seed=6, epoch=2, first_document=first_document, extra=extra)
        assert order.dtype == np.int32
        assert order.tolist() == [draws[j] for j in permutation]

    @pytest.mark.parametrize("threads", THREADS)
    def test_any_number_of_threads(self, threads):
        counts = np.random.default_rng(0).poisson(1.0, 200_001).astype(np.int32)
        kwargs = dict(seed=6, epoch=2, extra=70_000)
        order = visit_order(counts, **kwargs, threads=threads)
        assert (order == visit_order(counts, **kwargs, threads=1)).all()
        assert (np.bincount(order[order >= 0], minlength=len(counts)) == counts).all()
        assert (np.sort(order[order < 0]) == np.arange(-70_000, 0)).all()

    @pytest.mark.parametrize(
        ("first_document", "dtype"), [(INT32_MAX - 2, np.int32), (INT32_MAX - 1, np.int64)]
    )
    def test_numbers_beyond_32_bits(self, first_document, dtype):
        order = visit_order([1, 2], seed=0, epoch=0, first_document=first_document, extra=1)
        assert order.dtype == dtype
        assert sorted(order.tolist()) == [
            -1,
            first_document,
            first_document + 1,
            first_document + 1,
        ]

    def test_copies_of_a_document_are_spread(self):
        """The four visits of each of 5000 documents are 20,000 / 5 apart on average."""
        order = visit_order(np.full(5000, 4), seed=1, epoch=0)
        places = np.argsort(order, kind="stable").reshape(5000, 4)
        gaps = np.diff(places, axis=1)
        assert abs(gaps.mean() / 4000 - 1) < 0.03
        # Gaps of a random order are exponential but for the ends: as many below 1/10 of the mean.
        assert abs((gaps < 400).mean() - 0.078) < 0.015

    def test_a_document_takes_every_place_equally_often(self):
        runs = 3000
        orders = np.array(
            [visit_order([1, 2, 0, 3], seed=s, epoch=5, threads=1) for s in range(runs)]
        )
        for document, count in ((0, 1), (1, 2), (3, 3)):
            expected = runs * count / 6
            found = (orders == document).sum(axis=0)
            assert abs(found - expected).max() < 5 * (expected * (1 - count / 6)) ** 0.5

    def test_empty(self):
        assert visit_order([], seed=0, epoch=0).tolist() == []
        assert visit_order([0, 0], seed=0, epoch=0).tolist() == []
        assert visit_order([], seed=0, epoch=0, extra=1).tolist() == [-1]

    @pytest.mark.parametrize("threads", THREADS)
    def test_the_first_bad_count_is_named(self, threads):
        counts = np.ones(200_000, dtype=np.int32)
        counts[[90_000, 90_001, 199_999]] = -3
        with pytest.raises(ValueError, match=r"counts\[90000\]: -3 is negative"):
            visit_order(counts, seed=0, epoch=0, threads=threads)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (dict(counts=[1.5]), "counts: expected integers, found float64"),
            (dict(counts=[2**31]), r"counts\[0\]: 2147483648 does not fit"),
            (dict(counts=[[1]]), "counts: .*found 2 dimension"),
            (dict(first_document=-1), "first_document: expected at least 0"),
            (dict(extra=-1), "extra: expected at least 0"),
            (dict(extra=2**62), "counts: .*more than 2\\^62"),
            (dict(epoch=None), "epoch: expected an integer"),
        ],
    )
    def test_malformed_input_is_named(self, call, message):
        with pytest.raises(ValueError, match=message):
            visit_order(**(dict(counts=[1, 2], seed=0, epoch=0) | call))


@st.composite
def layouts(draw):
    """Sequence lengths, entries over them, and for each entry the part that it takes."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    entries = draw(st.lists(st.integers(0, len(lengths) - 1), max_size=15))
    starts, stops = [], []
    for d in entries:
        starts.append(draw(st.integers(0, lengths[d])))
        stops.append(draw(st.integers(starts[-1], lengths[d])))
    if not draw(st.booleans()):
        starts = None
    if not draw(st.booleans()):
        stops = None
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    return np.array(entries, dtype=dtype), i32(*lengths), starts, stops


def laid_out(entries, lengths, starts, stops):
    """The model: (entry, offset in the entry, offset in the document) of every token."""
    tokens = []
    for p, d in enumerate(entries):
        begin = starts[p] if starts is not None else 0
        end = stops[p] if stops is not None else lengths[d]
        tokens += [(p, t - begin, t) for t in range(begin, end)]
    return tokens


class TestSampleIndex:
    @settings(deadline=None)
    @given(layouts(), st.integers(1, 12), st.booleans())
    def test_agrees_with_the_model(self, layout, sequence_length, add_extra_token):
        entries, lengths, starts, stops = layout
        tokens = laid_out(*layout)
        extra = int(add_extra_token)
        samples = max(len(tokens) - extra, 0) // sequence_length
        rows = sample_index(
            entries,
            lengths,
            sequence_length,
            add_extra_token=add_extra_token,
            starts=starts,
            stops=stops,
        )
        assert rows.dtype == np.int32
        assert rows.shape == (samples + 1, 2)
        assert rows[0].tolist() == [0, 0]
        for k in range(1, samples + 1):
            entry, offset, _ = tokens[k * sequence_length + extra - 1]
            assert rows[k].tolist() == [entry, offset + 1 - extra]
        assert epoch_tokens(entries, lengths, starts=starts, stops=stops) == len(tokens)

    @settings(deadline=None)
    @given(layouts(), st.integers(1, 12))
    def test_rows_are_read_as_megatron_reads_them(self, layout, sequence_length):
        """Tokens from row k to row k + 1, its own included, are those of sample k."""
        entries, lengths, starts, stops = layout
        tokens = laid_out(*layout)
        rows = sample_index(entries, lengths, sequence_length, starts=starts, stops=stops)
        parts = [[t for t in tokens if t[0] == p] for p in range(len(entries))]
        for k, ((first, begin), (last, end)) in enumerate(zip(rows, rows[1:], strict=False)):
            if first == last:
                found = parts[first][begin : end + 1]
            else:
                found = parts[first][begin:]
                for p in range(first + 1, last):
                    found = found + parts[p]
                found = found + parts[last][: end + 1]
            assert found == tokens[k * sequence_length : (k + 1) * sequence_length + 1]

    @pytest.mark.parametrize("threads", THREADS)
    @pytest.mark.parametrize("sequence_length", [1, 97, 4096, 10**7])
    def test_any_number_of_threads(self, threads, sequence_length):
        rng = np.random.default_rng(0)
        lengths = rng.integers(0, 60, 50_000).astype(np.int32)
        entries = rng.integers(0, 50_000, 100_001)
        for extra in (False, True):
            expected = sample_index(
                entries, lengths, sequence_length, add_extra_token=extra, threads=1
            )
            rows = sample_index(
                entries, lengths, sequence_length, add_extra_token=extra, threads=threads
            )
            assert (rows == expected).all()
        begins = np.cumsum(lengths[entries])[:-1]
        # Independent of how the entries are cut into chunks.
        token = np.arange(1, len(rows)) * sequence_length
        assert (rows[1:, 0] == np.searchsorted(begins, token, side="right")).all()

    def test_lengths_beyond_32_bits_in_all(self):
        lengths = i32(INT32_MAX, 0, INT32_MAX)
        rows = sample_index(i32(0, 1, 2, 2), lengths, 2**31)
        assert rows.tolist() == [[0, 0], [2, 1], [3, 2]]
        assert epoch_tokens(i32(0, 1, 2, 2), lengths) == 3 * INT32_MAX

    def test_sequence_length_beyond_all_tokens(self):
        assert sample_index(i32(0), i32(9), 2**62).tolist() == [[0, 0]]

    def test_reads_misaligned_lengths(self):
        lengths = i32(5, 6, 7)
        raw = np.frombuffer(b"xx" + lengths.tobytes(), dtype=np.uint8)[2:].view(np.int32)
        assert not raw.flags.aligned
        assert (sample_index(i32(2, 0, 1), raw, 4) == sample_index(i32(2, 0, 1), lengths, 4)).all()

    @pytest.mark.parametrize("threads", THREADS)
    def test_the_first_bad_entry_is_named(self, threads):
        entries = np.zeros(200_000, dtype=np.int64)
        entries[[90_000, 90_001, 150_000]] = 5
        for call in (
            lambda: sample_index(entries, i32(3, 4), 2, threads=threads),
            lambda: epoch_tokens(entries, i32(3, 4), threads=threads),
        ):
            with pytest.raises(
                ValueError, match=r"entry_documents\[90000\]: 5 is not one of the 2"
            ):
                call()

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (dict(entry_documents=i32(0, -1)), r"entry_documents\[1\]: -1 is not one of the 2"),
            (dict(entry_documents=np.zeros(2)), "entry_documents: .*int32 or int64.*float64"),
            (dict(entry_documents=[0]), "entry_documents: expected a NumPy array .*found list"),
            (dict(sequence_lengths=i32(4, -5)), r"sequence_lengths\[1\]: -5 is negative"),
            (dict(sequence_lengths=np.zeros(2, np.int64)), "sequence_lengths: .*int32"),
            (dict(sequence_length=0), "sequence_length: expected at least 1, found 0"),
            (dict(sequence_length=2**62 + 1), "sequence_length: expected at most"),
            (dict(starts=[0]), "starts: 1 entries for 2 entries of entry_documents"),
            (dict(stops=[0, 0, 0]), "stops: 3 entries for 2 entries of entry_documents"),
            (
                dict(starts=[0, -1]),
                r"starts\[1\]: the tokens \[-1, 5\) are no part of the 5 tokens",
            ),
            (dict(starts=[5, 0]), r"starts\[0\]: the tokens \[5, 4\) are no part"),
            (dict(stops=[4, 6]), r"stops\[1\]: the tokens \[0, 6\) are no part"),
            (dict(stops=[4, -1]), r"stops\[1\]: the tokens \[0, -1\)"),
            (dict(starts=[1, 2], stops=[2, 1]), r"starts\[1\]: the tokens \[2, 1\)"),
            (dict(starts=[2**31, 0]), r"starts\[0\]: 2147483648 does not fit in 32 bits"),
            (dict(threads=-2), "threads: expected at least 0, found -2"),
        ],
    )
    def test_malformed_input_is_named(self, call, message):
        valid = dict(entry_documents=i32(0, 1), sequence_lengths=i32(4, 5), sequence_length=3)
        sample_index(**valid)
        with pytest.raises(ValueError, match=message):
            sample_index(**(valid | call))


def remaining_by_tokens(layout, first_token, sequence_length, consumed):
    """The model: a flag per token, then runs of it."""
    entries, lengths, starts, stops = layout

    def is_consumed(token):
        if token < first_token:
            return True
        sample = (token - first_token) // sequence_length
        return sample < len(consumed) and bool(consumed[sample])

    tokens = laid_out(*layout)
    begun, pieces = [], []
    position = 0
    for p in range(len(entries)):
        own = [
            (t[2], is_consumed(position + i)) for i, t in enumerate(tokens[position:]) if t[0] == p
        ]
        flags = [flag for _, flag in own]
        begun.append(any(flags) if own else is_consumed(position))
        if begun[-1]:
            run = []
            for place, flag in [*own, (None, True)]:
                if not flag:
                    run.append(place)
                elif run:
                    pieces.append((p, run[0], run[-1] + 1))
                    run = []
        position += len(own)
    return begun, pieces


class TestRemaining:
    @settings(deadline=None)
    @given(
        layouts(),
        st.integers(-15, 25),
        st.integers(1, 9),
        st.lists(st.booleans(), max_size=12),
    )
    def test_agrees_with_the_model(self, layout, first_token, sequence_length, consumed):
        entries, lengths, starts, stops = layout
        found = remaining(
            entries,
            lengths,
            first_token=first_token,
            sequence_length=sequence_length,
            consumed=np.array(consumed, dtype=bool),
            starts=starts,
            stops=stops,
        )
        begun, pieces = remaining_by_tokens(layout, first_token, sequence_length, consumed)
        assert found.begun.tolist() == begun
        rows = zip(found.piece_entry, found.piece_start, found.piece_stop, strict=True)
        assert [tuple(map(int, row)) for row in rows] == pieces

    def test_an_example(self):
        """Entries of 5, 4, 0 and 6 tokens; samples of 3 from token 1 on, the second one unused.

        Tokens: 0 before sample 0, 1-3 consumed, 4-6 not, 7-9 consumed, 10-14 after the last.
        """
        found = remaining(
            i32(0, 1, 2, 3),
            i32(5, 4, 0, 6),
            first_token=1,
            sequence_length=3,
            consumed=np.array([1, 0, 1], dtype=np.uint8),
        )
        assert found.begun.tolist() == [True, True, True, True]
        assert found.piece_entry.tolist() == [0, 1, 3]
        assert found.piece_start.tolist() == [4, 0, 1]
        assert found.piece_stop.tolist() == [5, 2, 6]
        assert (found.begun.dtype, found.piece_entry.dtype) == (np.bool_, np.int64)
        assert (found.piece_start.dtype, found.piece_stop.dtype) == (np.int32, np.int32)

    @pytest.mark.parametrize("sequence_length", [1, 50, 5000])
    def test_tokens_add_up(self, sequence_length):
        """Consumed tokens, pieces and entries that have not been begun are all tokens."""
        rng = np.random.default_rng(2)
        counts = draw_counts(rng.lognormal(size=30_000), 30_000, seed=0, epoch=0)
        lengths = rng.integers(0, 90, 30_000).astype(np.int32)
        entries = visit_order(counts, seed=0, epoch=0)
        total = epoch_tokens(entries, lengths)
        samples = len(sample_index(entries, lengths, sequence_length)) - 1
        consumed = rng.random(samples) < 0.4
        results = [
            remaining(
                entries,
                lengths,
                first_token=0,
                sequence_length=sequence_length,
                consumed=consumed,
                threads=threads,
            )
            for threads in THREADS
        ]
        for result in results[1:]:
            assert all((a == b).all() for a, b in zip(result, results[0], strict=True))
        found = results[0]
        left = int((found.piece_stop - found.piece_start).sum())
        not_begun = int(lengths[entries[~found.begun]].sum())
        assert left + not_begun + int(consumed.sum()) * sequence_length == total
        assert (np.diff(found.piece_entry) >= 0).all()
        assert found.begun[found.piece_entry].all()

    def test_all_none_and_no_samples(self):
        arguments = dict(sequence_length=4, first_token=0)
        for consumed, begun in ((np.ones(3, bool), True), (np.zeros(3, bool), False)):
            found = remaining(i32(0, 1), i32(5, 7), consumed=consumed, **arguments)
            assert found.begun.tolist() == [begun, begun]
            assert len(found.piece_entry) == 0
        found = remaining(i32(), i32(5, 7), consumed=np.zeros(0, bool), **arguments)
        assert all(len(part) == 0 for part in found)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (dict(first_token=2**62), "first_token: .* is not between"),
            (dict(first_token=-(2**62)), "first_token: .* is not between"),
            (dict(first_token=2**64), "first_token: .*does not fit"),
            (dict(sequence_length=0), "sequence_length: expected at least 1"),
            (dict(sequence_length=2**62), "sequence_length: 2 \\* .* does not fit"),
            (dict(consumed=np.zeros(2)), "consumed: .*uint8.*float64"),
            (dict(starts=[0, 9]), r"starts\[1\]: the tokens \[9, 5\)"),
            (dict(entry_documents=i32(0, 2)), r"entry_documents\[1\]: 2 is not one"),
        ],
    )
    def test_malformed_input_is_named(self, call, message):
        valid = dict(
            entry_documents=i32(0, 1),
            sequence_lengths=i32(4, 5),
            first_token=0,
            sequence_length=3,
            consumed=np.zeros(2, dtype=np.uint8),
        )
        remaining(**valid)
        with pytest.raises(ValueError, match=message):
            remaining(**(valid | call))

    def test_first_token_near_the_limit(self):
        arguments = (i32(0), i32(4), None, None)
        for first, begun in ((2**62 - 1, 1), (1 - 2**62, 0)):
            found = engine.remaining(*arguments, first, 1, np.zeros(3, np.uint8))
            assert found[0].tolist() == [begun]
