"""`sample_index` is Megatron's `build_sample_idx`, element by element.

The dataset hands our index to code that reads Megatron's, so every convention counts: row 0
even when the first documents are empty, where a sample that ends with a document is said to
end, what becomes of the tail, and the type of the numbers.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers

from megatron_dwm.data.draws import draw_counts, sample_index, visit_order


def both(lengths, order, sequence_length, extra):
    tokens = int(lengths[order].sum())
    theirs = helpers.build_sample_idx(
        lengths, order, sequence_length, 1, tokens, True, add_extra_token_to_sequence=extra
    )
    ours = sample_index(order, lengths, sequence_length, add_extra_token=extra)
    return ours, theirs


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12),
    st.data(),
    st.integers(2, 15),
    st.booleans(),
)
def test_small_corpora(lengths, data, sequence_length, extra):
    lengths = np.array(lengths, dtype=np.int32)
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=30))
    order = np.array(order, dtype=np.int32)
    # build_sample_idx asserts more than one token.
    assume(lengths[order].sum() > 1)
    ours, theirs = both(lengths, order, sequence_length, extra)
    assert ours.dtype == theirs.dtype
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("sequence_length", [2, 100, 2048, 10**6])
def test_large_corpus(extra, sequence_length):
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.5, 1.2, 200_000), 50_000).astype(np.int32)
    lengths[rng.random(200_000) < 0.05] = 0
    counts = draw_counts(rng.lognormal(size=200_000), 200_000, seed=3, epoch=1)
    order = visit_order(counts, seed=3, epoch=1)
    ours, theirs = both(lengths, order, sequence_length, extra)
    assert ours.dtype == theirs.dtype
    assert (ours == theirs).all()


def test_the_tokens_fill_the_last_sample_exactly():
    lengths = np.array([4, 0, 5, 0], dtype=np.int32)
    order = np.array([1, 0, 2, 3], dtype=np.int32)
    for sequence_length, extra in ((3, False), (9, False), (4, True), (8, True)):
        ours, theirs = both(lengths, order, sequence_length, extra)
        assert ours.tolist() == theirs.tolist()
