"""Guards against collapsed weights: what they promise, and their derivative.

Every derivative is compared with central differences in float64 of the weights themselves. The cap
has a kink where a weight reaches it; the cases keep away from it, and one test shows the kink.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_dwm.policies.guarding import Guards, guarded_weights
from megatron_dwm.policies.softmax import batch_weights, score_gradient, weights_from_scores

FLOOR, MIX, CAP = 0.4, 0.15, 1.9
ALONE_AND_TOGETHER = [
    Guards(*(value if on else off for on, (value, off) in zip(chosen, pairs, strict=True)))
    for pairs in [((FLOOR, None), (MIX, 0.0), (CAP, None))]
    for chosen in itertools.product((False, True), repeat=3)
    if any(chosen)
]
NAMES = ["-".join(n for n, v in vars(g).items() if v) for g in ALONE_AND_TOGETHER]
each_guard = pytest.mark.parametrize("guards", ALONE_AND_TOGETHER, ids=NAMES)


def peaked(count: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Returns scores `[count]` whose plain weights lie mostly on a few samples."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, generator=generator, dtype=torch.float64)


def effective(weights: torch.Tensor) -> float:
    """Returns `(sum w)^2 / (N sum w^2)`."""
    return (weights.sum() ** 2 / (weights**2).sum() / weights.numel()).item()


def plain(scores: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return scores.numel() * torch.softmax(scores / temperature, dim=0)


def differences(scores, influence, temperature, guards, step=1e-5):
    """Returns `d/ds sum_i c_i w_i(s)` by central differences."""
    found = torch.zeros_like(scores)
    for i in range(scores.numel()):
        ends = []
        for sign in (1.0, -1.0):
            moved = scores.clone()
            moved[i] += sign * step
            ends.append((guarded_weights(moved, temperature, guards).weights * influence).sum())
        found[i] = (ends[0] - ends[1]) / (2 * step)
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


class TestDerivative:
    @each_guard
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("count", [5, 48])
    def test_is_that_of_the_guarded_weights(self, guards, temperature, count):
        scores = peaked(count, seed=count) * temperature
        influence = peaked(count, seed=99, spread=1.0) + 0.5
        found = score_gradient(scores, influence, temperature, guards)
        expected = differences(scores, influence, temperature, guards)
        assert distance(found, expected) < 1e-8

    @each_guard
    def test_comparison_tells_a_derivative_apart_that_ignores_a_guard(self, guards):
        """Negative control: leave out any one guard, and it is another vector."""
        scores, influence = peaked(48, seed=48), peaked(48, seed=99, spread=1.0)
        expected = differences(scores, influence, 1.0, guards)
        for name, off in vars(Guards()).items():
            if getattr(guards, name) != off:
                fewer = Guards(**{**vars(guards), name: off})
                assert distance(score_gradient(scores, influence, 1.0, fewer), expected) > 0.01

    def test_comparison_tells_a_fixed_temperature_apart(self):
        """Negative control: the raised temperature taken for a constant."""
        scores, influence = peaked(48, seed=48), peaked(48, seed=99, spread=1.0)
        guards = Guards(min_effective_samples=FLOOR)
        raised = guarded_weights(scores, 1.0, guards).temperature.item()
        wrong = score_gradient(scores, influence, raised)
        assert distance(wrong, differences(scores, influence, 1.0, guards)) > 0.05

    @pytest.mark.parametrize("guards", [g for g in ALONE_AND_TOGETHER if not g.uniform_mix])
    def test_where_no_guard_acts_it_is_the_plain_one(self, guards):
        """Mixing with uniform weights always acts."""
        scores, influence = peaked(48, spread=0.1), peaked(48, seed=3, spread=1.0)
        expected = score_gradient(scores, influence, 1.0)
        assert distance(score_gradient(scores, influence, 1.0, guards), expected.double()) < 1e-6

    @each_guard
    def test_equal_scores_have_a_finite_one(self, guards):
        """No spread at all: nothing may be divided by it."""
        gradient = score_gradient(torch.zeros(8), peaked(8).float(), 1.0, guards)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


class TestPromises:
    @each_guard
    @pytest.mark.parametrize("spread", [0.3, 2.0, 30.0, 1e4])
    @pytest.mark.parametrize("count", [1, 2, 7, 256])
    def test_mean_one_order_kept_and_each_bound_holds(self, guards, spread, count):
        scores = peaked(count, seed=count, spread=spread)
        weights = guarded_weights(scores, 0.7, guards).weights
        assert torch.isfinite(weights).all() and (weights >= 0).all()
        assert weights.mean().item() == pytest.approx(1.0, abs=1e-12)
        assert (weights[scores.argsort()].diff() >= -1e-12).all()
        if guards.min_effective_samples:
            assert effective(weights) >= FLOOR - 1e-9
        if guards.uniform_mix:
            assert weights.min() >= MIX - 1e-12
        if guards.max_weight:
            assert weights.max() <= CAP + 1e-12

    def test_plain_weights_break_every_bound(self):
        """Negative control: the scores above are ones that need the guards."""
        weights = plain(peaked(256, seed=256, spread=2.0), 0.7)
        assert effective(weights) < FLOOR and weights.min() < MIX and weights.max() > CAP

    @each_guard
    @pytest.mark.parametrize("score", [0.0, -3.5, 1e4])
    def test_equal_scores_give_exactly_one_for_a_power_of_two(self, guards, score):
        scores = torch.full((32,), score)
        assert torch.equal(weights_from_scores(scores, 1.0, guards), torch.ones(32))

    @each_guard
    @pytest.mark.parametrize("ties", [1, 3])
    def test_scores_too_far_apart_for_weights(self, guards, ties):
        """Weights of all but the best underflow; they get their share under a cap all the same."""
        scores = torch.cat([torch.full((ties,), 1e30), torch.linspace(-1e30, 0.0, 16 - ties)])
        found = batch_weights(scores, 1.0, guards)
        assert not found.bad
        assert found.weights.mean().item() == pytest.approx(1.0, abs=1e-6)
        assert found.weights.unique().numel() > 1


class TestFloor:
    def test_raises_the_temperature_no_further_than_needed(self):
        for seed in range(20):
            scores = peaked(64, seed)
            found = guarded_weights(scores, 1.0, Guards(min_effective_samples=FLOOR))
            if effective(plain(scores)) >= FLOOR:
                assert found.temperature.item() == 1.0
                continue
            assert found.temperature.item() > 1.0
            assert effective(found.weights) == pytest.approx(FLOOR, abs=1e-10)
            expected = plain(scores, found.temperature.item())
            assert torch.allclose(found.weights, expected, rtol=1e-12)

    @pytest.mark.parametrize("floor", [1e-3, 0.5, 0.999999])
    @pytest.mark.parametrize("spread", [1e-3, 1.0, 1e6, 1e30])
    def test_is_found_for_any_floor_and_spread(self, floor, spread):
        scores = peaked(512, 5, spread)
        found = guarded_weights(scores, 1.0, Guards(min_effective_samples=floor))
        wanted = max(floor, effective(plain(scores)))
        assert effective(found.weights) == pytest.approx(wanted, abs=1e-9)


class TestMix:
    def test_is_what_it_says(self):
        scores = peaked(48)
        found = guarded_weights(scores, 1.0, Guards(uniform_mix=MIX)).weights
        assert torch.allclose(found, (1 - MIX) * plain(scores) + MIX, rtol=1e-12)


class TestCap:
    @staticmethod
    def by_hand(weights: list[float], cap: float) -> list[float]:
        """Water-filling as one would do it with a pencil: cut, hand on, look again."""
        capped: set[int] = set()
        while True:
            free = [i for i in range(len(weights)) if i not in capped]
            scale = (len(weights) - cap * len(capped)) / sum(weights[i] for i in free)
            over = {i for i in free if weights[i] * scale > cap}
            if not over:
                return [cap if i in capped else w * scale for i, w in enumerate(weights)]
            capped |= over

    @pytest.mark.parametrize("cap", [1.0001, 1.5, 2.0, 5.0, 100.0])
    def test_is_water_filling(self, cap):
        for seed in range(10):
            scores = peaked(33, seed)
            found = guarded_weights(scores, 1.0, Guards(max_weight=cap))
            expected = torch.tensor(self.by_hand(plain(scores).tolist(), cap), dtype=torch.float64)
            assert torch.allclose(found.weights, expected, rtol=1e-10)
            assert found.capped.item() == (expected == cap).sum().item()

    def test_equal_weights_at_the_cap_stay_equal(self):
        scores = torch.tensor([3.0, 3.0, 3.0, 0.0, -1.0, -1.0, -2.0, -2.0], dtype=torch.float64)
        weights = guarded_weights(scores, 1.0, Guards(max_weight=1.5)).weights
        assert weights[:3].tolist() == [1.5] * 3

    def test_has_a_kink_and_no_jump_where_a_weight_reaches_it(self):
        cap = plain(peaked(16)).max().item()
        scores, guards = peaked(16), Guards(max_weight=cap)
        best, gradients, values = scores.argmax(), [], []
        influence = peaked(16, 7, 1.0)
        for step in (-1e-7, 1e-7):
            moved = scores.clone()
            moved[best] += step
            values.append(guarded_weights(moved, 1.0, guards).weights)
            gradients.append(score_gradient(moved, influence, 1.0, guards))
        assert (values[0] - values[1]).abs().max() < 1e-5
        assert distance(gradients[0], gradients[1]) > 0.01
