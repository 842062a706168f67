"""What the head is made of: moments, projection, regression, maps and the gate, each against NumPy.

What these tests do not exercise: process groups (tests/distributed) and the trainer.
"""

import math

import numpy
import pytest
import torch

from megatron_dwm.config import DWMConfig
from megatron_dwm.core.topology import OneProcess
from megatron_dwm.policies import features
from megatron_dwm.policies.features import Moments, Projection, moments_over_positions
from megatron_dwm.policies.gate import LEAST, Gate, correlation
from megatron_dwm.policies.guarding import Guards
from megatron_dwm.policies.head import RunningMoments
from megatron_dwm.policies.learned import WINSOR, Targets
from megatron_dwm.policies.maps import SigmoidMap, SoftmaxMap, build_map
from megatron_dwm.policies.ridge import Ridge

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestMoments:
    @pytest.mark.parametrize("block", [1, 40, 1 << 22])
    def test_masked_moments_are_numpys(self, block, monkeypatch):
        monkeypatch.setattr(features, "_BLOCK", block)
        x = torch.randn(11, 3, 5, generator=generator()) * 2 + 100
        mask = (torch.rand(11, 3, generator=generator(1)) > 0.4).float()
        found = moments_over_positions(x, mask)
        for b in range(3):
            kept = x[mask[:, b] > 0, b].double().numpy()
            numpy.testing.assert_allclose(found.mean[b], kept.mean(0), rtol=1e-6)
            numpy.testing.assert_allclose(found.variance[b], kept.var(0), rtol=1e-5)

    def test_a_sample_without_a_position_has_zeros(self):
        found = moments_over_positions(torch.ones(4, 1, 2), torch.zeros(4, 1))
        assert torch.equal(found.mean, torch.zeros(1, 2))
        assert torch.equal(found.variance, torch.zeros(1, 2))

    @pytest.mark.parametrize("cut", [1, 4, 9])
    def test_parts_merge_to_the_whole(self, cut):
        x = torch.randn(10, 2, 3, generator=generator()) + 7
        mask = torch.rand(10, 2, generator=generator(1))
        parts = [
            moments_over_positions(x[part], mask[part]) for part in (slice(cut), slice(cut, None))
        ]
        packed = torch.stack([torch.cat([p.count, p.mean, p.deviations], 1) for p in parts])
        found = features.merged(parts[0], lambda part: packed)
        whole = moments_over_positions(x, mask)
        for name in ("count", "mean", "deviations"):
            assert torch.allclose(getattr(found, name), getattr(whole, name), rtol=1e-5)

    def test_one_rank_merges_nothing(self):
        parts = Moments(torch.ones(1, 1), torch.ones(1, 2), torch.ones(1, 2))
        assert features.merged(parts, OneProcess().gather_parts_of_context) is parts


class TestProjection:
    def test_few_features_pass(self):
        x = torch.randn(4, 10)
        projection = Projection(10, 12, 2, 0, CPU)
        assert projection.width == 10 and projection(x) is x

    @pytest.mark.parametrize("width", [70, 101, 262])
    def test_inner_products_are_kept_on_average_and_the_last_features_whole(self, width):
        x = torch.randn(2, width, dtype=torch.float64, generator=generator())
        products = []
        for seed in range(400):
            few = Projection(width, 34, 2, seed, CPU)(x)
            assert few.shape == (2, 34) and torch.equal(few[:, -2:], x[:, -2:])
            products.append((few[0, :-2] @ few[1, :-2]).item())
        exact = (x[0, :-2] @ x[1, :-2]).item()
        error = numpy.std(products) / math.sqrt(len(products))
        assert abs(numpy.mean(products) - exact) < 4 * error
        # Every feature counts once: nothing is lost, nothing twice.
        squares = [(Projection(width, 34, 2, s, CPU)(x)[0, :-2] ** 2).sum() for s in range(400)]
        assert abs(numpy.mean(squares) / (x[0, :-2] ** 2).sum().item() - 1) < 0.1

    def test_the_seed_decides(self):
        x = torch.randn(2, 100)
        same = [Projection(100, 20, 2, 5, CPU)(x) for _ in range(2)]
        assert torch.equal(*same)
        assert not torch.equal(same[0], Projection(100, 20, 2, 6, CPU)(x))


class TestRidge:
    def test_weights_are_those_of_the_whole_weighted_least_squares(self):
        """Rows of an older meta step count f times less: NumPy solves all rows at once."""
        f, penalty, k = 0.9, 0.3, 4
        ridge = Ridge(k, f, penalty, CPU)
        rows, targets, counts = [], [], []
        for step in range(5):
            x = torch.randn(7, k, dtype=torch.float64, generator=generator(step))
            z = torch.randn(7, dtype=torch.float64, generator=generator(step + 50))
            ridge.update(x.T @ x, x.T @ z, 7)
            rows.append(x.numpy())
            targets.append(z.numpy())
            counts += [f ** (4 - step)] * 7
        x, z, c = numpy.concatenate(rows), numpy.concatenate(targets), numpy.array(counts)
        gram = (x * c[:, None]).T @ x
        system = gram + (penalty * numpy.trace(gram) / k + 1e-9) * numpy.eye(k)
        expected = numpy.linalg.solve(system, (x * c[:, None]).T @ z)
        numpy.testing.assert_allclose(ridge.w.numpy(), expected, rtol=1e-10)
        # Scores over the remembered rows have variance 1.
        scores = x @ expected * ridge.scale.item()
        assert (scores**2 * c).sum() / c.sum() == pytest.approx(1.0)

    @pytest.mark.parametrize("r", [0.3, 0.7])
    @pytest.mark.parametrize("n", [60, 600])
    def test_penalty_by_itself_is_near_the_best_for_samples_to_come(self, r, n):
        """Of targets that features explain to R^2: against the best of a grid, on new samples."""
        k, errors, best = 40, [], []
        grid = [10**e for e in numpy.arange(-3, 2.1, 0.5)]
        for seed in range(20):
            g = generator(seed)
            beta = torch.randn(k, dtype=torch.float64, generator=g) * r / math.sqrt(k)

            def draw(count, g=g, beta=beta):
                x = torch.randn(count, k, dtype=torch.float64, generator=g)
                noise = torch.randn(count, dtype=torch.float64, generator=g)
                return x, x @ beta + math.sqrt(1 - r * r) * noise

            x, z = draw(n)
            new, truth = draw(2000)
            found = []
            for penalty in [None, *grid]:
                ridge = Ridge(k, 1.0, penalty, CPU)
                ridge.update(x.T @ x, x.T @ z, n, r)
                found.append((new @ ridge.w - truth).square().mean().item())
            errors.append(found[0])
            best.append(found[1:])
        assert numpy.mean(errors) < 1.02 * numpy.mean(best, axis=0).min()

    def test_scores_do_not_grow_where_nothing_is_known(self):
        """Of noise alone, a penalty that is set by what was predicted keeps w small."""
        small, fixed = Ridge(40, 1.0, None, CPU), Ridge(40, 1.0, 0.1, CPU)
        x = torch.randn(64, 40, dtype=torch.float64, generator=generator())
        z = torch.randn(64, dtype=torch.float64, generator=generator(1))
        for ridge in (small, fixed):
            ridge.update(x.T @ x, x.T @ z, 64)
        assert small.w.norm() < 0.2 * fixed.w.norm()


class TestRunningMoments:
    def test_first_batch_is_taken_as_it_is_then_all_count_alike_then_it_forgets(self):
        moments = RunningMoments(2, CPU)
        batches = [
            torch.randn(50, 2, dtype=torch.float64, generator=generator(i)) * 3 + 5
            for i in range(8)
        ]
        for n, batch in enumerate(batches, 1):
            moments.update(moments.sums(batch))
            whole = torch.cat(batches[:n])
            assert torch.allclose(moments.mean, whole.mean(0))
            assert torch.allclose(moments.variance, whole.var(0, unbiased=False))
        for _ in range(200):
            moments.update(moments.sums(batches[0] + 100))
        assert torch.allclose(moments.mean, batches[0].mean(0) + 100, rtol=1e-3)

    def test_samples_that_are_not_finite_are_left_out(self):
        moments = RunningMoments(2, CPU)
        batch = torch.tensor([[1.0, 2.0], [3.0, 6.0], [float("nan"), 0.0]], dtype=torch.float64)
        moments.update(moments.sums(batch))
        assert moments.mean.tolist() == [2.0, 4.0]
        moments.update(moments.sums(batch[2:]))
        assert moments.mean.tolist() == [2.0, 4.0] and float(moments.age) == 1

    def test_a_constant_feature_says_nothing(self):
        moments = RunningMoments(1, CPU)
        moments.update(moments.sums(torch.full((5, 1), 3.0, dtype=torch.float64)))
        assert moments(torch.tensor([[4.0]], dtype=torch.float64)).item() == 0.0


class TestTargets:
    def test_useful_is_positive_standardised_and_cut_off(self):
        c = torch.randn(4000, generator=generator()).double() * 1e-4 + 3
        c[0] = -50.0
        found = Targets()(c)
        assert found[0] == found.max() == WINSOR
        assert abs(found.mean()) < 0.05
        rest = torch.arange(1, 4000)
        assert correlation(found[rest], -c[rest]) > 0.99

    def test_scale_is_a_running_one(self):
        targets = Targets()
        for i in range(30):
            targets(torch.randn(100, generator=generator(i)) * 1e-3)
        quiet = targets(torch.randn(100, generator=generator(99)) * 1e-4)
        assert quiet.std() < 0.3


class TestSigmoidMap:
    def learned(self, guards=None, centred=False, scale=1.0, shift=0.0):
        found = SigmoidMap(4.0, guards or Guards(), centred, CPU)
        for i in range(300):
            scores = torch.randn(256, generator=generator(i)) * scale + shift
            found.update(found.sums(scores))
        return found, torch.randn(4096, generator=generator(999)) * scale + shift

    def test_equal_scores_are_weights_of_one_from_the_start(self):
        mapped = SigmoidMap(4.0, Guards(), False, CPU).weights(torch.zeros(5))
        assert torch.equal(mapped.weights, torch.ones(5)) and not mapped.bad

    @pytest.mark.parametrize("shift", [0.0, -3.0])
    @pytest.mark.parametrize(
        "guards", [Guards(), Guards(max_weight=1.3), Guards(0.8), Guards(0.9, 0.2, 1.2)]
    )
    def test_mean_is_one_and_weights_are_bounded(self, guards, shift):
        found, scores = self.learned(guards, shift=shift)
        weights = found.weights(scores).weights
        assert abs(weights.mean() - 1) < 0.03
        assert weights.max() <= (guards.max_weight or 2.2) + 1e-6
        assert weights.min() >= guards.uniform_mix * 0.9

    def test_floor_holds_the_effective_share(self):
        free, scores = self.learned()
        held, _ = self.learned(Guards(0.9))
        share = lambda w: w.double().sum().item() ** 2 / len(w) / (w.double() ** 2).sum().item()  # noqa: E731
        assert share(free.weights(scores).weights) < 0.75
        assert 0.88 < share(held.weights(scores).weights) < 0.93

    def test_order_of_the_scores_is_kept_and_a_bad_one_is_one(self):
        found, scores = self.learned()
        scores = scores.sort().values
        scores[7] = float("nan")
        mapped = found.weights(scores)
        assert mapped.weights[7] == 1 and mapped.bad
        kept = torch.cat([mapped.weights[:7], mapped.weights[8:]])
        assert (kept.diff() >= 0).all()

    @pytest.mark.parametrize("guards", [Guards(), Guards(0.9, 0.1, 1.5)])
    def test_pull_back_is_the_derivative(self, guards):
        found, scores = self.learned(guards)
        s, c = scores[:6].double(), torch.randn(6, generator=generator(1)).double()
        eps = 1e-6
        gradient = found.pull_back(s, c)

        def loss(x):
            return (found._guarded(found._plain(x)) * c).sum().item()

        for i in range(6):
            up, down = s.clone(), s.clone()
            up[i] += eps
            down[i] -= eps
            assert gradient[i].item() == pytest.approx((loss(up) - loss(down)) / 2 / eps, abs=1e-6)

    def test_a_state_comes_back(self):
        found, scores = self.learned(Guards(max_weight=1.3))
        other = SigmoidMap(4.0, Guards(max_weight=1.3), False, CPU)
        other.load_state_dict(found.state_dict())
        assert torch.equal(found.weights(scores).weights, other.weights(scores).weights)


def test_softmax_map_is_the_softmax_over_the_batch():
    found = SoftmaxMap(0.5, Guards())
    scores = torch.randn(8, generator=generator())
    assert torch.allclose(found.weights(scores).weights, 8 * torch.softmax(scores / 0.5, 0))
    assert found.whole_batch and found.sums(scores).numel() == 0


def test_a_map_is_found_by_its_name():
    config = DWMConfig(form="model", rule="chain", temperature=2.0).with_defaults()
    assert isinstance(build_map(config, False, CPU), SoftmaxMap)
    assert isinstance(build_map(DWMConfig().with_defaults(), True, CPU), SigmoidMap)


class TestGate:
    def evidence(self, r, steps, n=32, seed=0):
        gate = Gate()
        for i in range(steps):
            g = generator(seed * 1000 + i)
            z = torch.randn(n, generator=g)
            s = r * z + math.sqrt(1 - r * r) * torch.randn(n, generator=g)
            gate.observe(s, -z)
        return gate

    @pytest.mark.parametrize("r", [0.6, 0.9])
    def test_opens_where_scores_are_right(self, r):
        assert self.evidence(r, LEAST - 1).opening == 0
        assert self.evidence(r, 20).opening == 1

    @pytest.mark.parametrize("r", [0.0, -0.5])
    def test_stays_closed_where_they_are_not(self, r):
        """Of chance: 40 runs of 60 meta steps, the last opening of each."""
        found = [self.evidence(r, 60, seed=s).opening for s in range(40)]
        assert numpy.mean([x > 0 for x in found]) < 0.1 and max(found) < 0.3

    def test_closes_when_scores_go_wrong(self):
        gate = self.evidence(0.8, 30)
        for i in range(40):
            z = torch.randn(32, generator=generator(i))
            gate.observe(z, z)
        assert gate.opening == 0

    def test_the_standard_error_is_that_of_the_mean(self):
        """Over many runs the running mean scatters as it says."""
        gates = [self.evidence(0.4, 40, seed=s) for s in range(120)]
        scatter = numpy.std([gate.mean for gate in gates])
        said = numpy.mean([gate.standard_error(32) for gate in gates])
        assert 0.75 < said / scatter < 1.35

    def test_says_in_words_when_it_opens_and_closes_and_only_then(self):
        gate = self.evidence(0.0, 5)
        assert gate.words(32) is None
        gate = self.evidence(0.8, 30)
        assert "gate open" in gate.words(32) and gate.words(32) is None
        gate.opening = 0.0
        assert "every weight is 1" in gate.words(32)

    def test_a_constant_score_says_nothing(self):
        gate = Gate()
        gate.observe(torch.ones(8), torch.randn(8))
        assert gate.seen == 0 and gate.opening == 0

    def test_a_state_comes_back(self):
        gate, other = self.evidence(0.5, 10), Gate()
        other.load_state_dict(gate.state_dict())
        for g in (gate, other):
            g.observe(torch.arange(8.0), -torch.arange(8.0))
        assert (gate.mean, gate.opening) == (other.mean, other.opening)
