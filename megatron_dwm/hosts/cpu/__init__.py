"""Runs the trainer on a machine without a GPU: a stand-in for CUDA, for laptops, tests and CI."""

from megatron_dwm.hosts.cpu.stand_in import (
    CPU_FLAGS,
    default_flags,
    device,
    install,
    is_cpu,
    is_idle,
    wanted,
)

__all__ = ["CPU_FLAGS", "default_flags", "device", "install", "is_cpu", "is_idle", "wanted"]
