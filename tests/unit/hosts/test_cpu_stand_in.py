"""The CPU's stand-in where torch leaves a mode behind, and where gloo does less than NCCL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from megatron_dwm.hosts import cpu

cpu.install()


class NewOnDevice(torch.autograd.Function):
    """Makes a tensor on the device, by its number, in its backward pass, as Megatron does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.new_empty(grad.shape, device=torch.cuda.current_device()).fill_(2.0)


class Recomputed(torch.autograd.Function):
    """Computes again in its backward pass, and calls another one from there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(NewOnDevice.apply(x), grad)
        return x.grad


@pytest.mark.skipif(not cpu.is_cpu(), reason="about the CPU's stand-in")
def test_a_backward_pass_within_another_is_on_the_cpu_too() -> None:
    x = torch.ones(3, requires_grad=True)
    Recomputed.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def gather(rank: int, folder: str) -> None:
    """A rank that gathers parts of different sizes, and some of one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for sizes in ((2, 3), (2, 2), (0, 1)):
        parts = [torch.empty(size) for size in sizes]
        torch.distributed.all_gather(parts, torch.full((sizes[rank],), float(rank + 1)))
        assert [part.tolist() for part in parts] == [[1.0] * sizes[0], [2.0] * sizes[1]]


@pytest.mark.skipif(not cpu.is_cpu(), reason="about the CPU's stand-in")
def test_parts_of_different_sizes_are_gathered(tmp_path: Any) -> None:
    mp.spawn(gather, (str(tmp_path),), nprocs=2)
