"""The formulas of docs/maths.md, written out once more as they stand there, against the code.

Where a formula is a derivative, it is compared with autograd, too. Not exercised here: the passes
that put the parts together (tests/distributed compares their result with brute force).
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dwm.config import DWMConfig
from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.meta_gradient.ghost.linear import linear_dot  # noqa: E402
from megatron_dwm.meta_gradient.ghost.rule import ByDimension  # noqa: E402
from megatron_dwm.meta_gradient.optimizers import derivatives  # noqa: E402
from megatron_dwm.policies import gate as gates  # noqa: E402
from megatron_dwm.policies.domains import PRIOR, Domains  # noqa: E402
from megatron_dwm.policies.guarding import Guards, guarded_weights  # noqa: E402
from megatron_dwm.policies.learned import Targets  # noqa: E402
from megatron_dwm.policies.maps import SigmoidMap  # noqa: E402
from megatron_dwm.policies.model import _error_gradient  # noqa: E402
from megatron_dwm.policies.ridge import Ridge  # noqa: E402
from megatron_dwm.policies.softmax import score_gradient, weights_from_scores  # noqa: E402
from megatron_dwm.step.loss import SampleLosses  # noqa: E402
from megatron_dwm.step.passes import Passes  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/maths.md").read_text()
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_what_is_named_is_in_the_code() -> None:
    """Each `file.py` and each name in brackets behind it."""
    text = " ".join(PAGE.split())
    found = re.findall(r"`(megatron_dwm/[\w/]+\.py)`(?: \(((?:`[\w.]+`(?:, )?)+)\))?", text)
    assert len(found) > 18
    checked = 0
    for file, names in found:
        tree = ast.parse((ROOT / file).read_text())
        kinds = ast.ClassDef | ast.FunctionDef
        known = {n.name for n in ast.walk(tree) if isinstance(n, kinds)}
        for name in re.findall(r"`([\w.]+)`", names):
            assert set(name.split(".")) <= known, f"{file}: {name}"
            checked += 1
    assert checked > 18


def test_the_scaling_of_a_sample_s_loss() -> None:
    ranks, tokens = 3, [torch.tensor(5), torch.tensor(7)]
    losses = SampleLosses()
    losses.sums = [draw(4), draw(4, seed=1)]
    losses.num_tokens, losses.further = list(tokens), [None, None]
    m, sums = 2, torch.cat(losses.sums)
    by_micro_batch = torch.tensor([5.0] * 4 + [7.0] * 4).double()
    found = losses.contributions(False, ranks)
    assert torch.allclose(found, sums / (by_micro_batch * m * ranks))
    # With --calculate-per-token-loss the tokens of the global batch come once, later.
    assert torch.equal(losses.contributions(True, ranks), sums)
    losses.num_tokens = [None, None]
    assert torch.allclose(losses.contributions(False, ranks, 2), sums * 2 / (m * ranks))
    # From the schedule's gradient to the optimizer's.
    passes = SimpleNamespace(
        shape=SimpleNamespace(per_token=False),
        groups=SimpleNamespace(dp_cp=SimpleNamespace(size=lambda: ranks)),
    )
    assert Passes.gradient_scale(passes, tokens) == 1 / ranks


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum: float, nesterov: bool) -> None:
    lr, dampening = 0.1, 0.0 if nesterov else 0.2
    gradient = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    buffer = momentum * 0.3 + (1 - dampening) * gradient
    update = -lr * gradient
    if momentum:
        update = -lr * (gradient + momentum * buffer if nesterov else buffer)
    (slope,) = torch.autograd.grad(update, gradient)
    assert derivatives.sgd(lr, momentum, dampening, nesterov) == pytest.approx(slope.item())


def test_adam() -> None:
    lr, b1, b2, eps, t = 0.01, 0.9, 0.95, 1e-8, 7
    old_m, old_s = 0.1 * draw(6), 0.1 * draw(6, seed=1).square()
    g = draw(6, seed=2).requires_grad_()
    m, s = b1 * old_m + (1 - b1) * g, b2 * old_s + (1 - b2) * g.square()
    m_hat, rho = m / (1 - b1**t), (s / (1 - b2**t)).sqrt()
    update = -lr * m_hat / (rho + eps)
    (slope,) = torch.autograd.grad(update.sum(), g)
    m, s, m_hat, rho, grad = (x.detach() for x in (m, s, m_hat, rho, g))
    first = (1 - b1) / (1 - b1**t) / (rho + eps)
    second = m_hat * (1 - b2) * grad / ((1 - b2**t) * rho * (rho + eps) ** 2)
    found = derivatives.adam(grad, m, s, t, lr, b1, b2, eps)
    assert torch.allclose(found, -lr * (first - second), rtol=1e-12)
    assert torch.allclose(found, slope, rtol=1e-9)
    ahead = derivatives.adam_expected(s, t, lr, b1, b2, eps)
    expected = -lr * (1 - b1) / (1 - b1 ** (t + 1)) / ((s / (1 - b2**t)).sqrt() + eps)
    assert torch.allclose(ahead, expected, rtol=1e-12)


def test_clipping() -> None:
    limit, delta, g, u = 0.5, 1e-6, draw(5), draw(5, seed=1)

    def clipped(g: torch.Tensor) -> torch.Tensor:
        return g * limit / (torch.linalg.vector_norm(g) + delta)

    jacobian = torch.autograd.functional.jacobian(clipped, g)
    norm = torch.linalg.vector_norm(g)
    k = limit / (norm + delta)
    formula = k * torch.eye(5) - k / (norm * (norm + delta)) * torch.outer(g, g)
    assert torch.allclose(jacobian, formula, rtol=1e-9)
    of_clipped = k * g
    v = k * u - (of_clipped @ u) / (k * norm * (norm + delta)) * of_clipped
    assert torch.allclose(jacobian.T @ u, v, rtol=1e-9)
    a, b = derivatives.clip_projection(norm.item(), limit)
    assert torch.allclose(a * u - b * (of_clipped @ u) * of_clipped, v, rtol=1e-9)
    assert derivatives.clip_projection(norm.item(), 100.0) == (1.0, 0.0)


@pytest.mark.parametrize("width", [3, 9])
def test_ghost_of_a_linear_layer(width: int) -> None:
    x, delta, v = draw(6, 2, 4), draw(6, 2, width, seed=1), draw(width, 4, seed=2)
    expected = torch.einsum("sbo,oi,sbi->b", delta, v, x)
    assert torch.allclose(linear_dot(x, delta, v, ByDimension(1)).double(), expected, rtol=1e-5)
    assert torch.allclose(torch.einsum("oi,sbo->sbi", v, delta).mul(x).sum((0, 2)), expected)


def test_targets() -> None:
    targets, sigma2, weight = Targets(), 0.0, 0.0
    for seed in range(3):
        c = draw(64, seed=seed) * (1 + seed)
        c[0] = 100.0
        centred = c - c.mean()
        rms = centred.square().mean().sqrt()
        kept = centred.clamp(-3 * rms, 3 * rms)
        kept = kept - kept.mean()
        weight = 0.9 * weight + 1
        sigma2 += (kept.square().mean().item() - sigma2) / weight
        expected = (-kept / math.sqrt(sigma2)).clamp(-3, 3)
        assert torch.allclose(targets(c), expected, rtol=1e-9)


def test_ridge() -> None:
    k, f, correlation = 5, 0.9, 0.5
    ridge = Ridge(k, f, None, CPU)
    gram, moment, n = torch.zeros(k, k).double(), torch.zeros(k).double(), 0.0
    for seed in range(4):
        x, z = draw(32, k, seed=seed), draw(32, seed=10 + seed)
        x = x - x.mean(0)
        gram, moment, n = f * gram + x.T @ x, f * moment + x.T @ z, f * n + len(x)
        ridge.update(x.T @ x, x.T @ z, len(x), correlation)
    r2 = correlation**2
    penalty = k * (1 - r2) / (n * r2)
    system = gram + penalty * gram.trace() / k * torch.eye(k)
    w = torch.linalg.solve(system, moment)
    assert torch.allclose(ridge.w, w, rtol=1e-6)
    assert torch.allclose(ridge.scale, (w @ gram @ w / n).rsqrt(), rtol=1e-6)


def test_sigmoid_and_its_normaliser() -> None:
    slope, s = 3.0, draw(40)
    sigmoid = SigmoidMap(slope, Guards(), True, CPU, drifts=True)
    sigmoid.place(torch.tensor(0.2), torch.tensor(1.44))
    nu, q, age = 0.5, 1.0, 0
    for _ in range(30):
        raw = torch.sigmoid(slope * (s - 0.2) / 1.2)
        steady = min(1.0, max(0.0, 1.5 - 2 * math.sqrt(q)))
        found = sigmoid.weights(s).weights.double()
        assert torch.allclose(found, 1 + steady * (raw / nu - 1), rtol=1e-5)
        sigmoid.update(sigmoid.sums(s))
        age += 1
        nu += max(0.05, 1 / age) * (raw.mean().item() - nu)
        moved = (s.mean().item() - 0.2) ** 2 / 1.44
        q += max(0.1, 1 / (age + 2)) * (moved - q)
    assert steady > 0


def test_softmax_and_its_gradient() -> None:
    tau, c = 0.7, draw(12, seed=1)
    s = draw(12).requires_grad_()
    w = 12 * torch.softmax(s / tau, 0)
    assert torch.allclose(weights_from_scores(s, tau).double(), w, rtol=1e-5)
    (slope,) = torch.autograd.grad((w * c).sum(), s)
    formula = w / tau * (c - (w * c).sum() / 12)
    assert torch.allclose(slope, formula, rtol=1e-9)
    assert torch.allclose(score_gradient(s.detach(), c, tau).double(), formula, rtol=1e-4)


def test_error_that_a_model_learns_by() -> None:
    z, s = draw(9, seed=1), draw(9).requires_grad_()
    ((s - s.mean()) - (z - z.mean())).square().mean().backward()
    assert torch.allclose(_error_gradient(s.detach(), z), s.grad, rtol=1e-9)


def test_guards() -> None:
    w = 1 + 0.8 * draw(50).clamp(-1, 1)
    w = w / w.mean()
    share = w.sum() ** 2 / (50 * w.square().sum())
    assert share.item() == pytest.approx(1 / (1 + w.var(correction=0).item()))
    sigmoid = SigmoidMap(1.0, Guards(0.9, 0.1, None), False, CPU)
    variance = w.var(correction=0).double()
    sigmoid.state = torch.cat([sigmoid.state[:2], variance.view(1), sigmoid.state[3:]])
    f = min(1.0, math.sqrt((1 / 0.9 - 1) / w.var(correction=0).item()))
    assert torch.allclose(sigmoid._guarded(w), 0.9 * (1 + f * (w - 1)) + 0.1)
    found = guarded_weights(3 * draw(50), 1.0, Guards(0.6, 0.2, 2.0)).weights
    assert found.mean().item() == pytest.approx(1) and found.max() <= 2 and found.min() >= 0.2
    floor = guarded_weights(3 * draw(50), 1.0, Guards(0.6)).weights
    assert (50**2 / (50 * floor.square().sum())).item() == pytest.approx(0.6, rel=1e-6)


def test_gate() -> None:
    gate, seen, n = gates.Gate(), [], 24
    for seed in range(8):
        scores, c = draw(n, seed=seed), draw(n, seed=100 + seed)
        c = c - 0.8 * scores
        gate.observe(scores, c)
        seen.append(torch.corrcoef(torch.stack([scores, -c]))[0, 1].item())
        q = [0.95 ** (len(seen) - 1 - j) for j in range(len(seen))]
        mean = sum(a * r for a, r in zip(q, seen, strict=True)) / sum(q)
        square = sum(a * r * r for a, r in zip(q, seen, strict=True)) / sum(q)
        variance = max(square - mean**2, 1 / (n - 1))
        error = math.sqrt(variance * sum(a * a for a in q)) / sum(q)
        opening = min(1.0, max(0.0, (mean - 2 * error) / 0.2)) if len(seen) > 2 else 0.0
        assert gate.mean == pytest.approx(mean)
        assert gate.standard_error(n) == pytest.approx(error)
        assert gate.opening == pytest.approx(opening)
    assert 0 < opening


def test_domains() -> None:
    domains = Domains.__new__(Domains)
    domains.sums = torch.tensor([[30.0, 100.0], [-20.0, 50.0], [1.0, 10.0]]).double()
    total, count = domains.sums.unbind(1)
    m, p = total / (count + PRIOR), count / count.sum()
    centred = m - (p * m).sum()
    expected = centred / (p * centred.square()).sum().sqrt()
    assert PRIOR == 16 and torch.allclose(domains.scores(), expected)


def test_defaults_that_the_page_names() -> None:
    config = DWMConfig()
    assert config.slope == 3 and gates.FULL == 0.2 and gates.LEAST == 3 and gates.DECAY == 0.95
