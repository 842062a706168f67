"""Megatron's process groups on one rank, once per test file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Any]:
    """Sets up the groups; gives them as a `ProcessGroupCollection`."""
    import torch

    from megatron_dwm.hosts import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "gloo" if cpu.is_cpu() else "nccl"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend=backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(123)
    yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def groups(one_rank: Any) -> Any:
    """The same, by what it gives."""
    return one_rank
