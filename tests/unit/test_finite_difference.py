"""The finite-difference estimator against per-sample gradients of a small network.

A group of one gloo rank stands for the model-parallel group. What these tests do not exercise:
the reduction of eps over several ranks, pipeline stages without losses beside ones with them.
"""

import copy

import pytest
import torch
import torch.distributed as dist

from megatron_dwm.meta import finite_difference

SAMPLES = 10


@pytest.fixture(scope="module")
def group():
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Problem:
    """A network with v in `main_grad`, samples, and the truth `<v, g_i>` by autograd."""

    def __init__(self, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
        ).to(dtype)
        self.x = torch.randn(SAMPLES, 8)
        self.y = torch.randint(0, 5, (SAMPLES,))
        self.parameters = list(self.model.parameters())
        self.theta = [p.detach().clone() for p in self.parameters]
        for p in self.parameters:
            p.main_grad = torch.randn(p.shape) * 1e-3
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

    def estimate(self, relative_step, group):
        return finite_difference.estimate(
            self.parameters, self.theta, self.measure, relative_step, group
        )


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class TestEstimate:
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_per_sample_dot_products_in_float32(self, group, seed):
        problem = Problem(seed=seed)
        expected = problem.truth()
        found = problem.estimate(3e-4, group)
        assert found.shape == (SAMPLES,) and found.dtype == torch.float32
        assert relative_error(found, expected) <= 1e-2

    def test_error_falls_with_the_square_of_the_step(self, group):
        """Central, not one-sided: at large steps ten times smaller is a hundred times better."""
        problem = Problem()
        expected = problem.truth()
        errors = [relative_error(problem.estimate(step, group), expected) for step in (0.3, 0.03)]
        assert errors[0] / errors[1] > 30

    def test_estimate_is_of_the_right_sample_and_sign(self, group):
        """Negative control of the tolerance: permuted or negated samples are far off."""
        problem = Problem()
        expected, found = problem.truth(), problem.estimate(3e-4, group)
        assert relative_error(found.roll(1), expected) > 0.5
        assert relative_error(-found, expected) > 0.5

    def test_scales_with_v_and_not_with_the_step(self, group):
        """eps follows |v|, so a v ten thousand times longer must give ten thousand times c."""
        problem = Problem()
        small = problem.estimate(3e-4, group)
        for p in problem.parameters:
            p.main_grad.mul_(1e4)
        assert relative_error(problem.estimate(3e-4, group), small * 1e4) <= 1e-2

    def test_bfloat16_parameters_see_a_step_of_their_own_precision(self, group):
        """With the default step of bf16 runs the direction survives the rounding."""
        problem = Problem(dtype=torch.bfloat16)
        expected = problem.truth()
        found = problem.estimate(5e-3, group)
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
        assert cosine > 0.9
        # The float32 step is below half an ulp of most weights: it drowns.
        drowned = problem.estimate(3e-4, group)
        assert relative_error(drowned, expected) > relative_error(found, expected)

    def test_v_zero_gives_zeros(self, group):
        """A learning rate of 0 (its warm-up begins there): no influence, and no 0 / 0."""
        problem = Problem()
        for p in problem.parameters:
            p.main_grad.zero_()
        assert torch.equal(problem.estimate(3e-4, group), torch.zeros(SAMPLES))
        assert all(map(torch.equal, problem.parameters, problem.theta))

    @pytest.mark.parametrize("v", [0.0, 1.0])
    def test_ranks_without_losses_run_along_and_get_none(self, group, v):
        """They take part in the pipeline's passes, as many as the last stage does."""
        problem, calls = Problem(), []
        for p in problem.parameters:
            p.main_grad.mul_(v)
        problem.measure = lambda: calls.append(1)
        assert problem.estimate(3e-4, group) is None
        assert len(calls) == (2 if v else 1)

    def test_starts_from_theta_wherever_the_parameters_are(self, group):
        """On entry the model holds theta+, the parameters after the step."""
        problem = Problem()
        expected = problem.estimate(3e-4, group)
        for p in problem.parameters:
            p.data.add_(5.0)
        assert torch.equal(problem.estimate(3e-4, group), expected)

    def test_parameters_are_left_at_theta_minus_eps_v(self, group):
        problem = Problem()
        eps = finite_difference.step_size(problem.parameters, problem.theta, 3e-4, group)
        problem.estimate(3e-4, group)
        for p, theta, v in zip(problem.parameters, problem.theta, problem.v, strict=True):
            assert torch.allclose(p, theta - eps * v, rtol=1e-6, atol=1e-8)
            assert torch.equal(p.main_grad, v)

    def test_builds_no_graph(self, group):
        """Two forward-only passes: what makes it cost 2 F."""
        problem, seen = Problem(), []

        def measure():
            seen.append(problem.losses(problem.model).requires_grad)
            return torch.ones(SAMPLES)

        problem.measure = measure
        problem.estimate(3e-4, group)
        assert seen == [False, False]


class TestStepSize:
    @pytest.mark.parametrize("relative_step", [1e-5, 3e-4, 0.1])
    def test_step_is_the_wanted_share_of_the_parameters_norm(self, group, relative_step):
        problem = Problem()
        eps = finite_difference.step_size(problem.parameters, problem.theta, relative_step, group)
        flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])  # noqa: E731
        share = (eps * flat(problem.v)).norm() / flat(problem.theta).norm()
        assert share.item() == pytest.approx(relative_step, rel=1e-5)

    def test_is_zero_only_where_v_is(self, group):
        problem = Problem()
        for p in problem.parameters[1:]:
            p.main_grad.zero_()
        step = (problem.parameters, problem.theta, 3e-4, group)
        assert finite_difference.step_size(*step) > 0.0
        problem.parameters[0].main_grad.zero_()
        assert finite_difference.step_size(*step) == 0.0

    def test_a_rank_without_parameters_takes_part(self, group):
        """A pipeline stage may hold no trainable parameter; the reduction needs it all the same."""
        assert finite_difference.step_size([], [], 3e-4, group) == 0.0
