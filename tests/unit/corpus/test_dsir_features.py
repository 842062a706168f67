"""Features, importance weights and selection of DSIR against a plain restatement of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_dwm.corpus import dsir
from tests.unit.restated_dsir import buckets_of

TEXTS = [
    "The cat (the CAT) sat... on\tthe mat; ÉCOLE naïve_42 don't!",
    "",
    "   \n\t ",
    "one",
    "one two",
    "ǅ İstanbul STRASSE ß 東京 は 雨 — “quoted” …?! ٣٤ a\u00a0b\u2003c\x1cd",
    "the cat sat on the mat " * 30,
]


@pytest.mark.parametrize(("ngrams", "buckets"), [(1, 10_000), (2, 10_000), (2, 7), (4, 1000)])
@pytest.mark.parametrize(("remembered", "slot_bits"), [(3, 2), (30, 3), (1 << 18, 20)])
def test_buckets_are_those_of_the_plain_restatement(
    monkeypatch, ngrams, buckets, remembered, slot_bits
):
    """With caches that forget and clash all the time, too."""
    monkeypatch.setattr(dsir, "_REMEMBERED", remembered)
    monkeypatch.setattr(dsir, "_SLOT_BITS", slot_bits)
    features = dsir.Features(ngrams, buckets)
    hasher = dsir.Hasher(features)
    for text in [*TEXTS, *TEXTS]:
        assert hasher.buckets(text).tolist() == list(buckets_of(text, ngrams, buckets))
        assert len(hasher._longer) <= remembered
        # A text is hashed to its end before words are forgotten.
        assert len(hasher._words) < remembered + 60
    counts = dsir.count(map(hasher.buckets, TEXTS), features)
    together = [b for text in TEXTS for b in buckets_of(text, ngrams, buckets)]
    assert counts.tolist() == [together.count(b) for b in range(buckets)]


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_log_weight_is_the_sum_over_the_ngrams(smoothing):
    target, raw = np.array([3, 0, 1, 0]), np.array([1, 4, 0, 5])
    ratios = dsir.log_ratios(target, raw, smoothing)
    total = 4 + 4 * smoothing
    expected = [
        math.log((t + smoothing) / total + 1e-8) - math.log(r / 10 + 1e-8)
        for t, r in zip(target, raw, strict=True)
    ]
    assert ratios == pytest.approx(expected, rel=1e-12)
    text = [0, 1, 1, 3, 2]
    plain = sum(expected[b] for b in text)
    assert dsir.log_weight(np.array(text), ratios) == pytest.approx(plain, rel=1e-12)
    # Rounded once: whatever the order.
    assert len({dsir.log_weight(np.array(p), ratios) for p in itertools.permutations(text)}) == 1
    assert dsir.log_weight(np.zeros(0, np.int64), ratios) == 0


def test_documents_are_drawn_in_proportion_to_their_weights():
    """One of three with weights 1, 2, 5, of which a fourth is never eligible."""
    log_weights = np.log([1.0, 2.0, 5.0, 1000.0])
    eligible = np.array([True, True, True, False])
    drawn = sum(dsir.select(log_weights, eligible, 0.25, seed) for seed in range(4000))
    assert drawn.sum() == 4000 and drawn[3] == 0
    assert drawn[:3] / 4000 == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)


def test_as_many_are_drawn_as_asked_for():
    log_weights, everybody = np.zeros(10), np.ones(10, bool)
    for fraction, wanted in ((0.01, 1), (0.34, 3), (0.5, 5), (1.0, 10)):
        first, again = (dsir.select(log_weights, everybody, fraction, 1) for _ in range(2))
        assert first.sum() == wanted and (first == again).all()
    assert (
        dsir.select(log_weights, everybody, 0.5, 2) != dsir.select(log_weights, everybody, 0.5, 1)
    ).any()
    assert dsir.select(log_weights, np.arange(10) < 2, 0.5, 1).tolist() == [True] * 2 + [False] * 8
