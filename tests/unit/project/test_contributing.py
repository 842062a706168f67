"""The examples of CONTRIBUTING.md: each is run, and what it computes is compared with autograd."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.meta_gradient.ghost import layer_rules as ghost_rules  # noqa: E402
from megatron_dwm.meta_gradient.ghost.rule import Call  # noqa: E402
from megatron_dwm.meta_gradient.optimizers import optimizer_rules  # noqa: E402
from megatron_dwm.policies.base import SampleView, policy_class  # noqa: E402

TEXT = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
S, B, H = 5, 3, 4


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Writes the example with a file name to a folder on the path, and imports it."""
    blocks = dict(re.findall(r"```python\n# (own_\w+)\.py\n(.*?)```", TEXT, re.DOTALL))
    assert sorted(blocks) == ["own_layer", "own_optimizer", "own_policy"]
    monkeypatch.setattr(ghost_rules, "_BY_TYPE", dict(ghost_rules._BY_TYPE))
    monkeypatch.setattr(optimizer_rules, "_RULES", dict(optimizer_rules._RULES))
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(name):
        (tmp_path / f"{name}.py").write_text(blocks[name])
        return __import__(name)

    return load


def test_policy(example):
    example("own_policy")
    policy = policy_class("own_policy:Short")(SimpleNamespace())
    mask = torch.ones(B, S)
    mask[1, 2:] = 0
    found = policy.weights(SampleView(0, torch.zeros(B, S), mask))
    assert torch.allclose(found, torch.tensor([1.5, 0.9, 1.5]))


def test_optimizer(example):
    rule = example("own_optimizer").SmoothLion()
    b1, b2, lr = 0.9, 0.99, 1e-2
    g = torch.Generator().manual_seed(0)
    before, grad, h = (1e-3 * torch.randn(H, generator=g).double() for _ in range(3))
    grad.requires_grad_()

    def update():
        u = b1 * before + (1 - b1) * grad
        return -lr * torch.tanh(u / rule.width)

    (expected,) = torch.autograd.grad((update() * h).sum(), grad)
    shard = SimpleNamespace(
        state={"exp_avg": (b2 * before + (1 - b2) * grad).detach()},
        group={"betas": (b1, b2)},
        optimizer=SimpleNamespace(config=SimpleNamespace(optimizer="lion")),
    )
    found = optimizer_rules.rule_of(shard)
    assert torch.allclose(found.pull_back(shard, lr, grad.detach(), h), expected, rtol=1e-9)
    assert not torch.allclose(found.pull_back(shard, lr, 2 * grad.detach(), h), expected, rtol=0.01)


def test_layer(example):
    module = example("own_layer").Gain(H)
    g = torch.Generator().manual_seed(0)
    x, v, w = (torch.randn(*shape, generator=g) for shape in ((S, B, H), (H,), (S, B, H)))
    out = module(x)
    by_sample = (torch.tanh(out) * w).sum((0, 2))
    expected = [
        (torch.autograd.grad(loss, module.weight, retain_graph=True)[0] * v).sum()
        for loss in by_sample
    ]
    (grad,) = torch.autograd.grad(by_sample.sum(), out)
    rule = ghost_rules.rule_of(module)
    call = Call(module, x, module.weight, rule.samples(module))
    found = rule.formula(call, grad, lambda parameter: v, lambda parameter: 1.0)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-5)
