"""Part of the CPU stand-in: the generators of CUDA devices are the CPU's."""

from __future__ import annotations

import logging
import types
from typing import Any

import torch

from megatron_dwm.hosts.cpu.on_import import ON_IMPORT

_RNG_WARNING = "CPU RNG state changed within GPU RNG context"


def replace_rng() -> None:
    """Maps the CUDA generators to the CPU's.

    `megatron.core.tensor_parallel.random` has its own accessors, which use the default CUDA
    generators, so those two are replaced when that module is imported.
    """

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *a, **k: torch.get_rng_state()
        module.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed))
        module.initial_seed = lambda: torch.default_generator.initial_seed()
    torch.cuda.default_generators = (torch.default_generator,) * max(1, torch.cuda.device_count())

    def patch(module: types.ModuleType) -> None:
        module._get_cuda_rng_state = get_state  # type: ignore[attr-defined]
        module._set_cuda_rng_state = set_state  # type: ignore[attr-defined]
        logging.getLogger(module.__name__).addFilter(
            lambda record: _RNG_WARNING not in record.getMessage()
        )

    ON_IMPORT.patch_on_import("megatron.core.tensor_parallel.random", patch)
