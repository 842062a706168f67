"""Weights that a policy makes inside the forward step: what it is shown, and what is refused."""

import contextlib

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.config.policy_table import Needs  # noqa: E402
from megatron_dwm.core.state_tap import StateTap  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.policies.base import WeightPolicy  # noqa: E402
from megatron_dwm.step.loss import PolicyWeights, WeightedForwardStep  # noqa: E402

B, S, H = 3, 5, 4


class Model(torch.nn.Module):
    """States, and an output layer whose sums are the losses `[b, s]`, as Megatron orders them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(H, H)
        self.output_layer = torch.nn.Linear(H, 1)

    def forward(self, x):
        self.states = torch.tanh(self.body(x))
        return self.output_layer(self.states).squeeze(-1).square().t()


class Spy(WeightPolicy):
    """Keeps what it is shown; weights are the number of the micro-batch and the sample."""

    def __init__(self, needs):
        self.needs, self.seen = needs, []

    def weights(self, view):
        self.seen.append(view)
        return torch.arange(B) + 10.0 * view.index


def batches(count=2):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(S, B, H, generator=g), (torch.rand(B, S, generator=g) > 0.3).float())
        for _ in range(count)
    ]


def three_values(mask, output):
    loss = (output.float() * mask).sum()
    return loss, mask.sum().int(), {"lm loss": loss / mask.sum()}


def two_values(mask, output):
    loss = (output * mask).sum() / mask.sum()
    return loss, {"lm loss": loss}


def clipped(mask, output):
    loss = (output.clamp(max=0.05) * mask).sum()
    return loss, mask.sum().int(), {"lm loss": loss}


def squared(mask, output):
    loss = (output.square() * mask).sum()
    return loss, {"lm loss": loss}


def run(step, model, data, **options):
    """Takes the micro-batches as a schedule does; returns the results of the loss function."""
    found = []
    for item in data:
        output, loss_func = step(iter([item]), model)
        found.append(loss_func(output))
    return found


def forward_step(loss_func):
    def forward(iterator, model):
        x, mask = next(iterator)
        return model(x), lambda output: loss_func(mask, output)

    return forward


@pytest.mark.parametrize("loss_func", [three_values, two_values])
def test_policy_sees_each_micro_batch_and_its_weights_reach_the_loss(loss_func):
    model, data = Model(), batches()
    step, policy = (
        WeightedForwardStep(forward_step(loss_func)),
        Spy(Needs(losses=True, states=True)),
    )
    domains = torch.arange(2 * B)
    source = PolicyWeights(policy, StateTap(model), domains)
    with step.weighted(source, 2) as applied:
        found = run(step, model, data)
    for k, (view, (x, mask), result) in enumerate(zip(policy.seen, data, found, strict=True)):
        losses = model(x).detach()
        assert view.index == k and torch.equal(view.losses, losses)
        assert torch.equal(view.mask > 0, mask > 0)
        # Positions count alike, whatever the loss function divides by.
        assert view.mask[mask > 0].unique().numel() == 1
        assert torch.equal(view.states, model.states.detach()) and not view.states.requires_grad
        assert torch.equal(view.domains, domains[k * B : (k + 1) * B])
        w = torch.arange(B) + 10.0 * k
        expected = loss_func(mask, losses * w[:, None])[0]
        assert torch.allclose(result[0], expected)
        # What is reported is the unweighted loss, without a graph.
        assert torch.allclose(result[-1]["lm loss"], loss_func(mask, losses)[-1]["lm loss"])
        assert not result[-1]["lm loss"].requires_grad
    assert torch.equal(applied.weights, torch.tensor([0.0, 1, 2, 10, 11, 12]))


def test_gradient_is_that_of_the_weighted_loss_alone():
    model, data = Model(), batches(1)
    step = WeightedForwardStep(forward_step(three_values))
    source = PolicyWeights(Spy(Needs(losses=True, states=True)), StateTap(model))
    with step.weighted(source, 1):
        ((loss, *_),) = run(step, model, data)
    loss.backward()
    found = model.body.weight.grad.clone()
    model.zero_grad()
    x, mask = data[0]
    (model(x) * torch.arange(B)[:, None] * mask).sum().backward()
    assert torch.equal(found, model.body.weight.grad)


def test_a_policy_that_needs_nothing_is_shown_nothing_more():
    model, data = Model(), batches(1)
    step, policy = WeightedForwardStep(forward_step(three_values)), Spy(Needs())
    with step.weighted(PolicyWeights(policy), 1):
        run(step, model, data)
    assert policy.seen[0].mask is None and policy.seen[0].states is None


@pytest.mark.parametrize("loss_func", [clipped, squared])
def test_a_loss_function_that_is_not_linear_is_refused(loss_func):
    step = WeightedForwardStep(forward_step(loss_func))
    with step.weighted(PolicyWeights(Spy(Needs(losses=True))), 1):
        with pytest.raises(DWMError, match="loss_func is not linear .* --dwm-policy uniform"):
            run(step, Model(), batches(1))


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(DWMError, match="output_layer.*Linear has none.*--dwm-form model"):
        StateTap(torch.nn.Linear(2, 2))


def test_an_output_layer_that_is_passed_by_is_refused():
    class Beside(Model):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.output_layer.weight).squeeze(-1).square().t()

    model = Beside()
    step = WeightedForwardStep(forward_step(three_values))
    source = PolicyWeights(Spy(Needs(states=True)), StateTap(model))
    with step.weighted(source, 1), pytest.raises(DWMError, match="was not called; use --dwm-form"):
        run(step, model, batches(1))


def test_hooks_are_gone_afterwards():
    model = Model()
    tap = StateTap(model)
    with tap.listening():
        pass
    assert not model.output_layer._forward_pre_hooks


@pytest.mark.parametrize("given", [True, False], ids=["given", "policy"])
def test_what_weighting_adds_to_a_forward_step_is_timed(given):
    """The policy, and the report's own call of the loss function; not the loss that is trained."""
    seen, inside = [], []

    @contextlib.contextmanager
    def stopwatch():
        inside.append(True)
        yield
        inside.pop()

    class Watched(Spy):
        def weights(self, view):
            seen.append(("policy", bool(inside)))
            return super().weights(view)

    def loss_func(mask, output):
        seen.append(("trained" if output.grad_fn is not None else "reported", bool(inside)))
        return three_values(mask, output)

    model, data = Model(), batches()
    step = WeightedForwardStep(forward_step(loss_func))
    step.stopwatch = stopwatch
    weights = torch.ones(2, B) if given else PolicyWeights(Watched(Needs()), None)
    with step.weighted(weights, 2):
        run(step, model, data)
    expected = [("reported", True), ("trained", False)]
    assert seen == (expected if given else [("policy", True), *expected]) * 2
    assert not inside
