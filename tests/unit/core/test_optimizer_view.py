"""Reading torch's optimizers gives the Jacobians that are proved in test_jacobian.py, in float32.

What these tests do not exercise: Megatron's own optimizers; tests/contract has those.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.core.optimizers import ParamShard  # noqa: E402
from megatron_dwm.meta_gradient.optimizers import derivatives as jacobian  # noqa: E402
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import has_stepped, rule_of  # noqa: E402
from tests.contract.stand_in_fused_adam import FusedAdam  # noqa: E402
from tests.unit.restated_optimizers import (  # noqa: E402
    BETAS,
    DAMPENED,
    LR,
    SGD_OPTIONS,
    SIZE,
    adam_step,
    gradients,
    is_diagonal,
    last_step,
    sgd_step,
    start,
    stepped,
    torch_optimizer,
    walk,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


def shard_of(step, options, history):
    """The shard of a real float32 torch optimizer after a history."""
    parameter, optimizer = stepped(torch_optimizer(step, options), history, torch.float32)
    config = SimpleNamespace(
        optimizer="sgd" if step is sgd_step else "adam",
        decoupled_weight_decay=options.get("decoupled", True),
        use_precision_aware_optimizer=False,
        use_precision_aware_optimizer_no_fp8_or_ds_fp8=False,
    )
    leaf = SimpleNamespace(config=config, optimizer=optimizer)
    group = optimizer.param_groups[0]
    return ParamShard(parameter, 0, SIZE, parameter, group, optimizer.state[parameter], leaf)


def update_jacobian(shard, lr, grad, dtype=torch.float32):
    """The diagonal of `dU/dG'`: what is pulled back of ones."""
    return rule_of(shard).pull_back(shard, lr, grad, torch.ones(SIZE, dtype=dtype))


def expected_jacobian(shard, lr):
    return rule_of(shard).pull_back_ahead(shard, lr, torch.ones(SIZE))


class TestUpdateJacobian:
    """Reading the real optimizer's group and state gives the same diagonal, in float32."""

    @staticmethod
    def agree(found, matrix, history):
        slack = 1e-5 * LR / history[-1].abs()
        return is_diagonal(matrix, found.double(), slack, rtol=1e-4)

    @pytest.mark.parametrize("steps", [2, 10])
    @pytest.mark.parametrize("decoupled", [True, False])
    def test_adam(self, steps, decoupled):
        """The gradient's L2 decay is that of the parameter before the step, which is gone."""
        history = gradients(steps, seed=steps)
        options = {"weight_decay": 0.1, "decoupled": decoupled}
        matrix, _, _ = last_step(adam_step, history, options)
        shard = shard_of(adam_step, options, history)
        assert rule_of(shard).needs_gradient
        grad = shard.stepped_grad()
        assert torch.equal(grad, history[-1].float())
        assert self.agree(update_jacobian(shard, LR, grad), matrix, history)
        # Negative controls: another learning rate than the argument's, another gradient than the
        # step's, the other kind of decay.
        assert not self.agree(update_jacobian(shard, 2 * LR, grad), matrix, history)
        assert not self.agree(update_jacobian(shard, LR, 2 * grad), matrix, history)
        shard.optimizer.config.decoupled_weight_decay = not decoupled
        assert not self.agree(update_jacobian(shard, LR, grad), matrix, history)

    @pytest.mark.parametrize("options", [*SGD_OPTIONS, DAMPENED])
    def test_sgd_needs_no_gradient(self, options):
        matrix, _, _ = last_step(sgd_step, gradients(3), options)
        shard = shard_of(sgd_step, options, gradients(3))
        assert not rule_of(shard).needs_gradient
        assert is_diagonal(matrix, update_jacobian(shard, LR, None, torch.float64))
        assert torch.equal(expected_jacobian(shard, LR), update_jacobian(shard, LR, None))
        assert not is_diagonal(matrix, update_jacobian(shard, 2 * LR, None, torch.float64))

    def test_expected_reads_the_second_moment_and_the_rate_of_the_coming_step(self):
        history = gradients(4)
        shard = shard_of(adam_step, {"eps": 1e-3}, history)
        _, (_, v, t) = walk(adam_step, history, {})
        expected = jacobian.adam_expected(v, t, 3 * LR, *BETAS, 1e-3)
        found = expected_jacobian(shard, 3 * LR).double()
        assert torch.allclose(found, expected, rtol=1e-5)
        assert not torch.allclose(expected_jacobian(shard, LR).double(), expected, rtol=1e-5)

    def test_step_count_may_lie_in_the_group(self):
        """Transformer Engine's fused Adam counts once a group, torch once a parameter."""
        history = gradients(10)
        shard = shard_of(adam_step, {}, history)
        expected = update_jacobian(shard, LR, history[-1].float())
        shard.group = {**shard.group, "step": shard.steps()}
        shard.state = {k: v for k, v in shard.state.items() if k != "step"}
        assert torch.equal(update_jacobian(shard, LR, history[-1].float()), expected)
        shard.group["step"] = 3
        assert not torch.equal(update_jacobian(shard, LR, history[-1].float()), expected)

    @pytest.mark.parametrize(("steps", "answer"), [(0, False), (1, True)])
    def test_moments_that_are_there_but_of_no_step_do_not_count_as_stepped(self, steps, answer):
        """Megatron may lay out the states, of zeros, before the first step."""
        shard = shard_of(adam_step, {}, gradients(steps))
        if steps == 0:
            shard.state.update(exp_avg=torch.zeros(SIZE), exp_avg_sq=torch.zeros(SIZE))
        leaf = shard.optimizer
        leaf.optimizer.state[shard.main_param] = shard.state
        assert has_stepped(leaf) is answer


class TestMomentsInFewBits:
    """The precision-aware Adam, a stand-in for Transformer Engine's, over six orders of magnitude.

    The truth is autograd through the step from the moments that were stored before it.
    """

    @staticmethod
    def shard_and_truth(first, second):
        history = gradients(20, seed=2)
        parameter = torch.nn.Parameter(start().float())
        options = {"lr": LR, "weight_decay": 0.1, "betas": BETAS, "eps": 1e-8}
        optimizer = FusedAdam(
            [parameter],
            **options,
            capturable=False,
            adam_w_mode=True,
            exp_avg_dtype=first,
            exp_avg_sq_dtype=second,
            master_weights=True,
            use_decoupled_grad=True,
        )
        for grad in history:
            group, state = optimizer.param_groups[0], None
            if optimizer.state[parameter]:
                read = (optimizer.get_unscaled_state(parameter, n) for n in MOMENTS)
                state = (*(moment.double() for moment in read), group["step"])
            parameter.decoupled_grad = grad.float()
            optimizer.step()
        config = SimpleNamespace(
            optimizer="adam",
            decoupled_weight_decay=True,
            use_precision_aware_optimizer=True,
            use_precision_aware_optimizer_no_fp8_or_ds_fp8=True,
        )
        leaf = SimpleNamespace(config=config, optimizer=optimizer)
        shard = ParamShard(parameter, 0, SIZE, parameter, group, optimizer.state[parameter], leaf)
        truth = torch.autograd.functional.jacobian(
            lambda g: adam_step(g, start(), state)[0], history[-1]
        )
        return shard, truth.diagonal()

    @staticmethod
    def error(found, truth):
        """The largest relative error, an element at a time, and that of the whole vector."""
        difference = (found.double() - truth).abs()
        return (difference / truth.abs()).max().item(), (difference.norm() / truth.norm()).item()

    @pytest.mark.parametrize(
        ("first", "second", "element", "whole"),
        [
            (torch.float32, torch.float32, 1e-3, 1e-3),
            (torch.bfloat16, torch.bfloat16, 0.02, 0.02),
            (torch.float16, torch.float16, 0.02, 0.02),
            (torch.uint8, torch.bfloat16, 0.25, 0.25),
            (torch.float32, torch.uint8, 0.25, 0.1),
            # Where both moments were stored as 0, the step is a sign and has no slope at all.
            (torch.uint8, torch.uint8, math.inf, 0.25),
        ],
    )
    def test_jacobian_is_that_of_the_step_before_storing(self, first, second, element, whole):
        """Up to the rounding of what was stored, which the two terms' cancellation enlarges."""
        shard, truth = self.shard_and_truth(first, second)
        found = self.error(update_jacobian(shard, LR, shard.stepped_grad()), truth)
        assert found[0] < element and found[1] < whole, found

    def test_second_moment_taken_as_stored_fails_in_fp8(self):
        """Its small elements are stored as 0, and the step did not divide by epsilon alone."""
        shard, truth = self.shard_and_truth(torch.float32, torch.uint8)
        grad, (first, second) = shard.stepped_grad(), shard.moments()
        assert (second == 0).any() and (grad != 0).all()
        wrong = jacobian.adam(grad, first, second, shard.steps(), LR, *BETAS, 1e-8)
        assert self.error(wrong, truth)[1] > 0.5
        assert self.error(update_jacobian(shard, LR, grad), truth)[1] < 0.1

    def test_gradient_is_the_decoupled_one_and_zero_when_there_is_none(self):
        shard, _ = self.shard_and_truth(torch.float32, torch.float32)
        shard.main_param.grad = torch.ones(SIZE)
        assert torch.equal(shard.stepped_grad(), shard.main_param.decoupled_grad)
        shard.main_param.decoupled_grad = None
        assert not shard.stepped_grad().any()
