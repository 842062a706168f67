"""Segments of samples under weights that change: nothing begun is lost, nothing is repeated.

What is checked is what a trainer would see: the token positions of every sample in the order in
which they are handed out, counted for every document.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm.data.epoch_plan import Corpus, first_segment, next_segment
from megatron_dwm.data.index import DatasetError


def corpus(lengths, sequence_length=8, extra=True, first=0, count=None, **more):
    lengths = np.asarray(lengths, dtype=np.int32)
    count = len(lengths) - first if count is None else count
    return Corpus("corpus", lengths, first, count, sequence_length, extra, 7, **more)


def random_corpus(rng, documents=60, **more):
    lengths = rng.integers(0, 40, documents)
    lengths[rng.integers(0, documents, 5)] = 0
    lengths[rng.integers(0, documents, 3)] = 300  # many samples long
    return corpus(lengths, **more)


def tokens_of(segment, position):
    """The sample's parts, without the extra token (which is a label and the next one's first)."""
    parts = segment.parts(segment.row(position))
    length = segment.corpus.sequence_length
    assert sum(p[2] for p in parts) == length + segment.corpus.add_extra_token
    found, left = [], length
    for document, start, count in parts:
        found.append((document, start, min(count, left)))
        left -= min(count, left)
    return found


def count_seen(into, segment, positions):
    for position in positions:
        for document, start, count in tokens_of(segment, position):
            into[document][start : start + count] += 1


def nothing_seen(plan):
    return [np.zeros(n, dtype=int) for n in plan.sequence_lengths]


def test_equal_weights_visit_each_document_once_an_epoch():
    rng = np.random.default_rng(0)
    plan = random_corpus(rng)
    segment = first_segment(plan, np.full(60, 0.3, np.float32), None)
    seen = nothing_seen(plan)
    count_seen(seen, segment, range(segment.end))
    total = int(plan.sequence_lengths.sum())
    # All but the tokens that are too few for a last sample, once each.
    assert segment.end == (total - 1) // 8
    assert sum(int(s.sum()) for s in seen) == segment.end * 8
    assert max(int(s.max(initial=0)) for s in seen) == 1


def test_samples_of_an_epoch_do_not_depend_on_how_many_epochs_follow():
    rng = np.random.default_rng(1)
    plan = random_corpus(rng)
    weights = rng.random(60).astype(np.float32)
    short = first_segment(plan, weights, None)
    long = first_segment(plan, weights, 4 * short.end)
    assert long.sample_bounds[:2] == short.sample_bounds
    for position in range(short.end):
        assert tokens_of(short, position) == tokens_of(long, position)


def test_epochs_differ_and_samples_are_shuffled():
    plan = corpus(np.full(50, 8))
    segment = first_segment(plan, np.ones(50, np.float32), 100)
    first = [tokens_of(segment, k)[0][0] for k in range(49)]
    second = [tokens_of(segment, k)[0][0] for k in range(49, 98)]
    assert first != second
    assert first != sorted(first)
    rows = [segment.row(k) for k in range(49)]
    assert sorted(rows) == list(range(49))
    assert rows != sorted(rows)


def test_a_split_draws_its_own_documents_only():
    plan = corpus(np.full(50, 9), first=20, count=10)
    segment = first_segment(plan, np.ones(10, np.float32), 40)
    documents = {part[0] for k in range(40) for part in tokens_of(segment, k)}
    assert documents == set(range(20, 30))


def test_expected_visits_follow_the_weights():
    """Over many epochs a document of three times the weight is seen three times as often."""
    plan = corpus(np.full(40, 8))
    weights = np.ones(40, np.float32)
    weights[:10] = 3
    segment = first_segment(plan, weights, 39 * 50)
    counts = np.bincount(segment.documents, minlength=40)
    epochs = len(segment.entry_bounds) - 1
    expected = epochs * 40 * weights / weights.sum()
    # Each epoch is within one of its expectation, and the rounding is not biased.
    assert np.abs(counts - expected).max() < epochs * 0.5
    assert abs(counts[:10].mean() / counts[10:].mean() - 3) < 0.1


def draws_of(segment, epoch):
    """How often each document is drawn in an epoch of a segment, pieces left out."""
    chosen = slice(segment.entry_bounds[epoch], segment.entry_bounds[epoch + 1])
    documents = segment.documents[chosen]
    if epoch == 0 and segment.is_piece is not None:
        documents = documents[~segment.is_piece]
    return np.bincount(documents, minlength=segment.corpus.num_documents)


def run_to_the_end_of_an_epoch(plan, changes, num_samples=4000, epoch=0):
    """Changes weights after so many samples each; returns all that was seen to the epoch's end.

    Args:
        plan: the corpus.
        changes: (weights, samples until the next change); the last one runs to the epoch's end.
        num_samples: as for `first_segment`.
        epoch: in which the weights change; those before it are seen whole.

    Returns:
        Visits to each token, the last segment, and draws of each document in earlier epochs.
    """
    seen = nothing_seen(plan)
    segment = first_segment(plan, changes[0][0], num_samples)
    earlier = sum((draws_of(segment, e) for e in range(epoch)), np.zeros(plan.num_documents, int))
    position = segment.sample_bounds[epoch]
    count_seen(seen, segment, range(position))
    for k, (weights, samples) in enumerate(changes):
        if k:
            segment = next_segment(segment, weights, num_samples, position)
            assert segment.first_epoch == epoch
        # Epochs are numbered within a segment, and later ones begin in the one in progress.
        here = segment.sample_bounds[epoch + 1 if k == 0 else 1] + segment.start
        last = k == len(changes) - 1
        until = here if last else min(position + samples, max(here - 1, position))
        count_seen(seen, segment, range(position, until))
        position = until
    return seen, segment, earlier


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sequence_length=st.sampled_from([2, 3, 8, 50]),
    extra=st.booleans(),
    changes=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    epoch=st.integers(0, 2),
)
def test_every_begun_visit_is_completed(seed, sequence_length, extra, changes, epoch):
    """Three changes of the weights in one epoch: each document is seen a whole number of times.

    But for what does not fill a sample at the very end of the epoch, which the next epoch's first
    sample begins with.
    """
    rng = np.random.default_rng(seed)
    plan = random_corpus(rng, 30, sequence_length=sequence_length, extra=extra)
    weights = [rng.random(30).astype(np.float32) + 0.01 for _ in range(len(changes) + 1)]
    steps = [*zip(weights, [*changes, None], strict=True)]
    seen, segment, earlier = run_to_the_end_of_an_epoch(plan, steps, epoch=epoch)
    end = segment.start + segment.sample_bounds[1]
    tail = next_segment(segment, weights[-1], 4000, end)
    # What is left over is handed on as pieces; with them all visits are whole.
    left = 0
    for entry in np.flatnonzero(tail.is_piece) if tail.is_piece is not None else ():
        document, start, stop = tail.span(entry)
        seen[document][start:stop] += 1
        left += stop - start
    assert left < sequence_length + extra
    visits = np.array([s[0] if len(s) else 0 for s in seen])
    for document, found in enumerate(seen):
        assert (found == visits[document]).all(), document
    has_tokens = plan.sequence_lengths > 0
    before = np.zeros(30, int) if segment.seen is None else segment.seen
    planned = earlier + before + draws_of(segment, 0)
    assert (visits == planned)[has_tokens].all()
    # In this epoch a document ends at its new expectation, rounded down or up, or where it was
    # before if that is more already.
    expected = 30 * weights[-1].astype(float) / weights[-1].sum()
    visits = visits - earlier
    assert (visits[has_tokens] >= np.floor(expected[has_tokens] - 1e-6)).all()
    above = np.maximum(np.ceil(expected + 1e-6), before)
    assert (visits[has_tokens] <= above[has_tokens]).all()


def test_the_same_weights_again_change_nothing_but_the_order():
    rng = np.random.default_rng(3)
    plan = random_corpus(rng)
    weights = np.ones(60, np.float32)
    changes = [(weights, 20), (weights, 30), (weights, 0)]
    seen, segment, _ = run_to_the_end_of_an_epoch(plan, changes)
    assert segment.stage == 2
    assert max(int(s.max(initial=0)) for s in seen) == 1
    total = int(plan.sequence_lengths.sum())
    # Each change can put off less than one sample.
    assert total - sum(int(s.sum()) for s in seen) < 9


def test_documents_below_their_new_count_come_first():
    """After the change only the documents whose weight has grown are drawn in this epoch."""
    plan = corpus(np.full(100, 8), extra=False)
    old, new = np.ones(100, np.float32), np.ones(100, np.float32)
    segment = first_segment(plan, old, 10_000)
    done = 50
    visited = {tokens_of(segment, k)[0][0] for k in range(done)}
    new[50:] = 3.0  # expected: 0.5 and 1.5 visits
    after = next_segment(segment, new, 10_000, done)
    rest = range(after.start, after.start + after.sample_bounds[1])
    drawn = [tokens_of(after, k)[0][0] for k in rest]
    assert not {d for d in drawn if d < 50} & visited
    assert {d for d in range(50, 100)} - visited <= set(drawn)


def test_weight_zero_takes_back_what_was_not_begun():
    plan = corpus(np.full(100, 8), extra=False)
    segment = first_segment(plan, np.ones(100, np.float32), 10_000)
    new = np.ones(100, np.float32)
    new[::2] = 0
    after = next_segment(segment, new, 10_000, 30)
    later = [tokens_of(after, k)[0][0] for k in range(after.start, after.start + 300)]
    assert all(d % 2 for d in later)


def test_a_plan_is_a_function_of_its_history():
    rng = np.random.default_rng(5)
    plan = random_corpus(rng)
    a, b = (rng.random(60).astype(np.float32) for _ in range(2))

    def replay():
        return next_segment(first_segment(plan, a, 200), b, 200, 33)

    one, two = replay(), replay()
    for name in ("documents", "starts", "stops", "sample_index", "seen"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert [one.row(k) for k in range(33, 200)] == [two.row(k) for k in range(33, 200)]


def test_a_change_in_a_later_epoch_and_between_epochs():
    plan = corpus(np.full(20, 8), extra=False)
    weights = np.ones(20, np.float32)
    segment = first_segment(plan, weights, 60)
    inside = next_segment(segment, weights, 60, 25)
    assert (inside.first_epoch, inside.sample_bounds[1]) == (1, 15)
    between = next_segment(segment, weights, 60, 40)
    assert (between.first_epoch, between.sample_bounds[1]) == (2, 20)
    assert not between.seen.any()
    with pytest.raises(ValueError, match="position 60"):
        next_segment(segment, weights, 100, segment.end)


def test_independent_draws():
    rng = np.random.default_rng(6)
    plan = random_corpus(rng, method="independent")
    weights = rng.random(60).astype(np.float32)
    segment = first_segment(plan, weights, 500)
    counts = np.bincount(segment.documents[: segment.entry_bounds[1]], minlength=60)
    assert counts.sum() == 60
    after = next_segment(segment, weights, 500, 40)
    drawn = after.entry_bounds[1] - (0 if after.is_piece is None else int(after.is_piece.sum()))
    assert drawn + int(after.seen.sum()) == 60


@pytest.mark.parametrize("method", ["systematic", "independent"])
def test_max_repeats_holds_across_a_change(method):
    """What was seen before the change counts; independent draws keep to it on average."""
    weights = np.ones(20, np.float32)
    weights[0] = 1000
    visits = []
    for seed in range(60):
        lengths = np.full(20, 8, np.int32)
        plan = Corpus("corpus", lengths, 0, 20, 8, False, seed, method, max_repeats=2)
        segment = first_segment(plan, weights, 200)
        after = next_segment(segment, weights, 200, 10)
        visits.append(int(after.seen[0] + draws_of(after, 0)[0]))
        if method == "systematic":
            assert visits[-1] <= 2
    assert np.mean(visits) <= 2 + 5 * (2 / 60) ** 0.5
    assert np.mean(visits) > 1


@pytest.mark.parametrize("weights", [[0, 0, 1], [0, 0, 0]])
def test_no_tokens_to_draw_is_an_error(weights):
    plan = corpus([5, 5, 0])
    with pytest.raises(DatasetError, match="corpus: none of its 3 documents"):
        first_segment(plan, np.array(weights, np.float32), 10)


def test_bad_weights_are_an_error():
    with pytest.raises(DatasetError, match=r"corpus: weights\[1\]"):
        first_segment(corpus([5, 5]), np.array([1, -1], np.float32), 10)


def test_samples_outside_the_plan_are_an_error():
    segment = first_segment(corpus(np.full(20, 8)), np.ones(20, np.float32), None)
    with pytest.raises(IndexError, match="0 to 18"):
        segment.row(19)
