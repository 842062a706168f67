"""The optimizers' Jacobians against autograd through a literal re-statement of torch's updates.

The chain of proof, in float64: the re-statement walks with the real `torch.optim` optimizer over
a history of gradients; autograd gives the whole matrix `d theta+ / dG` of its last step; the
closed formula must be that matrix's diagonal, and all else 0. With clipping the matrix is full,
and the pull-back `u -> a u - b <G', u> G'`, `u = D h`, must be its transpose. Every comparison has
a negative control: a formula with one term wrong must fail it.
What these tests do not exercise: Megatron's own optimizer wrappers and their shards.
"""

import pytest
import torch

from megatron_dwm.meta_gradient.optimizers import derivatives as jacobian
from tests.unit.restated_optimizers import (
    ADAM_OPTIONS,
    BETAS,
    DAMPENED,
    LR,
    SGD_OPTIONS,
    SIZE,
    adam_step,
    clipped,
    gradients,
    is_diagonal,
    known_to_sgd,
    last_step,
    sgd_step,
    stepped,
    torch_optimizer,
    walk,
)

ALL = [(sgd_step, o) for o in [*SGD_OPTIONS, DAMPENED]] + [(adam_step, o) for o in ADAM_OPTIONS]


class TestRestatement:
    @pytest.mark.parametrize(("step", "options"), ALL)
    def test_walks_with_the_real_optimizer(self, step, options):
        history = gradients(8)
        parameter, _ = stepped(torch_optimizer(step, options), history)
        theta, _ = walk(step, history, options)
        assert torch.allclose(theta, parameter.detach(), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize(
        ("step", "options", "wrong"),
        [
            (sgd_step, DAMPENED, {"momentum": 0.8}),
            (sgd_step, SGD_OPTIONS[4], SGD_OPTIONS[2]),
            (adam_step, ADAM_OPTIONS[1], ADAM_OPTIONS[2]),
        ],
    )
    def test_comparison_tells_other_rules_apart(self, step, options, wrong):
        history = gradients(8)
        parameter, _ = stepped(torch_optimizer(step, options), history)
        theta, _ = walk(step, history, wrong)
        assert not torch.allclose(theta, parameter.detach(), rtol=1e-6)


# --------------------------------------------------------------------------- SGD


# torch starts the momentum buffer undampened, so dampening shows from the second step on.
SGD_CASES = [(o, t) for o in SGD_OPTIONS for t in (1, 2, 5)] + [(DAMPENED, 2), (DAMPENED, 5)]


class TestSGD:
    @pytest.mark.parametrize(("options", "steps"), SGD_CASES)
    def test_equals_autograd(self, options, steps):
        matrix, _, _ = last_step(sgd_step, gradients(steps), options)
        assert is_diagonal(matrix, jacobian.sgd(LR, **known_to_sgd(options)))

    @pytest.mark.parametrize(
        ("wrong", "options", "steps"),
        [
            ({}, {"momentum": 0.9, "nesterov": True}, 1),
            ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, 3),
            ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9}, 3),
            ({"momentum": 0.8}, DAMPENED, 3),
            # What the docstring says is not told apart.
            (DAMPENED, DAMPENED, 1),
        ],
    )
    def test_comparison_tells_other_rules_apart(self, wrong, options, steps):
        matrix, _, _ = last_step(sgd_step, gradients(steps), options)
        assert not is_diagonal(matrix, jacobian.sgd(LR, **wrong), rtol=1e-2)


# --------------------------------------------------------------------------- Adam


def adam_inputs(grad, theta, state, eps=1e-8, weight_decay=0.0, decoupled=True):
    """What `jacobian.adam` is given after a step with (clipped) `grad` from `theta`."""
    return {
        "grad": grad if decoupled else grad + weight_decay * theta,
        "exp_avg": state[0],
        "exp_avg_sq": state[1],
        "step": state[2],
        "lr": LR,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": eps,
    }


def cancellation(inputs):
    """The rounding of the formula's two terms, which cancel at t = 1, where Adam is a sign."""
    root = (inputs["exp_avg_sq"] / (1 - BETAS[1] ** inputs["step"])).sqrt()
    return 1e-13 * LR / (root + inputs["eps"])


def adam_without_root(grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps):
    """Wrong on purpose: takes the second moment as a constant."""
    root = (exp_avg_sq / (1 - beta2**step)).sqrt()
    return -lr * (1 - beta1) / (1 - beta1**step) / (root + eps)


def adam_without_correction(grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps):
    """Wrong on purpose: the limit of many steps."""
    return jacobian.adam(grad, exp_avg, exp_avg_sq, 10**6, lr, beta1, beta2, eps)


def adam_root_squared_once(grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps):
    """Wrong on purpose: epsilon left out of one factor of the denominator."""
    return jacobian.adam(grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, 0.0)


class TestAdam:
    @pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
    @pytest.mark.parametrize("options", ADAM_OPTIONS)
    def test_equals_autograd(self, steps, options):
        """L2 decay (Adam) is part of the gradient; decoupled decay (AdamW) is not."""
        history = gradients(steps, seed=steps)
        matrix, theta, state = last_step(adam_step, history, options)
        inputs = adam_inputs(history[-1], theta, state, **options)
        assert is_diagonal(matrix, jacobian.adam(**inputs), cancellation(inputs))

    @pytest.mark.parametrize(
        ("wrong", "steps", "eps"),
        [
            (adam_without_root, 10, 1e-8),
            (adam_without_root, 1, 1e-8),
            (adam_without_correction, 3, 1e-8),
            (adam_root_squared_once, 10, 1e-3),
        ],
    )
    def test_comparison_tells_wrong_formulas_apart(self, wrong, steps, eps):
        history = gradients(steps, seed=steps)
        matrix, theta, state = last_step(adam_step, history, {"eps": eps})
        inputs = adam_inputs(history[-1], theta, state, eps)
        slack = cancellation(inputs)
        assert is_diagonal(matrix, jacobian.adam(**inputs), slack)
        assert not is_diagonal(matrix, wrong(**inputs), slack, rtol=1e-3)

    def test_comparison_tells_l2_decay_left_out_apart(self):
        history, options = gradients(10), {"weight_decay": 0.1, "decoupled": False}
        matrix, theta, state = last_step(adam_step, history, options)
        inputs = adam_inputs(history[-1], theta, state)
        assert not is_diagonal(matrix, jacobian.adam(**inputs), cancellation(inputs), rtol=1e-3)

    @pytest.mark.parametrize("steps", [1, 5])
    def test_update_is_what_the_step_added(self, steps):
        """From it the parameter before the step is known, which L2 decay put in the gradient."""
        options = {"weight_decay": 0.1, "decoupled": False}
        history = gradients(steps)
        before, _ = walk(adam_step, history[:-1], options)
        after, state = walk(adam_step, history, options)
        found = jacobian.adam_update(*state, LR, *BETAS, 1e-8)
        assert torch.allclose(found, after - before, rtol=1e-9, atol=1e-15)
        assert not torch.allclose(found, 1.01 * (after - before), rtol=1e-3)

    def test_zero_second_moment_gives_the_one_sided_slope_not_nan(self):
        """A row of the embedding that was never seen: G, m and v are all 0.

        Near 0 the update is `-lr (1-b1)/(1-b1^t) G / eps` as long as sqrt(vhat) << eps.
        """
        zero, eps = torch.zeros(3), 1e-8
        for step in (1, 5):
            found = jacobian.adam(zero, zero, zero, step, LR, *BETAS, eps)
            expected = -LR * (1 - BETAS[0]) / (1 - BETAS[0] ** step) / eps
            assert found.tolist() == pytest.approx([expected] * 3, rel=1e-6)
        history = torch.zeros(5, SIZE, dtype=torch.float64)
        moved = history.clone()
        moved[-1] = 1e-14
        difference = walk(adam_step, moved, {})[0] - walk(adam_step, history, {})[0]
        assert (difference / 1e-14).tolist() == pytest.approx([expected] * SIZE, rel=1e-4)

    def test_zero_and_ordinary_elements_do_not_disturb_each_other(self):
        history = gradients(5)
        history[:, 3] = 0.0
        theta, _ = walk(adam_step, history[:-1], {})
        _, state = walk(adam_step, history, {})
        inputs = adam_inputs(history[-1], theta, state)
        whole = jacobian.adam(**inputs)
        assert torch.isfinite(whole).all()
        others = torch.arange(SIZE) != 3
        tensors = ("grad", "exp_avg", "exp_avg_sq")
        part = jacobian.adam(**{k: v[others] if k in tensors else v for k, v in inputs.items()})
        assert torch.equal(whole[others], part)


class TestAdamExpected:
    @staticmethod
    def coming_step(steps, factor, eps):
        """A step whose gradient is `factor sqrt(vhat)` and after which the first moment is 0.

        At `factor` 1 the second moment does not move: `b2 (1 - b2^t) + (1 - b2) = 1 - b2^(t+1)`.
        The first moment of 0 takes away the exact diagonal's second term, the rest is the first.
        """
        theta, (_, v, t) = walk(adam_step, gradients(steps), {"eps": eps})
        grad = factor * (v / (1 - BETAS[1] ** t)).sqrt()
        state = (-(1 - BETAS[0]) / BETAS[0] * grad, v, t)

        def of_gradient(g):
            return adam_step(g, theta, state, eps)[0]

        matrix = torch.autograd.functional.jacobian(of_gradient, grad)
        return matrix, jacobian.adam_expected(v, t, LR, *BETAS, eps)

    @pytest.mark.parametrize("steps", [1, 2, 20])
    @pytest.mark.parametrize("eps", [1e-15, 1e-8, 1e-3])
    def test_is_the_exact_first_term_when_the_second_moment_does_not_move(self, steps, eps):
        matrix, expected = self.coming_step(steps, 1.0, eps)
        assert is_diagonal(matrix, expected)

    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_comparison_tells_a_moving_second_moment_apart(self, factor):
        matrix, expected = self.coming_step(5, factor, 1e-8)
        assert not is_diagonal(matrix, expected, rtol=1e-2)

    def test_is_zero_where_no_gradient_was_ever_seen(self):
        second = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        for eps in (0.0, 1e-8):
            found = jacobian.adam_expected(second, 3, LR, *BETAS, eps)
            assert found[0] == found[2] == 0.0 and found[1] < 0.0


# --------------------------------------------------------------------------- clipping


def pull_back_matrix(diagonal, clipped_grad, a, b):
    """The columns `a u - b <G', u> G'`, `u = D e_j`, of the pull-back of every unit vector."""
    u = torch.diag(torch.as_tensor(diagonal, dtype=clipped_grad.dtype).expand(SIZE))
    return a * u - b * torch.outer(clipped_grad, clipped_grad @ u)


COMPOSED = [
    (sgd_step, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (adam_step, {"eps": 1e-8, "weight_decay": 0.1, "decoupled": True}),
    (adam_step, {"eps": 1e-3, "weight_decay": 0.1, "decoupled": False}),
]


class TestClipping:
    @staticmethod
    def composed(step, options, max_norm, steps=5):
        """d theta+ / dG by autograd; what the diagonal is computed from; G' and |G|."""
        # Of one magnitude: no element's share of the norm is rounded away.
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(steps, SIZE, generator=generator, dtype=torch.float64)
        history = gradients(steps).sign() + 0.1 * noise
        matrix, theta, state = last_step(step, history, options, max_norm)
        grad = clipped(history[-1], max_norm)
        inputs = None if step is sgd_step else adam_inputs(grad, theta, state, **options)
        return matrix, inputs, grad, history[-1].norm().item()

    @pytest.mark.parametrize(("step", "options"), COMPOSED)
    @pytest.mark.parametrize("max_norm", [0.01, 1.0, 100.0])
    def test_pull_back_is_the_transpose_of_the_whole_jacobian(self, step, options, max_norm):
        matrix, inputs, grad, norm = self.composed(step, options, max_norm)
        if inputs is None:
            diagonal = jacobian.sgd(LR, **known_to_sgd(options))
        else:
            diagonal = jacobian.adam(**inputs)
        a, b = jacobian.clip_projection(norm, max_norm)
        active = max_norm < norm
        assert (a < 1.0 and b > 0.0) is active
        size = matrix.abs().max().item()
        found = pull_back_matrix(diagonal, grad, a, b)
        assert torch.allclose(found, matrix.T, rtol=1e-9, atol=1e-11 * size)
        # Negative controls: without the projection, and without the factor.
        for wrong in ((a, 0.0), (1.0, b)):
            found = pull_back_matrix(diagonal, grad, *wrong)
            assert torch.allclose(found, matrix.T, rtol=1e-3, atol=1e-3 * size) is not active

    @pytest.mark.parametrize("max_norm", [1.0, 100.0])
    def test_comparison_tells_the_second_moment_left_out_apart(self, max_norm):
        matrix, inputs, grad, norm = self.composed(adam_step, COMPOSED[1][1], max_norm)
        size = matrix.abs().max().item()
        a, b = jacobian.clip_projection(norm, max_norm)
        found = pull_back_matrix(adam_without_root(**inputs), grad, a, b)
        assert not torch.allclose(found, matrix.T, rtol=1e-3, atol=1e-3 * size)

    @pytest.mark.parametrize("max_norm", [1e-4, 0.5, 1.0, 100.0])
    @pytest.mark.parametrize("norm", [1e-5, 0.3, 0.9999999, 3.0, 250.0])
    def test_projection_alone_equals_autograd(self, max_norm, norm):
        """`u -> a u - b <G', u> G'` is the transposed Jacobian, applied to any u."""
        generator = torch.Generator().manual_seed(3)
        grad = torch.randn(20, generator=generator, dtype=torch.float64)
        grad = (grad / grad.norm() * norm).requires_grad_()
        u = torch.randn(20, generator=generator, dtype=torch.float64)
        out = clipped(grad, max_norm)
        (expected,) = torch.autograd.grad(out, grad, u)
        a, b = jacobian.clip_projection(norm, max_norm)
        g = out.detach()
        found = a * u - b * (g @ u) * g
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12 * a)
        # Negative control: the factor alone, without the projection, is not it.
        active = max_norm < norm + 1e-6
        assert torch.allclose(a * u, expected, rtol=1e-3, atol=1e-6 * a) is not active

    @pytest.mark.parametrize("norm", [0.0, 0.4, 1e3])
    def test_factor_is_that_of_the_clipping(self, norm):
        grad = torch.full((4,), norm / 2, dtype=torch.float64)
        expected = clipped(grad, 1.0).norm().item()
        assert jacobian.clip_coefficient(norm, 1.0) * norm == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("max_norm", [0.0, -1.0])
    def test_switched_off_is_the_identity(self, max_norm):
        """`--clip-grad 0` means no clipping, not clipping to nothing."""
        assert jacobian.clip_coefficient(1e9, max_norm) == 1.0
        assert jacobian.clip_projection(1e9, max_norm) == (1.0, 0.0)
