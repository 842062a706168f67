"""The stand-in for Mamba's kernels computes what they are documented to: its dual form agrees.

The recurrence is compared with the attention-like sum that it is equal to, written with loops:

    y_t = sum_{r <= t} (C_t . B_r) exp(A sum_{q = r+1..t} dt_q) dt_r x_r + D x_t,   y silu(z)

Not exercised here: the kernels themselves. Muon's stand-in is in tests/contract.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_dwm.hosts import cpu

cpu.install()

from tests.recipes import stand_ins  # noqa: E402

B, L, HEADS, P, GROUPS, N, WIDTH = 2, 6, 4, 3, 2, 5, 4


def dual_form(zxbcdt, weight, bias, dt_bias, a, d):
    inner = HEADS * P
    z, x, b, c, dt = zxbcdt.split([inner, inner, GROUPS * N, GROUPS * N, HEADS], dim=-1)
    mixed = torch.cat([x, b, c], dim=-1)
    conv = torch.zeros_like(mixed)
    for t in range(L):
        conv[:, t] = bias
        for k in range(WIDTH):
            at = t - (WIDTH - 1) + k
            if at >= 0:
                conv[:, t] += weight[:, k] * mixed[:, at]
    x, b, c = F.silu(conv).split([inner, GROUPS * N, GROUPS * N], dim=-1)
    dt = F.softplus(dt + dt_bias)
    out = torch.zeros(B, L, inner)
    for head in range(HEADS):
        group, mine = head // (HEADS // GROUPS), slice(head * P, (head + 1) * P)
        keys = slice(group * N, (group + 1) * N)
        for t in range(L):
            out[:, t, mine] = d[head] * x[:, t, mine]
            for r in range(t + 1):
                match = (c[:, t, keys] * b[:, r, keys]).sum(-1)
                decay = torch.exp(a[head] * dt[:, r + 1 : t + 1, head].sum(1))
                out[:, t, mine] += (match * decay * dt[:, r, head])[:, None] * x[:, r, mine]
    return out * F.silu(z)


def test_the_recurrence_is_its_dual_form():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    conv = HEADS * P + 2 * GROUPS * N
    inputs = (
        draw(B, L, 2 * HEADS * P + 2 * GROUPS * N + HEADS),
        draw(conv, WIDTH),
        draw(conv),
        draw(HEADS),
        -draw(HEADS).abs(),
    )
    d = draw(HEADS)
    found = stand_ins.split_conv1d_scan(*inputs, D=d, headdim=P, ngroups=GROUPS, chunk_size=128)
    assert torch.allclose(found, dual_form(*inputs, d), atol=1e-5)


def test_the_norm_is_of_each_group():
    norm = stand_ins.GroupedRMSNorm(6, eps=1e-5, group_size=3, device=None, dtype=torch.float32)
    x = torch.tensor([[1.0, 2.0, 2.0, 10.0, 20.0, 20.0]])
    assert torch.allclose(norm(x), (x / torch.tensor([3.0, 30.0]).repeat_interleave(3)) * 3**0.5)
