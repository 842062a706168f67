"""Scores to weights: `w = N softmax(s / tau)`, its gradient, the control and the statistics."""

import math

import pytest
import torch

from megatron_dwm.policies.guarding import Guards
from megatron_dwm.policies.softmax import (
    batch_weights,
    score_gradient,
    shuffled,
    weight_statistics,
    weights_from_scores,
)

ALL_GUARDS = Guards(min_effective_samples=0.6, uniform_mix=0.1, max_weight=2.0)


def random_scores(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


class TestWeightsFromScores:
    @pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
    def test_mean_is_one_and_none_is_negative(self, temperature):
        """Mean 1 is what keeps the size of the LLM's gradient that of stock training."""
        weights = weights_from_scores(random_scores(64), temperature)
        assert weights.mean().item() == pytest.approx(1.0, abs=1e-6)
        assert (weights >= 0).all()

    @pytest.mark.parametrize("score", [0.0, -3.5, 1e4])
    def test_equal_scores_give_exactly_one_for_a_power_of_two(self, score):
        """Exact, not approximate: a DWM whose head is zero must not change the training."""
        assert torch.equal(weights_from_scores(torch.full((32,), score), 1.0), torch.ones(32))

    def test_ratio_of_two_weights_is_exp_of_the_score_difference_over_tau(self):
        scores = torch.tensor([0.3, 1.1, -2.0])
        for temperature in (0.5, 1.0, 4.0):
            weights = weights_from_scores(scores, temperature)
            expected = math.exp((1.1 - 0.3) / temperature)
            assert (weights[1] / weights[0]).item() == pytest.approx(expected, rel=1e-5)

    def test_large_scores_do_not_overflow(self):
        weights = weights_from_scores(torch.tensor([1e6, 1e6, -1e6, 1e6]), 1.0)
        assert torch.allclose(weights, torch.tensor([4 / 3, 4 / 3, 0.0, 4 / 3]))

    def test_bfloat16_scores_give_float32_weights(self):
        assert weights_from_scores(random_scores(8).bfloat16(), 1.0).dtype == torch.float32


class TestBatchWeights:
    @pytest.mark.parametrize("guards", [Guards(), ALL_GUARDS])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_bad_scores_give_uniform_weights_and_are_marked(self, bad, guards):
        """-inf too, of which softmax alone would make a weight of 0 and never say so."""
        scores = random_scores(8)
        assert not batch_weights(scores, 1.0, guards).bad
        scores[5] = bad
        found = batch_weights(scores, 1.0, guards)
        assert found.bad and torch.equal(found.weights, torch.ones(8))

    def test_finite_scores_whose_weights_are_not_are_bad(self):
        """A score over a small temperature leaves the range of float32."""
        scores = torch.tensor([3e38, -3e38])
        assert not torch.isfinite(weights_from_scores(scores, 0.1)).all()
        found = batch_weights(scores, 0.1)
        assert found.bad and torch.equal(found.weights, torch.ones(2))

    def test_good_scores_give_the_weights_bit_for_bit(self):
        scores = random_scores(64)
        found = batch_weights(scores, 0.7)
        assert torch.equal(found.weights, weights_from_scores(scores, 0.7)) and not found.bad
        assert torch.equal(found.scores, scores)


class TestScoreGradient:
    @staticmethod
    def by_autograd(scores, influence, temperature):
        """`d/ds sum_i c_i w_i(s)` by torch, in float64, with c held fixed."""
        s = scores.double().requires_grad_()
        weights = s.numel() * torch.softmax(s / temperature, dim=0)
        (influence.double() * weights).sum().backward()
        return s.grad

    @pytest.mark.parametrize("count", [1, 2, 17, 256])
    @pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
    def test_equals_autograd_of_the_meta_objective(self, count, temperature):
        scores, influence = random_scores(count, 1), random_scores(count, 2)
        found = score_gradient(scores, influence, temperature).double()
        expected = self.by_autograd(scores, influence, temperature)
        # Relative to the uncentred terms: the centring cancels part of them in float32.
        tolerance = 1e-6 * count * influence.abs().max().item() / temperature
        assert torch.allclose(found, expected, rtol=1e-5, atol=tolerance)

    def test_comparison_tells_a_wrong_formula_apart(self):
        """Negative control: without the centring by the weighted mean it is another vector."""
        scores, influence = random_scores(17, 1), random_scores(17, 2) + 1.0
        wrong = weights_from_scores(scores, 1.0) * influence
        assert not torch.allclose(wrong.double(), self.by_autograd(scores, influence, 1.0), 0.05)

    def test_sums_to_zero(self):
        """The weights have a fixed sum, so moving all scores together changes nothing."""
        gradient = score_gradient(random_scores(64, 3), random_scores(64, 4), 0.7)
        assert abs(gradient.sum().item()) < 1e-4

    def test_a_step_along_the_negative_gradient_moves_weight_to_helpful_samples(self):
        """c < 0 means that more weight lowers the meta loss, so the weight must grow."""
        influence = torch.tensor([-1.0, 0.0, 0.5, 0.5])
        scores = torch.zeros(4)
        after = weights_from_scores(scores - score_gradient(scores, influence, 1.0), 1.0)
        assert after[0] > 1.0 > after[2]


class TestShuffled:
    def test_same_histogram_in_another_order(self):
        weights = weights_from_scores(random_scores(64), 1.0)
        found = shuffled(weights, 1234, 7)
        assert torch.equal(found.sort().values, weights.sort().values)
        assert not torch.equal(found, weights)

    def test_same_seed_and_iteration_give_the_same_order_whatever_the_global_generator(self):
        """Every last-stage rank draws for itself, so the order may depend on nothing else."""
        weights = torch.arange(64.0)
        torch.manual_seed(0)
        first = shuffled(weights, 1234, 7)
        torch.manual_seed(99)
        assert torch.equal(first, shuffled(weights, 1234, 7))

    def test_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        shuffled(torch.arange(64.0), 1234, 7)
        assert torch.equal(before, torch.get_rng_state())

    def test_orders_differ_by_iteration_and_by_seed(self):
        weights = torch.arange(64.0)
        orders = [shuffled(weights, s, i) for s, i in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))]
        assert len({tuple(order.tolist()) for order in orders}) == len(orders)


class TestWeightStatistics:
    @pytest.mark.parametrize("count", [1, 2, 64])
    def test_uniform_weights_are_one_in_every_respect(self, count):
        assert weight_statistics(torch.ones(count)) == pytest.approx(
            {"entropy": 1.0, "effective_sample_size": 1.0, "max_weight": 1.0, "min_weight": 1.0}
        )

    def test_one_hot_weights_have_no_entropy_and_an_effective_size_of_one_sample(self):
        weights = torch.zeros(16)
        weights[3] = 16.0
        assert weight_statistics(weights) == pytest.approx(
            {"entropy": 0.0, "effective_sample_size": 1 / 16, "max_weight": 16, "min_weight": 0}
        )

    def test_half_of_the_samples(self):
        """Weight 2 on half of them: half the effective size, entropy log(N/2) / log N."""
        found = weight_statistics(torch.tensor([2.0, 0.0] * 8))
        assert found["effective_sample_size"] == pytest.approx(0.5)
        assert found["entropy"] == pytest.approx(math.log(8) / math.log(16))
