"""The optimizers' Jacobians against finite differences of the real torch optimizers, in float64.

A history of random gradients brings the optimizer to step t; then the last gradient is moved by
+-delta and the whole history is replayed. The update is elementwise, so one pair of replays gives
the whole diagonal (`test_the_update_is_elementwise` proves that). Every comparison has a negative
control: a formula with one term wrong must fail it.
What these tests do not exercise: Megatron's own optimizer wrappers and their shards.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_dwm import host

host.install()

from megatron_dwm.meta import jacobian  # noqa: E402
from megatron_dwm.meta.optimizer_view import ParamShard, update_jacobian  # noqa: E402

LR, BETAS, SIZE = 0.01, (0.9, 0.95), 12


def gradients(steps, seed=0):
    """A history `[t, SIZE]` that spans six orders of magnitude and both signs."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-4, 2, SIZE, dtype=torch.float64)
    return torch.randn(steps, SIZE, generator=generator, dtype=torch.float64) * scale


def start():
    return torch.linspace(-1, 1, SIZE, dtype=torch.float64)


def replay(make, history):
    """Runs an optimizer over a history.

    Returns:
        The parameter before the last step and after it, the state and the optimizer.
    """
    parameter = torch.nn.Parameter(start())
    optimizer = make([parameter])
    before = parameter.detach().clone()
    for grad in history:
        before = parameter.detach().clone()
        parameter.grad = grad.clone()
        optimizer.step()
    return before, parameter, optimizer


def measured_diagonal(make, history, relative=1e-6):
    """`dU/dG` of the last gradient by a central difference, step relative to each element."""
    delta = relative * history[-1].abs()
    sides = []
    for sign in (1.0, -1.0):
        moved = history.clone()
        moved[-1] += sign * delta
        sides.append(replay(make, moved)[1].detach())
    return (sides[0] - sides[1]) / (2 * delta)


def agree(found, expected, history, lr=LR):
    """Whether two diagonals agree, with an absolute slack for Adam's cancellation at t = 1.

    There the two terms of the formula almost cancel; each is of the size of lr / |G|.
    """
    found = torch.as_tensor(found, dtype=torch.float64).expand(SIZE)
    slack = 1e-5 * lr / history[-1].abs()
    return bool(((found - expected).abs() <= 1e-4 * expected.abs() + slack).all())


SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"weight_decay": 0.1},
]
DAMPENED = {"momentum": 0.8, "dampening": 0.3}
# torch starts the momentum buffer undampened, so dampening shows from the second step on.
SGD_CASES = [(o, t) for o in SGD_OPTIONS for t in (1, 2, 5)] + [(DAMPENED, 2), (DAMPENED, 5)]


def sgd_diagonal(history, **options):
    """As SGD is linear in G, a large difference is exact and keeps clear of rounding."""
    make = lambda p: torch.optim.SGD(p, lr=LR, **options)  # noqa: E731
    # The tiny gradients' share of the parameters would be rounded away at any step.
    return measured_diagonal(make, history.sign() + history, relative=1.0)


class TestSGD:
    @pytest.mark.parametrize(("options", "steps"), SGD_CASES)
    def test_equals_finite_differences_of_torch(self, options, steps):
        """Decay adds a term that does not depend on G."""
        expected = sgd_diagonal(gradients(steps), **options)
        known = {k: v for k, v in options.items() if k != "weight_decay"}
        assert expected.tolist() == pytest.approx([jacobian.sgd(LR, **known)] * SIZE, rel=1e-9)

    @pytest.mark.parametrize(
        ("wrong", "options"),
        [
            ({}, {"momentum": 0.9, "nesterov": True}),
            ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
            ({"momentum": 0.8}, DAMPENED),
            ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9}),
        ],
    )
    def test_comparison_tells_other_rules_apart(self, wrong, options):
        expected = sgd_diagonal(gradients(3), **options).tolist()
        assert expected != pytest.approx([jacobian.sgd(LR, **wrong)] * SIZE, rel=1e-2)


def adam_of(kind, eps, weight_decay):
    return lambda p: kind(p, lr=LR, betas=BETAS, eps=eps, weight_decay=weight_decay)


def adam_inputs(make, history, weight_decay_in_gradient=0.0):
    """What `jacobian.adam` is given, read from the real optimizer after its step."""
    before, parameter, optimizer = replay(make, history)
    state = optimizer.state[parameter]
    assert int(state["step"]) == len(history)
    return {
        "grad": history[-1] + weight_decay_in_gradient * before,
        "exp_avg": state["exp_avg"],
        "exp_avg_sq": state["exp_avg_sq"],
        "step": len(history),
        "lr": LR,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": optimizer.param_groups[0]["eps"],
    }


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
    @pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
    @pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
    @pytest.mark.parametrize("eps", [1e-15, 1e-8, 1e-3, 1.0])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_equals_finite_differences_of_torch(self, kind, steps, eps, weight_decay):
        """L2 decay (Adam) is part of the gradient; decoupled decay (AdamW) is not."""
        history = gradients(steps, seed=steps)
        make = adam_of(kind, eps, weight_decay)
        in_gradient = weight_decay if kind is torch.optim.Adam else 0.0
        inputs = adam_inputs(make, history, in_gradient)
        expected = measured_diagonal(make, history)
        # The scale of the two terms is that of the gradient that entered the moments.
        scale = torch.minimum(inputs["grad"].abs(), history[-1].abs()).unsqueeze(0)
        assert agree(jacobian.adam(**inputs), expected, scale)

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
        make = adam_of(torch.optim.AdamW, eps, 0.0)
        inputs = adam_inputs(make, history)
        assert not agree(wrong(**inputs), measured_diagonal(make, history), history)

    def test_comparison_tells_l2_decay_left_out_apart(self):
        history = gradients(10, seed=10)
        make = adam_of(torch.optim.Adam, 1e-8, 0.1)
        expected = measured_diagonal(make, history)
        assert not agree(jacobian.adam(**adam_inputs(make, history, 0.0)), expected, history)

    def test_the_update_is_elementwise(self):
        """What lets one pair of replays measure the whole diagonal."""
        history = gradients(5)
        make = adam_of(torch.optim.AdamW, 1e-8, 0.1)
        moved = history.clone()
        moved[-1, 4] *= 1.5
        changed = replay(make, history)[1] != replay(make, moved)[1]
        assert changed.nonzero().view(-1).tolist() == [4]

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
        make = adam_of(torch.optim.AdamW, eps, 0.0)
        moved = history.clone()
        moved[-1] = 1e-14
        difference = replay(make, moved)[1] - replay(make, history)[1]
        assert (difference / 1e-14).tolist() == pytest.approx([expected] * SIZE, rel=1e-4)

    def test_zero_and_ordinary_elements_do_not_disturb_each_other(self):
        history = gradients(5)
        history[:, 3] = 0.0
        inputs = adam_inputs(adam_of(torch.optim.AdamW, 1e-8, 0.0), history)
        whole = jacobian.adam(**inputs)
        assert torch.isfinite(whole).all()
        others = torch.arange(SIZE) != 3
        tensors = ("grad", "exp_avg", "exp_avg_sq")
        part = jacobian.adam(**{k: v[others] if k in tensors else v for k, v in inputs.items()})
        assert torch.equal(whole[others], part)


def clipped(grad, max_norm):
    """Megatron's clipping: `g min(1, C / (|g| + 1e-6))`."""
    return grad * torch.clamp(max_norm / (grad.norm() + 1e-6), max=1.0)


class TestClipping:
    @pytest.mark.parametrize("max_norm", [1e-4, 0.5, 1.0, 100.0])
    @pytest.mark.parametrize("norm", [1e-5, 0.3, 0.9999999, 3.0, 250.0])
    def test_projection_equals_autograd(self, max_norm, norm):
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

    def test_inactive_clipping_is_the_identity(self):
        assert jacobian.clip_projection(0.5, 1.0) == (1.0, 0.0)


class TestUpdateJacobian:
    """Reading the real optimizer's group and state gives the same diagonal, in float32."""

    @staticmethod
    def shard(make, history, name, decoupled):
        parameter = torch.nn.Parameter(start().float())
        optimizer = make([parameter])
        for grad in history.float():
            parameter.grad = grad.clone()
            optimizer.step()
        config = SimpleNamespace(optimizer=name, decoupled_weight_decay=decoupled)
        group = optimizer.param_groups[0]
        leaf = SimpleNamespace(config=config)
        return ParamShard(parameter, 0, SIZE, parameter, group, optimizer.state[parameter], leaf)

    @pytest.mark.parametrize("steps", [2, 10])
    def test_adamw(self, steps):
        history = gradients(steps, seed=steps)
        make = adam_of(torch.optim.AdamW, 1e-8, 0.1)
        found = update_jacobian(self.shard(make, history, "adam", True), LR)
        assert agree(found, measured_diagonal(make, history), history)
        # Negative control: the learning rate is the argument's, not the group's.
        assert not agree(
            update_jacobian(self.shard(make, history, "adam", True), 2 * LR),
            measured_diagonal(make, history),
            history,
        )

    def test_sgd_with_momentum(self):
        options = {"momentum": 0.9, "nesterov": True}
        make = lambda p: torch.optim.SGD(p, lr=LR, **options)  # noqa: E731
        found = update_jacobian(self.shard(make, gradients(3), "sgd", True), LR)
        expected = sgd_diagonal(gradients(3), **options)
        assert expected.tolist() == pytest.approx([found] * SIZE, rel=1e-9)

    def test_step_count_may_lie_in_the_group(self):
        """Transformer Engine's fused Adam counts once a group, torch once a parameter."""
        history = gradients(10)
        shard = self.shard(adam_of(torch.optim.AdamW, 1e-8, 0.0), history, "adam", True)
        expected = update_jacobian(shard, LR)
        shard.group = {**shard.group, "step": int(shard.state["step"])}
        shard.state = {k: v for k, v in shard.state.items() if k != "step"}
        assert torch.equal(update_jacobian(shard, LR), expected)
