"""`draw_counts`: expected counts by brute force, systematic and independent draws by statistics.

Proves: the expected counts solve the water-filling equation; a systematic count is its
expectation rounded down or up, right on average over epochs, and its fate is not tied to the
order on disk; independent draws are multinomial; neither depends on the number of threads; bad
input is named.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm import _data_engine as engine
from megatron_dwm.data.draws import draw_counts, re_draw_counts

THREADS = [1, 2, 3, 7]
PINNED_SYSTEMATIC = [1, 1, 0, 0, 3, 1, 1, 1]
PINNED_INDEPENDENT = [5, 1, 1, 0, 8, 1, 2, 2]

weight_lists = st.lists(
    st.one_of(
        st.just(0.0), st.floats(2.0**-20, 2.0**20, width=32), st.sampled_from([1.0, 0.1, 3.0])
    ),
    min_size=1,
    max_size=40,
).filter(any)


def f32(values):
    return np.asarray(values, dtype=np.float32)


def random_weights(size, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0.0, 1.5, size).astype(np.float32)
    weights[rng.random(size) < 0.1] = 0.0
    return weights


def water_filled(weights, num_draws, cap):
    """The model: exact expected counts; documents are capped from the heaviest down."""
    exact = [Fraction(float(w)) for w in weights]
    if cap is None:
        return [num_draws * w / sum(exact) for w in exact]
    counts = [Fraction(0)] * len(exact)
    order = sorted((d for d, w in enumerate(exact) if w), key=lambda d: -exact[d])
    for k in range(len(order) + 1):
        rest = sum(exact[d] for d in order[k:])
        scale = Fraction(num_draws - cap * k) / rest if rest else Fraction(0)
        if all(scale * exact[d] <= cap for d in order[k:]):
            for position, d in enumerate(order):
                counts[d] = Fraction(cap) if position < k else scale * exact[d]
            return counts
    raise AssertionError("no solution")


def expected_counts(weights, num_draws, cap=0):
    scale = engine.expected_scale(f32(weights), num_draws, cap)
    return np.minimum(scale * f32(weights).astype(np.float64), cap or math.inf)


class TestExpectedScale:
    @settings(deadline=None)
    @given(weight_lists, st.integers(1, 200), st.data())
    def test_solves_the_equation(self, weights, num_draws, data):
        positive = sum(w > 0 for w in weights)
        lowest = -(-num_draws // positive)
        cap = data.draw(st.none() | st.integers(lowest, lowest + 5))
        found = expected_counts(weights, num_draws, cap or 0)
        model = water_filled(f32(weights), num_draws, cap)
        assert np.allclose(found, [float(c) for c in model], rtol=1e-12, atol=0)

    @pytest.mark.parametrize("threads", THREADS)
    def test_any_number_of_threads(self, threads):
        weights = random_weights(500_000)
        for cap in (0, 2, 5):
            expected = engine.expected_scale(weights, 500_000, cap, 1)
            assert engine.expected_scale(weights, 500_000, cap, threads) == expected

    def test_sums_are_exact_to_the_last_bits(self):
        weights = random_weights(3_000_000)
        exact = math.fsum(weights.astype(np.float64))
        scale = engine.expected_scale(weights, 1)
        assert abs(scale * exact - 1) < 4e-16

    def test_ten_powers_of_two_are_capped_one_after_the_other(self):
        weights = [2.0**k for k in range(-60, 61)]
        found = expected_counts(weights, 60, 1)
        assert abs(found.sum() - 60) < 1e-9
        assert (found <= 1).all()

    def test_documents_just_at_the_cap(self):
        """The two heavy documents take all draws without the cap's help."""
        for light in (1e-45, 1e-30, 1e-9):
            found = expected_counts([light, 3e38, 0.0, light, 3e38], 2, 1)
            assert np.allclose(found, [0, 1, 0, 0, 1], atol=1e-12)

    @pytest.mark.parametrize("weight", [1.0, 0.1, 3e-39, 3e38])
    def test_all_at_the_cap(self, weight):
        found = expected_counts([weight, 2 * weight if weight < 1e38 else weight, 0.0], 6, 3)
        assert found.tolist() == [3, 3, 0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((f32([1, 0, math.nan, -1]), 3), r"weights\[2\]: -?nan is not a finite number >= 0"),
            ((f32([1, math.inf]), 3), r"weights\[1\]: inf is not"),
            ((f32([1, -0.5, math.nan]), 3), r"weights\[1\]: -0.5"),
            ((f32([0, 0]), 3), "weights: all 2 weights are 0, and 3 draws"),
            ((f32([]), 3), "weights: all 0 weights are 0"),
            (
                (f32([1, 0, 2]), 5, 2),
                "max_repeats: 2 documents .* 2 times each, are fewer than .* 5",
            ),
            ((f32([1]), -1), "num_draws: expected at least 0, found -1"),
            ((f32([1]), 1, -1), "max_repeats: expected at least 0, found -1"),
            ((f32([1]), 1, 2**31), "max_repeats: expected at most 2147483647"),
            ((f32([1]), 1, 0, -1), "threads: expected at least 0"),
            ((np.ones(2), 1), "weights: .*float32.*float64"),
        ],
    )
    def test_malformed_input_is_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            engine.expected_scale(*arguments)

    @pytest.mark.parametrize("threads", THREADS)
    def test_the_first_bad_weight_is_named(self, threads):
        weights = np.ones(400_000, dtype=np.float32)
        weights[[70_000, 70_001, 200_000, 399_999]] = -1
        for call in (
            lambda: engine.expected_scale(weights, 5, 0, threads),
            lambda: engine.systematic_counts(weights, 1.0, 0, 0, threads=threads),
            lambda: engine.independent_counts(weights, 5, 0, 0, threads),
        ):
            with pytest.raises(ValueError, match=r"weights\[70000\]"):
                call()


class TestSystematic:
    @settings(deadline=None)
    @given(weight_lists, st.integers(1, 200), st.integers(0, 5), st.data())
    def test_floor_or_ceiling_and_exact_total(self, weights, num_draws, epoch, data):
        lowest = -(-num_draws // sum(w > 0 for w in weights))
        cap = data.draw(st.none() | st.integers(lowest, lowest + 5))
        counts = draw_counts(weights, num_draws, seed=1, epoch=epoch, max_repeats=cap)
        assert counts.dtype == np.int32
        assert counts.sum() == num_draws
        for count, expected in zip(counts, water_filled(f32(weights), num_draws, cap), strict=True):
            # An expectation that is an integer may come out an ulp off it.
            slack = Fraction(1, 2**40)
            assert math.floor(expected + slack) <= count + (expected % 1 < slack)
            assert math.floor(expected - slack) <= count <= math.ceil(expected + slack)

    def test_floor_or_ceiling_of_a_large_corpus(self):
        weights = random_weights(1_000_000)
        scale = engine.expected_scale(weights, 1_000_000)
        expected = scale * weights.astype(np.float64)
        counts = engine.systematic_counts(weights, scale, 3, 4)
        assert ((counts == np.floor(expected)) | (counts == np.ceil(expected))).all()
        assert counts.sum() == 1_000_000

    @pytest.mark.parametrize("size", [1, 2, 4095, 4096, 4097, 300_001])
    @pytest.mark.parametrize("weight", [1.0, 0.1, 1 / 3, 1e-38, 3e38])
    @pytest.mark.parametrize("times", [1, 3])
    def test_equal_weights_are_visited_equally(self, size, weight, times):
        weights = np.full(size, weight, dtype=np.float32)
        for epoch in range(3):
            counts = draw_counts(weights, times * size, seed=0, epoch=epoch)
            assert (counts == times).all()

    def test_a_total_that_is_no_integer(self):
        weights = f32([0.3] * 7)
        totals = {
            int(engine.systematic_counts(weights, 1.0, 0, epoch).sum()) for epoch in range(200)
        }
        assert totals == {2, 3}

    @pytest.mark.parametrize("size", [12, 5000])
    def test_mean_over_epochs(self, size):
        """Every document's mean count is its expectation, whatever its place and its fraction."""
        epochs = 3000
        weights = random_weights(size, seed=size)
        expected = expected_counts(weights, size)
        total = np.zeros(size)
        for epoch in range(epochs):
            total += draw_counts(weights, size, seed=0, epoch=epoch, threads=1)
        fraction = expected % 1
        # A count is floor + a coin of this variance; 12 more epochs' worth for tiny fractions.
        deviation = (total - epochs * expected) / np.sqrt(epochs * fraction * (1 - fraction) + 1)
        assert abs(deviation).max() < 5
        assert abs((deviation**2).mean() - 1) < 0.25 or size < 100

    @pytest.mark.parametrize("fraction", [0.5, 0.25, 1 / 3, 0.1])
    @pytest.mark.parametrize("size", [4096, 10_000])
    def test_neighbours_on_disk_share_no_fate(self, size, fraction):
        """Documents drawn with equal chance: no run, comb or half of the disk is preferred.

        Draws of equal fractions fall on every 1/fraction-th place of the order, so an order
        with structure would show here first.
        """
        weights = np.ones(size, dtype=np.float32)
        epochs = 200
        products = {lag: [] for lag in (1, 2, 3, 4, 8, 64, 1024, 2048)}
        halves, combs = [], []
        for epoch in range(epochs):
            counts = engine.systematic_counts(weights, fraction, 11, epoch, threads=1)
            x = (counts - fraction) / (fraction * (1 - fraction)) ** 0.5
            for lag, values in products.items():
                values.append((x[:-lag] * x[lag:]).sum() / (size - lag) ** 0.5)
            halves.append(x[: size // 2].sum() / (size / 4) ** 0.5)
            combs.append([x[r::4].sum() / (3 * size / 16) ** 0.5 for r in range(4)])
        for lag, values in products.items():
            values = np.array(values)
            assert abs(values.mean()) < 5 / epochs**0.5, lag
            assert 0.7 < values.std() < 1.4, (lag, values.std())
        # Over disk halves and combs, draws vary as in a random sample without replacement, or less.
        assert np.std(halves) < 1.3
        assert np.std(combs) < 1.3

    def test_pairs_are_drawn_as_in_a_random_order(self):
        """Pairs of places in a block, over epochs: drawn together as often as they should be."""
        size, epochs, places = 4096, 4000, 48
        picked = np.random.default_rng(0).choice(size, places, replace=False)
        picked[:8] = [0, 1, 2, 3, 64, 128, 2048, 4095]
        weights = np.ones(size, dtype=np.float32)
        drawn = np.array(
            [
                engine.systematic_counts(weights, 0.5, 5, epoch, threads=1)[picked]
                for epoch in range(epochs)
            ]
        )
        z = np.corrcoef(drawn.T)[np.triu_indices(places, 1)] * epochs**0.5
        assert abs(z).max() < 5
        assert 0.85 < z.std() < 1.15

    def test_neighbouring_blocks_share_no_fate(self):
        """One draw falls on every two blocks of 4096 in the order, not of the disk.

        Were blocks in the order of the disk, every pair of them would have exactly one draw.
        """
        weights = np.ones(64 * 4096, dtype=np.float32)
        ones = 0
        for epoch in range(30):
            counts = engine.systematic_counts(weights, 1 / 8192, 9, epoch)
            ones += (counts.reshape(32, 8192).sum(axis=1) == 1).sum()
        # Of 64 blocks a random half: a pair has exactly one with the probability 32 / 63.
        assert abs(ones / 960 - 32 / 63) < 0.1

    @pytest.mark.parametrize("size", [3, 4, 5, 6])
    def test_every_pair_is_drawn_together_equally_often(self, size):
        epochs = 4000
        weights = np.ones(size, dtype=np.float32)
        drawn = np.array(
            [engine.systematic_counts(weights, 0.5, 7, e, threads=1) for e in range(epochs)]
        )
        together = (drawn.T @ drawn)[np.triu_indices(size, 1)] / epochs
        mean = together.mean()
        assert mean > 0.1
        assert abs(together - mean).max() < 5 * (mean * (1 - mean) / epochs) ** 0.5

    @pytest.mark.parametrize("threads", THREADS)
    def test_any_number_of_threads(self, threads):
        weights = random_weights(700_001)
        consumed = np.random.default_rng(1).integers(0, 3, 700_001).astype(np.int32)
        for used in (None, consumed):
            counts = [
                engine.systematic_counts(weights, 0.7, 3, 1, 4, used, t) for t in (1, threads)
            ]
            assert (counts[0] == counts[1]).all()

    def test_the_same_on_every_machine(self):
        """A change of these numbers changes every training that is resumed."""
        weights = f32([0.5, 1.5, 0.25, 0.0, 2.75, 1.0, 0.3, 0.7])
        assert draw_counts(weights, 8, seed=1, epoch=2).tolist() == PINNED_SYSTEMATIC
        found = draw_counts(weights, 20, seed=1, epoch=2, method="independent")
        assert found.tolist() == PINNED_INDEPENDENT

    def test_epochs_and_seeds_differ(self):
        weights = random_weights(2000)
        keys = [(0, 0), (0, 1), (1, 0), (-1, 0), (0, 2**40)]
        found = {tuple(draw_counts(weights, 2000, seed=s, epoch=e)) for s, e in keys}
        assert len(found) == len(keys)

    def test_reads_misaligned_and_strided_views(self):
        weights = random_weights(5000)
        raw = np.frombuffer(b"xx" + weights.tobytes(), dtype=np.uint8)[2:].view(np.float32)
        wide = np.zeros(10_000, dtype=np.float32)
        wide[::2] = weights
        assert not raw.flags.aligned
        expected = draw_counts(weights, 5000, seed=1, epoch=1)
        for view in (raw, wide[::2]):
            assert (draw_counts(view, 5000, seed=1, epoch=1) == expected).all()

    def test_no_draws(self):
        assert draw_counts(f32([1, 2]), 0, seed=0, epoch=0).tolist() == [0, 0]
        assert draw_counts(f32([]), 0, seed=0, epoch=0).tolist() == []
        assert draw_counts(f32([]), 0, seed=0, epoch=0, method="independent").tolist() == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(scale=math.nan), "scale: expected a finite number >= 0, found"),
            (dict(scale=-1.0), "scale: expected a finite number >= 0, found -1"),
            (dict(scale=math.inf), "scale: .*inf"),
            (
                dict(scale=1.5e9),
                r"weights\[1\]: the document would be drawn 3e\+09 times.* 32 bits",
            ),
            (dict(consumed=np.zeros(1, dtype=np.int32)), "consumed: 1 entries for 2 weights"),
            (dict(consumed=np.array([0, -1], dtype=np.int32)), r"consumed\[1\]: -1 is negative"),
            (dict(consumed=np.zeros(2)), "consumed: .*int32"),
            (dict(seed=2**63), "seed: .*does not fit"),
        ],
    )
    def test_malformed_input_is_named(self, arguments, message):
        valid = dict(weights=f32([1, 2]), scale=1.0, seed=0, epoch=0)
        with pytest.raises(ValueError, match=message):
            engine.systematic_counts(**(valid | arguments))

    def test_counts_up_to_32_bits(self):
        counts = engine.systematic_counts(f32([1, 0]), 2.0**31 - 1, 0, 0)
        assert counts.tolist() == [2**31 - 1, 0]


class TestReDraw:
    @settings(deadline=None)
    @given(weight_lists, st.integers(1, 200), st.data())
    def test_floor_or_ceiling_of_what_is_left(self, weights, num_draws, data):
        consumed = data.draw(
            st.lists(st.integers(0, 5), min_size=len(weights), max_size=len(weights))
        )
        left = np.maximum(expected_counts(weights, num_draws) - consumed, 0)
        counts = re_draw_counts(weights, num_draws, consumed, seed=3, epoch=1)
        near = np.round(left)
        exact = np.where(abs(left - near) < 1e-9, near, left)
        assert (np.floor(exact) <= counts).all() and (counts <= np.ceil(exact)).all()
        assert abs(counts.sum() - left.sum()) < 1

    def test_nothing_consumed_is_a_draw(self):
        weights = random_weights(1000)
        found = re_draw_counts(weights, 1000, np.zeros(1000, np.int64), seed=3, epoch=1)
        assert (found == draw_counts(weights, 1000, seed=3, epoch=1)).all()

    def test_mean_over_epochs(self):
        weights = random_weights(300, seed=4)
        consumed = np.random.default_rng(0).integers(0, 3, 300)
        left = np.maximum(expected_counts(weights, 300, 4) - consumed, 0)
        epochs = 2000
        mean = (
            sum(
                re_draw_counts(weights, 300, consumed, seed=0, epoch=e, max_repeats=4, threads=1)
                for e in range(epochs)
            )
            / epochs
        )
        fraction = left % 1
        assert (abs(mean - left) < 5 * np.sqrt(fraction * (1 - fraction) / epochs) + 1e-9).all()

    @pytest.mark.parametrize(
        ("consumed", "message"),
        [
            ([0, 2**31], r"consumed\[1\]: 2147483648 does not fit in 32 bits"),
            ([0, 0.5], "consumed: expected integers, found float64"),
            ([0], "consumed: 1 entries for 2 weights"),
        ],
    )
    def test_malformed_input_is_named(self, consumed, message):
        with pytest.raises(ValueError, match=message):
            re_draw_counts([1, 2], 2, consumed, seed=0, epoch=0)


class TestIndependent:
    def draw(self, weights, num_draws, epoch=0, threads=0):
        return draw_counts(
            weights, num_draws, seed=2, epoch=epoch, method="independent", threads=threads
        )

    @settings(deadline=None)
    @given(weight_lists, st.integers(0, 500))
    def test_total_and_zero_weights(self, weights, num_draws):
        counts = self.draw(weights, num_draws)
        assert counts.dtype == np.int32
        assert counts.sum() == num_draws
        assert (counts[f32(weights) == 0] == 0).all()

    @pytest.mark.parametrize(
        "weights",
        [
            f32([1] * 7),
            f32([0.1, 0.2, 0.3, 0.4]),
            f32([1, 1e-3, 0, 5, 0.01]),
            f32([1] * 4096 + [2] * 4096 + [0.5] * 100),
            random_weights(9000),
        ],
        ids=["equal", "four", "uneven", "blocks", "random"],
    )
    def test_chi_square(self, weights):
        num_draws = 200 * len(weights) + 100_000
        expected = num_draws * weights.astype(np.float64) / weights.astype(np.float64).sum()
        keep = expected > 5
        for epoch in range(3):
            counts = self.draw(weights, num_draws, epoch)
            observed = np.append(counts[keep], counts[~keep].sum())
            model = np.append(expected[keep], expected[~keep].sum())
            if model[-1] < 5:
                observed, model = observed[:-1], model[:-1]
            chi_square = ((observed - model) ** 2 / model).sum()
            freedom = len(model) - 1
            assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5 + 12

    def test_counts_of_an_epoch_are_poisson(self):
        """With as many draws as documents: variance 1, and e^-1 of them not drawn."""
        counts = self.draw(np.ones(200_000, dtype=np.float32), 200_000)
        assert abs(counts.var() - 1) < 0.03
        assert abs((counts == 0).mean() - np.exp(-1)) < 0.006
        assert abs(np.corrcoef(counts[:-1], counts[1:])[0, 1]) < 0.012

    @pytest.mark.parametrize("threads", THREADS)
    def test_any_number_of_threads(self, threads):
        weights = random_weights(300_001)
        for num_draws in (5, 1_000_003):
            expected = self.draw(weights, num_draws, threads=1)
            assert (self.draw(weights, num_draws, threads=threads) == expected).all()

    def test_one_document_takes_all(self):
        weights = np.zeros(10_000, dtype=np.float32)
        weights[9_999] = 1e-40
        assert self.draw(weights, 12345)[9_999] == 12345

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((f32([0, 0]), 1, 0, 0), "weights: all 2 weights are 0"),
            ((f32([]), 1, 0, 0), "weights: all 0 weights are 0"),
            ((f32([1, math.nan]), 1, 0, 0), r"weights\[1\]: -?nan"),
            ((f32([1]), -1, 0, 0), "num_draws: expected at least 0"),
        ],
    )
    def test_malformed_input_is_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            engine.independent_counts(*arguments)


class TestFace:
    def test_independent_draws_keep_to_a_limit_on_average(self):
        """The limit is on the expectation: what one document loses goes to the others."""
        weights, epochs = np.array([100.0] + [1.0] * 19, np.float32), 400
        counts = sum(
            draw_counts(weights, 20, seed=3, epoch=e, method="independent", max_repeats=2)
            for e in range(epochs)
        )
        assert counts.sum() == 20 * epochs
        # A binomial with mean 2 a draw of 20: five standard deviations.
        assert abs(counts[0] / epochs - 2) < 5 * (2 / epochs) ** 0.5
        assert abs(counts[1:].mean() / epochs - 18 / 19) < 0.02

    def test_a_limit_on_independent_draws_by_tiny_weights(self):
        counts = draw_counts(
            [1e-40, 0.0, 3e-40], 90, seed=0, epoch=0, method="independent", max_repeats=60
        )
        assert counts.sum() == 90
        assert counts[1] == 0

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (dict(method="alias"), "method: 'alias' is not one of systematic, independent"),
            (dict(method="independent", max_repeats=0), "max_repeats: expected at least 1"),
            (dict(max_repeats=0), "max_repeats: expected at least 1, found 0"),
            (dict(weights=["a", "b"]), "weights: expected real numbers"),
            (dict(weights=[1.0, 1e300]), r"weights\[1\]: inf"),
            (dict(weights=[[1.0]]), "weights: .*found 2 dimension"),
        ],
    )
    def test_malformed_input_is_named(self, call, message):
        valid = dict(weights=[1.0, 2.0], num_draws=2, seed=0, epoch=0)
        with pytest.raises(ValueError, match=message):
            draw_counts(**(valid | call))

    @settings(max_examples=20, deadline=None)
    @given(st.sampled_from([np.float64, np.float16, np.int64, np.uint8]))
    def test_other_types_of_numbers(self, dtype):
        expected = draw_counts(f32([1, 2, 5]), 100, seed=0, epoch=0)
        found = draw_counts(np.array([1, 2, 5], dtype=dtype), 100, seed=0, epoch=0)
        assert (found == expected).all()
