"""The derivative of Muon's step, Megatron's own on a stand-in for emerging-optimizers.

Real optimizers around a tiny model, moved as `RealStep` moves them: the third step with its
gradient changed along a direction, against the direction's product with what is pulled back. A
weight matrix is stepped by Muon and a bias by Adam, in one chained optimizer.

Not exercised here: emerging-optimizers itself, bf16 iterations, and more than one rank.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.core.optimizers import shards  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import (  # noqa: E402
    check_supported,
    has_stepped,
    rule_of,
)
from megatron_dwm.meta_gradient.pull_back import pull_back_before_step  # noqa: E402
from tests.contract import stand_in_muon  # noqa: E402
from tests.contract.real_step import (  # noqa: E402
    RealStep,
    accumulate,
    optimizer_of,
    read,
    wrapped,
    write,
)

pytestmark = pytest.mark.usefixtures("groups")


def build(**options: Any) -> tuple[Any, Any]:
    ddp = wrapped()
    with stand_in_muon.installed():
        given = {"optimizer": "muon", "muon_momentum": 0.9, "muon_num_ns_steps": 5, **options}
        return ddp, optimizer_of(ddp, **given)


def as_adam_s(inner: Any) -> None:
    """Takes the matrix for one of elements: h times a number."""
    for shard, _ in inner.entries:
        if "momentum_buffer" in shard.state:
            shard.group["optimizer"] = "sgd"


def at_the_momentum(inner: Any) -> None:
    """Differentiates without the step ahead."""
    for shard, _ in inner.entries:
        if "momentum_buffer" in shard.state:
            shard.optimizer.optimizer.nesterov = False


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
def test_the_step_is_pulled_back_through_the_iteration(nesterov: bool, clip: float) -> None:
    """Against central differences of the whole step, to 1%; without the iteration it is far off."""
    real = RealStep(lambda: build(muon_nesterov=nesterov, clip_grad=clip))
    controls = [as_adam_s, *([at_the_momentum] if nesterov else [])]
    real.check(clipped=clip > 0, rel=0.01, controls=controls)


def test_a_matrix_is_muon_s_and_a_bias_adam_s() -> None:
    ddp, optimizer = build()
    check_supported(optimizer, "exact")
    assert not has_stepped(optimizer)
    accumulate(ddp, optimizer)
    optimizer.step()
    found = {s.model_param.dim(): type(rule_of(s)).__name__ for s in shards(optimizer)}
    assert found == {2: "MuonRule", 1: "AdamRule"}
    assert has_stepped(optimizer)


def test_ahead_of_the_step_it_is_that_of_a_gradient_like_the_momentum() -> None:
    """Exact where the next gradient points where the momentum does, whatever its length."""
    ddp, optimizer = build(weight_decay=0.0)
    for seed in range(3):
        accumulate(ddp, optimizer, seed=seed)
        optimizer.step()
    (muon,) = (s for s in shards(optimizer) if "momentum_buffer" in s.state)
    momentum = muon.state["momentum_buffer"].clone().view(-1)
    h = torch.randn(momentum.numel(), generator=torch.Generator().manual_seed(3))
    rule = rule_of(muon)
    ahead = rule.pull_back_ahead(muon, 0.01, h)
    assert torch.allclose(rule.pull_back(muon, 0.01, momentum, h), ahead, rtol=1e-5)
    # And through the whole optimizer, in the gradient buffers.
    lrs = {id(group): 0.01 for group in (s.group for s in shards(optimizer))}
    write(ddp, torch.cat([h, torch.zeros(read(ddp).numel() - h.numel())]))
    pull_back_before_step(optimizer, lrs, [ddp])
    assert torch.allclose(read(ddp)[: h.numel()], ahead, rtol=1e-5)


def test_the_derivative_forgets_length_and_scale() -> None:
    """Euler: O does not change along u itself, so that what is pulled back has no part along it."""
    ddp, optimizer = build()
    accumulate(ddp, optimizer)
    optimizer.step()
    (muon,) = (s for s in shards(optimizer) if "momentum_buffer" in s.state)
    u = muon.state["momentum_buffer"].view(-1)
    h = torch.randn(u.numel(), generator=torch.Generator().manual_seed(3))
    v = rule_of(muon).pull_back_ahead(muon, 1.0, h)
    assert abs((v @ u).item()) < 1e-5 * (v.norm() * u.norm()).item()
    assert v.norm() > 0.1 * h.norm() * math.sqrt(6)


def test_what_is_not_followed_is_refused() -> None:
    _, optimizer = build()
    leaf = next(o for o in optimizer.chained_optimizers if hasattr(o.optimizer, "orthogonalize"))
    leaf.optimizer.weight_decay_method = "l2"
    with pytest.raises(DWMError, match=r"weight decay in the gradient \(l2\)"):
        check_supported(optimizer, "exact")
    leaf.optimizer.weight_decay_method = "decoupled"
    leaf.optimizer.tp_mode = "duplicated"
    check_supported(optimizer, "exact")  # one tensor-parallel rank has all of it
