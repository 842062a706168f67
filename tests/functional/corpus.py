"""Tiny Megatron indexed data sets for functional tests."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch


def write_dataset(prefix: Path, seed: int, documents: int = 60, vocabulary: int = 255) -> str:
    """Writes a data set of random walks over the vocabulary, and returns its prefix.

    Neighbouring tokens are close to each other, so a language model has something to learn.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(documents):
        steps = rng.integers(-3, 4, size=int(rng.integers(40, 160)))
        tokens = numpy.abs(numpy.cumsum(steps) + int(rng.integers(vocabulary))) % vocabulary
        builder.add_document(torch.from_numpy(tokens.astype(numpy.int32)), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
