"""Part of the CPU stand-in: data loaders leave the generator of the device alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.data import dataloader


def keep_generator_from_data_loaders() -> None:
    """Keeps an iterator over a data loader from drawing of the generator that dropout draws of.

    It draws a seed for its workers from the CPU's generator, which on a GPU has nothing to do with
    dropout. Here both are one, and a run that is resumed, with new iterators after its random
    state is loaded, would go on with other dropout masks than the run that was not stopped.
    """
    cls = dataloader._BaseDataLoaderIter
    init = cls.__init__

    @functools.wraps(init)
    def leaving_generator(self: Any, *args: Any, **kwargs: Any) -> None:
        state = torch.get_rng_state()
        init(self, *args, **kwargs)
        torch.set_rng_state(state)

    cls.__init__ = leaving_generator
