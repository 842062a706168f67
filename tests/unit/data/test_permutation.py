"""`Permutation`: a bijection of every size, keyed by all of its arguments, and well mixed.

What this file does NOT exercise: cryptographic strength, which is not claimed.
"""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm.data.draws import DOCUMENTS, SAMPLES, Permutation

SIZES = sorted(
    {0, 1, 2, 3, 5, 7, 97, 997, 65537, 104729}
    | {2**k + d for k in (2, 3, 4, 5, 9, 10, 15, 16, 17) for d in (-1, 0, 1)}
)
HUGE = (2**32 + 15, 2**61, 2**62 - 1, 2**62)
PINNED_10 = [7, 0, 4, 2, 3, 9, 8, 5, 1, 6]
PINNED_40 = 618096628199
int64s = st.integers(-(2**63), 2**63 - 1)


def elements(n, seed=1, epoch=2, stream=0, threads=0):
    return Permutation(n, seed, epoch, stream).many(np.arange(n), threads)


class TestBijection:
    @pytest.mark.parametrize("n", SIZES)
    def test_every_element_once(self, n):
        permutation = Permutation(n, 7, 3, SAMPLES)
        found = permutation.many(np.arange(n))
        assert found.dtype == np.int64
        assert (np.sort(found) == np.arange(n)).all()
        assert (permutation.many_inverse(found) == np.arange(n)).all()
        assert len(permutation) == n

    @settings(deadline=None)
    @given(st.integers(1, 3000), int64s, int64s, st.integers(0, 2**32 - 1))
    def test_any_key(self, n, seed, epoch, stream):
        permutation = Permutation(n, seed, epoch, stream)
        found = permutation.many(np.arange(n))
        assert (np.sort(found) == np.arange(n)).all()
        assert (permutation.many_inverse(found) == np.arange(n)).all()

    @pytest.mark.parametrize("n", HUGE)
    def test_inverse_of_huge(self, n):
        permutation = Permutation(n, 5, 0, DOCUMENTS)
        positions = np.concatenate(
            [
                [0, 1, n // 2, n - 2, n - 1],
                np.random.default_rng(0).integers(0, n, 2000),
            ]
        ).astype(np.int64)
        found = permutation.many(positions)
        assert found.min() >= 0 and found.max() < n
        assert (permutation.many_inverse(found) == positions).all()
        assert len(np.unique(found)) == len(np.unique(positions))
        # Spread over the whole range: the mean of 2005 uniform numbers is this close.
        assert abs(found.mean() / n - 0.5) < 5 * 12**-0.5 / 2005**0.5

    def test_one_by_one_agrees_with_many(self):
        permutation = Permutation(1000, 5, 9, SAMPLES)
        found = permutation.many(np.arange(1000))
        assert [permutation[i] for i in range(1000)] == found.tolist() == list(permutation)
        assert [permutation.inverse(int(i)) for i in found] == list(range(1000))

    @pytest.mark.parametrize("threads", [1, 2, 3, 7])
    def test_any_number_of_threads(self, threads):
        expected = elements(100_003, threads=1)
        assert (elements(100_003, threads=threads) == expected).all()
        inverse = Permutation(100_003, 1, 2, 0).many_inverse(expected, threads=threads)
        assert (inverse == np.arange(100_003)).all()


class TestKeys:
    def test_the_same_on_every_machine(self):
        """A change of these numbers changes every training that is resumed."""
        assert elements(10).tolist() == PINNED_10
        assert Permutation(2**40, 1, 2, 0)[12345] == PINNED_40

    def test_every_argument_counts(self):
        base = (1000, 1, 2, 0)
        for k in range(4):
            other = list(base)
            other[k] += 1
            positions = np.arange(1000)
            found = [Permutation(*key).many(positions) for key in (base, other)]
            agree = (found[0] == found[1]).sum()
            # One fixed place on average between unrelated permutations.
            assert agree < 10, (k, agree)

    def test_pickle(self):
        permutation = Permutation(12345, -4, 6, SAMPLES)
        copy = pickle.loads(pickle.dumps(permutation))
        assert (copy.many(np.arange(12345)) == permutation.many(np.arange(12345))).all()
        assert repr(copy) == "Permutation(n=12345, seed=-4, epoch=6, stream=1)"


class TestMixing:
    @pytest.mark.parametrize("n", [2, 3, 4, 5])
    def test_small_permutations_are_equally_frequent(self, n):
        """Every order comes up, as often as any other: chi-square over 12,000 keys."""
        runs = 12_000
        orders = [tuple(elements(n, seed=s, threads=1)) for s in range(runs)]
        _, counts = np.unique(orders, axis=0, return_counts=True)
        kinds = int(np.prod(np.arange(1, n + 1)))
        assert len(counts) == kinds
        chi_square = ((counts - runs / kinds) ** 2 / (runs / kinds)).sum()
        assert chi_square < (kinds - 1) + 5 * (2 * (kinds - 1)) ** 0.5 + 5

    @pytest.mark.parametrize("n", [4096, 5000, 65536, 70_000])
    def test_positions_are_uniform(self, n):
        """Where a run of contiguous positions lands: chi-square over 64 parts of the range."""
        for seed in range(5):
            found = elements(n, seed=seed)[: n // 8]
            counts = np.bincount(found * 64 // n, minlength=64)
            mean = np.bincount(np.arange(n) * 64 // n) / 8
            chi_square = ((counts - mean) ** 2 / mean).sum() / (1 - 1 / 8)
            assert 20 < chi_square < 130, (seed, chi_square)

    @pytest.mark.parametrize("n", [1024, 1500, 100_000])
    @pytest.mark.parametrize("lag", [1, 2, 16])
    def test_neighbours_are_uncorrelated(self, n, lag):
        correlations = []
        for seed in range(40):
            found = elements(n, seed=seed)
            correlations.append(np.corrcoef(found[:-lag], found[lag:])[0, 1])
        # Of a random permutation: mean -1/n, deviation 1/sqrt(n).
        z = np.array(correlations) * n**0.5
        assert abs(z.mean()) < 4 / 40**0.5 + n**-0.5
        assert 0.6 < z.std() < 1.5

    @pytest.mark.parametrize("n", [1024, 1500, 100_000])
    def test_differences_are_spread(self, n):
        """Steps between neighbours are those of a random order: few are equal."""
        steps = np.diff(elements(n)) % n
        _, counts = np.unique(steps, return_counts=True)
        # Poisson with mean about 1: 12 or more has a probability below 1e-9 per step.
        assert counts.max() < 12
        assert abs((counts == 1).sum() / n - np.exp(-1)) < 5 * (0.24 / n) ** 0.5

    def test_epochs_are_unrelated(self):
        a, b = (elements(10_000, epoch=epoch) for epoch in (0, 1))
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


class TestErrors:
    @pytest.mark.parametrize("index", [-1, 10, 2**40])
    def test_index_out_of_range(self, index):
        permutation = Permutation(10, 0, 0, 0)
        for call in (permutation.__getitem__, permutation.inverse):
            with pytest.raises(IndexError, match=rf"index: {index} is not in \[0, 10\)"):
                call(index)
        for many in (permutation.many, permutation.many_inverse):
            with pytest.raises(ValueError, match=rf"indices\[1\]: {index} is not in \[0, 10\)"):
                many(np.array([3, index, index], dtype=np.int64))

    def test_empty_has_no_elements(self):
        with pytest.raises(IndexError):
            Permutation(0, 0, 0, 0)[0]

    @settings(max_examples=20, deadline=None)
    @given(st.sampled_from([1, 2, 3, 7]))
    def test_the_first_bad_index_is_named(self, threads):
        indices = np.arange(200_000)
        indices[[90_001, 90_002, 150_000]] = -5
        with pytest.raises(ValueError, match=r"indices\[90001\]: -5"):
            Permutation(200_000, 0, 0, 0).many(indices, threads=threads)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((-1, 0, 0, 0), "n: expected at least 0, found -1"),
            ((2**62 + 1, 0, 0, 0), "n: expected at most"),
            ((5, 2**63, 0, 0), "seed: .* does not fit"),
            ((5, 0, 1.5, 0), "epoch: expected an integer, found float"),
            ((5, 0, 0, -1), "stream: expected at least 0"),
            ((5, 0, 0, 2**32), "stream: expected at most"),
        ],
    )
    def test_malformed_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Permutation(*arguments)

    def test_indices_must_be_int64(self):
        with pytest.raises(ValueError, match="indices: .*int64"):
            Permutation(5, 0, 0, 0).many(np.arange(5, dtype=np.int32))
