"""Figures of texts, rank correlations and bins: small cases worked out by hand."""

from __future__ import annotations

import math

import numpy
import pytest

from megatron_dwm.logs.text_statistics import (
    binned,
    compression_ratio,
    rank_correlation,
    rank_correlation_within,
    ranks,
    symbol_share,
    type_token_ratio,
)


def test_type_token_ratio_counts_words_of_any_case_among_the_first_200() -> None:
    assert type_token_ratio("The cat, the dog.") == 3 / 4
    assert type_token_ratio("same " * 200 + "other " * 200) == 1 / 200
    assert type_token_ratio("Zürich zürich") == 1 / 2
    assert math.isnan(type_token_ratio(" ... "))


def test_compression_ratio_tells_repetition_from_variety() -> None:
    rng = numpy.random.default_rng(0)
    varied = "".join(chr(c) for c in rng.integers(33, 127, 4000))
    assert compression_ratio("again and again " * 250) < 0.05
    assert compression_ratio(varied) > 0.7
    assert compression_ratio("\ud800") > 1  # half a surrogate pair is replaced, not refused
    assert math.isnan(compression_ratio(""))


def test_symbol_share() -> None:
    assert symbol_share("a b\n{}") == 2 / 6
    assert symbol_share("é4") == 0
    assert math.isnan(symbol_share(""))


def test_ties_share_their_mean_rank() -> None:
    assert ranks(numpy.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_rank_correlation_goes_by_order_alone() -> None:
    x = numpy.array([1.0, 2.0, 3.0, 4.0, math.nan])
    assert rank_correlation(x, numpy.array([1.0, 10.0, 100.0, 1e9, 0.0])) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)
    # Differences of ranks 1, 1, 0, 0: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation(x, numpy.array([2.0, 1.0, 3.0, 4.0, 5.0])) == pytest.approx(0.8)
    assert math.isnan(rank_correlation(x, numpy.ones(5)))
    assert math.isnan(rank_correlation(x[:2], x[:2]))


def test_within_groups_the_groups_own_differences_are_gone() -> None:
    """Two groups apart from each other; within each, the order is the other way round."""
    x = numpy.array([1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
    y = numpy.array([3.0, 2.0, 1.0, 13.0, 12.0, 11.0])
    groups = numpy.array([0, 0, 0, 1, 1, 1])
    assert rank_correlation(x, y) > 0
    assert rank_correlation_within(x, y, groups) == pytest.approx(-1)
    assert math.isnan(rank_correlation_within(x[:2], y[:2], groups[:2]))


def test_bins_have_equally_many_pairs_and_never_split_a_value() -> None:
    x = numpy.array([4.0, 1.0, 2.0, 3.0, math.nan])
    y = numpy.array([8.0, 2.0, 4.0, 6.0, 99.0])
    assert binned(x, y, 2) == [(1.5, 3.0, 1.0, 2), (3.5, 7.0, 1.0, 2)]
    assert binned(numpy.ones(6), numpy.arange(6.0), 3) == [
        (1.0, 2.5, pytest.approx(1.7078, 1e-3), 6)
    ]
    assert binned(x[4:], y[4:], 3) == []
