"""Run by run_many.py: examples/pretrain_dwm.py where ranks do not all see or do the same.

Environment of a run:

    DATA_RANKS=1  the data provider is called on the ranks that read data only
    FOREIGN=1     and it returns a data set that cannot be drawn from by weight
    UNSHARED=1    rank 1 does not see weight files, as on a file system that is not shared
"""

import contextlib
import os
import sys
from unittest import mock

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from examples import pretrain_dwm  # noqa: E402

build_datasets, exists = pretrain_dwm.build_datasets, os.path.exists


def on_data_ranks(*args, **kwargs):
    """Builds without a word to the ranks that do not read data: it has no `is_distributed`."""
    with mock.patch.object(torch.distributed, "barrier", lambda *args, **kwargs: None):
        training, *others = build_datasets(*args, **kwargs)
    if os.environ.get("FOREIGN") == "1":
        training = torch.utils.data.Subset(training, range(len(training)))
    return training, *others


def unless_weights(path):
    """As `os.path.exists` on a rank that does not see weight files."""
    return exists(path) and not str(path).endswith(".weights")


def main():
    """Runs the example with what the environment asks for."""
    with contextlib.ExitStack() as stack:
        if os.environ.get("DATA_RANKS") == "1":
            stack.enter_context(mock.patch.object(pretrain_dwm, "build_datasets", on_data_ranks))
        if os.environ.get("UNSHARED") == "1" and os.environ["RANK"] == "1":
            stack.enter_context(mock.patch.object(os.path, "exists", unless_weights))
        pretrain_dwm.main()


if __name__ == "__main__":  # the checkpoint writer's helpers import this file
    main()
