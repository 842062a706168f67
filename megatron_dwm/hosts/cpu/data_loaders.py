"""Part of the CPU stand-in: data loaders do not draw from the device's generator."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.data import dataloader


def keep_generator_from_data_loaders() -> None:
    """Keeps data-loader iterators from drawing from the generator that dropout uses.

    An iterator draws a seed for its workers from the CPU's generator, which on a GPU has nothing to
    do with dropout. Here both are the same generator, and a resumed run, which creates new
    iterators after loading its random state, would get other dropout masks than the run that was
    not stopped.
    """
    cls = dataloader._BaseDataLoaderIter
    init = cls.__init__

    @functools.wraps(init)
    def leaving_generator(self: Any, *args: Any, **kwargs: Any) -> None:
        state = torch.get_rng_state()
        init(self, *args, **kwargs)
        torch.set_rng_state(state)

    cls.__init__ = leaving_generator
