"""The finite-difference estimator against per-sample gradients of a small network.

A group of one gloo rank stands for all ranks; sums over several are imitated. What these tests do
not exercise: pipeline stages without losses beside ones with them, and a language model's bf16
forward pass, where the rounding of the activations is as large as that of the weights.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.core import collectives  # noqa: E402
from megatron_dwm.meta_gradient import finite_difference  # noqa: E402
from megatron_dwm.step.influence_passes import InfluencePasses  # noqa: E402

SAMPLES = 10
CPU = torch.device("cpu")
RESOLUTION = finite_difference.RESOLUTION[torch.bfloat16]


@pytest.fixture(scope="module")
def group():
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


SHAPE = SimpleNamespace(device=torch.device("cpu"))


class Problem:
    """A network with v in `main_grad`, samples, and the truth `<v, g_i>` by autograd.

    With `power=5`, v has heavy tails like that of a language model.
    """

    def __init__(self, dtype=torch.float32, seed=0, power=1):
        torch.manual_seed(seed)
        self.dtype = dtype
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
        ).to(dtype)
        self.x = torch.randn(SAMPLES, 8)
        self.y = torch.randint(0, 5, (SAMPLES,))
        self.parameters = list(self.model.parameters())
        self.theta = [p.detach().clone() for p in self.parameters]
        for p in self.parameters:
            p.main_grad = torch.randn(p.shape).pow(power) * 1e-3
        self.v = [p.main_grad.clone() for p in self.parameters]

    def losses(self, model):
        output = model(self.x.to(next(model.parameters()).dtype))
        return torch.nn.functional.cross_entropy(output.float(), self.y, reduction="none")

    def measure(self):
        return self.losses(self.model)

    def truth(self):
        """In float32 at the (unrounded) theta, whatever the model's own precision."""
        model = copy.deepcopy(self.model).float()
        found = []
        for loss in self.losses(model):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            found.append(sum((g * v).sum() for g, v in zip(grads, self.v, strict=True)))
        return torch.stack(found)

    def estimate(self, group, relative_step=None, **options):
        return finite_difference.estimate(
            self.parameters,
            self.theta,
            self.measure,
            group,
            CPU,
            self.dtype,
            relative_step,
            **options,
        )

    def values(self, group, relative_step=None):
        return self.estimate(group, relative_step).values

    def scale(self, group):
        """|theta| / |v|."""
        theta, v = finite_difference.norms(self.parameters, self.theta, group, CPU)
        return theta / v

    def chosen(self, group):
        return finite_difference.choose_step(
            self.parameters, self.theta, self.scale(group), group, CPU, self.dtype
        )


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class TestEstimate:
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_per_sample_dot_products_in_float32(self, group, seed):
        problem = Problem(seed=seed)
        expected = problem.truth()
        found = problem.values(group, 3e-4)
        assert found.shape == (SAMPLES,) and found.dtype == torch.float32
        assert relative_error(found, expected) <= 1e-2

    def test_error_falls_with_the_square_of_the_step(self, group):
        """Central, not one-sided: at large steps ten times smaller is a hundred times better."""
        problem = Problem()
        expected = problem.truth()
        errors = [relative_error(problem.values(group, step), expected) for step in (0.3, 0.03)]
        assert errors[0] / errors[1] > 30

    def test_estimate_is_of_the_right_sample_and_sign(self, group):
        """Negative control of the tolerance: permuted or negated samples are far off."""
        problem = Problem()
        expected, found = problem.truth(), problem.values(group, 3e-4)
        assert relative_error(found.roll(1), expected) > 0.5
        assert relative_error(-found, expected) > 0.5

    def test_scales_with_v_and_not_with_the_step(self, group):
        """eps follows |v|, so a v ten thousand times longer must give ten thousand times c."""
        problem = Problem()
        small = problem.values(group, 3e-4)
        for p in problem.parameters:
            p.main_grad.mul_(1e4)
        assert relative_error(problem.values(group, 3e-4), small * 1e4) <= 1e-2

    def test_bfloat16_parameters_see_a_step_of_their_own_precision(self, group):
        """With the step that is chosen for them the direction survives the rounding."""
        problem = Problem(dtype=torch.bfloat16)
        expected = problem.truth()
        found = problem.values(group)
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
        assert cosine > 0.9
        # A step far below half an ulp of most weights drowns.
        drowned = problem.values(group, 3e-5)
        assert relative_error(drowned, expected) > 2 * relative_error(found, expected)

    def test_v_zero_gives_zeros(self, group):
        """A learning rate of 0 (its warm-up begins there): no influence, and no 0 / 0."""
        problem = Problem()
        for p in problem.parameters:
            p.main_grad.zero_()
        assert torch.equal(problem.values(group, 3e-4), torch.zeros(SAMPLES))
        assert all(map(torch.equal, problem.parameters, problem.theta))

    @pytest.mark.parametrize("v", [0.0, 1.0])
    def test_ranks_without_losses_run_along_and_get_none(self, group, v):
        """They take part in the pipeline's passes, as many as the last stage does."""
        problem, calls = Problem(), []
        for p in problem.parameters:
            p.main_grad.mul_(v)
        problem.measure = lambda: calls.append(1)
        assert problem.values(group, 3e-4) is None
        assert len(calls) == (2 if v else 1)

    def test_starts_from_theta_wherever_the_parameters_are(self, group):
        """On entry the model holds theta+, the parameters after the step."""
        problem = Problem()
        expected = problem.values(group, 3e-4)
        for p in problem.parameters:
            p.data.add_(5.0)
        assert torch.equal(problem.values(group, 3e-4), expected)

    def test_v_is_left_alone(self, group):
        problem = Problem()
        problem.estimate(group, check_linearity=True)
        assert all(map(torch.equal, (p.main_grad for p in problem.parameters), problem.v))

    def test_builds_no_graph(self, group):
        """Two forward-only passes: what makes it cost 2 F."""
        problem, seen = Problem(), []

        def measure():
            seen.append(problem.losses(problem.model).requires_grad)
            return torch.ones(SAMPLES)

        problem.measure = measure
        problem.values(group, 3e-4)
        assert seen == [False, False]


class TestRounding:
    """What bf16 weights make of the step. On them, `|2 eps v| / |error|` is checked by hand."""

    def moves(self, problem, group, step):
        """The parameters that each forward pass saw, flat, and the result."""
        seen = []

        def measure():
            seen.append(torch.cat([p.detach().double().reshape(-1) for p in problem.parameters]))
            return torch.zeros(SAMPLES)

        problem.measure = measure
        return seen, problem.estimate(group, step)

    @pytest.mark.parametrize("step", [3e-4, 2e-3, 2e-2])
    def test_signal_to_noise_is_that_of_the_parameters_that_were_seen(self, group, step):
        problem = Problem(dtype=torch.bfloat16)
        seen, result = self.moves(problem, group, step)
        wanted = torch.cat([v.double().reshape(-1) for v in problem.v])
        wanted = 2 * step * problem.scale(group) * wanted
        noise = seen[0] - seen[1] - wanted
        assert result.quality["fd_relative_step"] == step
        assert result.quality["fd_signal_to_noise"] == pytest.approx(
            (wanted.norm() / noise.norm()).item(), rel=1e-3
        )

    def test_it_falls_when_the_step_is_too_small(self, group):
        """Negative control: a step below half an ulp moves next to nothing, and it shows."""
        ratios = [
            Problem(dtype=torch.bfloat16).estimate(group, step).quality["fd_signal_to_noise"]
            for step in (1e-2, 1e-3, 1e-4, 1e-5)
        ]
        assert ratios == sorted(ratios, reverse=True)
        assert ratios[0] > RESOLUTION
        assert ratios[3] < 1.5

    def test_float32_has_a_thousand_times_as_much(self, group):
        assert Problem().estimate(group).quality["fd_signal_to_noise"] > 1000

    def test_the_first_moves_rounding_is_no_part_of_the_difference(self, group):
        """Twice the signal-to-noise of rounding theta + eps v and theta - eps v each."""
        problem, step = Problem(dtype=torch.bfloat16), 4e-3
        ours = problem.estimate(group, step).quality["fd_signal_to_noise"]
        eps = step * problem.scale(group)
        signal = noise = 0.0
        for theta, v in zip(problem.theta, problem.v, strict=True):
            above = (theta.float() + eps * v).bfloat16().float()
            below = (theta.float() - eps * v).bfloat16().float()
            signal += (2 * eps * v).square().sum().item()
            noise += (above - below - 2 * eps * v).square().sum().item()
        assert ours > 1.5 * math.sqrt(signal / noise)

    def test_ranks_sum_their_noise_and_signal(self, group, monkeypatch):
        """Nine equal ranks: both norms are three times as large, and the ratio is the same."""
        alone = Problem(dtype=torch.bfloat16).estimate(group)
        monkeypatch.setattr(collectives, "sum_of_shards", lambda value, group: value * 9)
        assert Problem(dtype=torch.bfloat16).estimate(group).quality == pytest.approx(alone.quality)


class TestChooseStep:
    STEPS = finite_difference.RELATIVE_STEPS

    def test_float32_takes_about_the_least(self, group):
        assert Problem().chosen(group) in self.STEPS[:2]
        assert self.STEPS[0] == 3e-4

    def resolution(self, problem, group, step):
        """Sums of absolute values, of the parameters that the forward passes really saw."""
        seen = []

        def measure():
            seen.append(torch.cat([p.detach().double().reshape(-1) for p in problem.parameters]))

        problem.measure = measure
        problem.estimate(group, step)
        wanted = torch.cat([v.double().reshape(-1) for v in problem.v])
        wanted = 2 * step * problem.scale(group) * wanted
        return (wanted.abs().sum() / (seen[0] - seen[1] - wanted).abs().sum()).item()

    @pytest.mark.parametrize("power", [1, 5])
    @pytest.mark.parametrize("seed", range(3))
    def test_bfloat16_takes_the_least_that_its_rounding_allows(self, group, seed, power):
        """What the passes saw agrees: resolved at this step, and not at the one before."""
        problem = Problem(dtype=torch.bfloat16, seed=seed, power=power)
        chosen = problem.chosen(group)
        assert self.STEPS[0] < chosen < self.STEPS[-1]
        before = self.STEPS[self.STEPS.index(chosen) - 1]
        found = [self.resolution(problem, group, step) for step in (before, chosen)]
        assert found[0] < RESOLUTION <= found[1]

    def test_a_few_large_elements_do_not_hide_that_the_others_drown(self, group):
        """Their signal-to-noise ratio alone would be content with the least step."""
        problem = Problem(dtype=torch.bfloat16)
        before = problem.chosen(group)
        problem.parameters[0].main_grad[0, :4] *= 100.0
        problem.v = [p.main_grad.clone() for p in problem.parameters]
        chosen = problem.chosen(group)
        assert chosen > before
        assert problem.estimate(group, before).quality["fd_signal_to_noise"] > 8.0
        assert self.resolution(problem, group, before) < RESOLUTION

    def test_half_precision_has_three_bits_more_and_takes_a_smaller_step(self, group):
        half, brain = (Problem(dtype=t).chosen(group) for t in (torch.float16, torch.bfloat16))
        assert half < brain

    def test_takes_the_largest_where_none_is_enough(self, group, monkeypatch):
        monkeypatch.setitem(finite_difference.RESOLUTION, torch.bfloat16, 1e9)
        assert Problem(dtype=torch.bfloat16).chosen(group) == self.STEPS[-1]

    def test_depends_on_theta_and_v_only(self, group):
        """So a resumed run chooses alike: no state, and not where the parameters are now."""
        problem = Problem(dtype=torch.bfloat16)
        first = problem.chosen(group)
        problem.estimate(group, 0.1)
        assert problem.chosen(group) == first == Problem(dtype=torch.bfloat16).chosen(group)

    def test_a_sample_of_the_elements_decides_as_all_do(self, group, monkeypatch):
        """With each part in proportion: a wide matrix is not outvoted by small vectors."""
        torch.manual_seed(0)
        problem = Problem()
        problem.dtype = torch.bfloat16
        shapes = [(384, 512), (512,), (64, 64)]
        problem.theta = [(torch.randn(s) * 0.02).bfloat16() for s in shapes]
        problem.theta[1] += 1.0  # a norm's weight
        problem.parameters = [torch.nn.Parameter(t.clone()) for t in problem.theta]
        for p in problem.parameters:
            p.main_grad = torch.randn(p.shape)
        sampled = problem.chosen(group)
        monkeypatch.setattr(finite_difference, "SAMPLED_ELEMENTS", 10**9)
        assert problem.chosen(group) == sampled

    def test_the_sample_is_not_of_a_few_columns(self):
        for numel in (2**20, 4096 * 4096, 3 * 2**22):
            assert (numel // finite_difference.SAMPLED_ELEMENTS | 1) % 2 == 1

    def test_scales_with_v(self, group):
        problem = Problem(dtype=torch.bfloat16)
        chosen = problem.chosen(group)
        for p in problem.parameters:
            p.main_grad.mul_(2.0**-20)
        assert problem.chosen(group) == chosen


class TestLinearity:
    def test_the_check_does_not_change_the_values(self, group):
        plain, checked = Problem(), Problem()
        values = plain.estimate(group).values
        found = checked.estimate(group, check_linearity=True)
        assert torch.equal(found.values, values)
        assert "fd_linearity_error" in found.quality
        assert "fd_linearity_error" not in plain.estimate(group).quality

    def test_costs_two_more_forward_passes(self, group):
        problem, calls = Problem(), []
        problem.measure = lambda: calls.append(1)
        problem.estimate(group, check_linearity=True)
        assert len(calls) == 4

    def test_is_three_times_the_error_where_curvature_makes_it(self, group):
        """c(eps) = c + k eps^2, so c(2 eps) - c(eps) = 3 k eps^2."""
        problem = Problem()
        expected = problem.truth()
        found = problem.estimate(group, 0.03, check_linearity=True)
        error = relative_error(found.values, expected)
        assert found.quality["fd_linearity_error"] == pytest.approx(3 * error, rel=0.1)

    def test_a_nonlinear_loss_raises_it(self, group):
        """Negative control: quadratic losses have exact central differences, quintic ones not."""
        errors = {}
        for power in (1, 2, 5):
            problem = Problem()

            def measure(problem=problem, power=power):
                values = torch.cat([p.detach().double().reshape(-1) for p in problem.parameters])
                return (values[:SAMPLES] * 3).pow(power)

            problem.measure = measure
            found = problem.estimate(group, 0.5, check_linearity=True)
            errors[power] = found.quality["fd_linearity_error"]
        assert max(errors[1], errors[2]) < 1e-3
        assert errors[5] > finite_difference.LINEARITY_LIMIT

    def test_a_step_that_drowns_raises_it(self, group):
        """Negative control: rounding is seen too, not only curvature."""
        problem = Problem(dtype=torch.bfloat16)
        good = problem.estimate(group, check_linearity=True).quality["fd_linearity_error"]
        bad = problem.estimate(group, 3e-4, check_linearity=True).quality["fd_linearity_error"]
        assert bad > 3 * good and bad > finite_difference.LINEARITY_LIMIT

    def test_is_over_the_global_batch_and_ranks_without_losses_get_it(self, group, monkeypatch):
        """They add nothing and hear the sum, here of a last stage that found 3 and 5 squared."""
        problem = Problem()
        problem.measure = lambda: None
        real, sums = collectives.sum_of_shards, []

        def summed(value, group):
            sums.append(value)
            last = value.tolist() == [0.0, 0.0]
            return torch.tensor([9.0, 25.0], dtype=torch.float64) if last else real(value, group)

        monkeypatch.setattr(collectives, "sum_of_shards", summed)
        found = problem.estimate(group, 1e-3, check_linearity=True)
        assert found.values is None
        assert found.quality["fd_linearity_error"] == pytest.approx(3 / 5)

    def test_is_infinite_where_nothing_moved_the_losses(self, group):
        problem = Problem()
        problem.measure = lambda: torch.ones(SAMPLES)
        found = problem.estimate(group, check_linearity=True)
        assert found.quality["fd_linearity_error"] == math.inf


class TestWhenLinearityIsChecked:
    def checked(self, first_position=0, steps=250, batch_size=48):
        """Numbers of the meta steps that check, of a run that begins at a meta set position."""
        data = SimpleNamespace(consumed_samples=first_position, batch_size=batch_size)
        step = InfluencePasses(DWMConfig(), SimpleNamespace(meta_data=data, shape=SHAPE))
        found = []
        for _ in range(steps):
            data.consumed_samples += batch_size  # pass C
            if step._linearity_is_due():
                found.append(data.consumed_samples // batch_size)
        return found

    def test_at_the_first_meta_step_and_every_hundred(self):
        assert self.checked() == [1, 101, 201]

    def test_a_resumed_run_goes_on_counting(self):
        assert self.checked(first_position=150 * 48, steps=100) == [201]


class TestNorms:
    def test_are_those_of_the_whole_model(self, group):
        problem = Problem()
        flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])  # noqa: E731
        expected = flat(problem.theta).norm().item(), flat(problem.v).norm().item()
        found = finite_difference.norms(problem.parameters, problem.theta, group, CPU)
        assert found == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("of", ["v", "theta"])
    def test_what_is_not_finite_gives_an_influence_that_is_not(self, group, of, bad):
        """So that the meta step is skipped; and no figures of quality."""
        problem = Problem()
        broken = problem.theta[0] if of == "theta" else problem.parameters[0].main_grad
        broken.view(-1)[0] = bad
        found = problem.estimate(group)
        assert found.values.isnan().all() and found.quality == {}

    def test_a_rank_without_parameters_takes_part(self, group):
        """A pipeline stage may hold no trainable parameter; the sums need it all the same."""
        assert finite_difference.norms([], [], group, CPU) == (0.0, 0.0)
        assert (
            finite_difference.choose_step([], [], 1.0, group, CPU, torch.float32)
            in finite_difference.RELATIVE_STEPS
        )
