"""The work space of a meta step, against figures worked out by hand."""

from __future__ import annotations

import dataclasses

from megatron_dwm.planning.memory import _work_space
from megatron_dwm.planning.model import (
    DIFFERENCE,
    GHOST_CURRENT,
    Batch,
    Layer,
    Layout,
    Matrix,
    Model,
    Precision,
    Run,
    Stage,
    Weighting,
)

MATRICES = (
    Matrix("qkv", "ColumnParallelLinear", 96, 32, "column"),
    Matrix("proj", "RowParallelLinear", 32, 64, "row"),
    Matrix("router", "TopKRouter", 4, 32),
    Matrix("up", "ColumnParallelLinear", 80, 32, "expert column", copies=4, uses=2),
)
STAGE = Stage((Layer(MATRICES, (), attention=64),))
RUN = Run(
    Model((STAGE,), hidden=32),
    Layout(tp=2, dp=2, ep=2),
    Batch(micro=2, seq=8, samples=4, meta_samples=4),
    Precision(parameter=2, gradient=4),
    Weighting(),
)
IN_16_BITS = dataclasses.replace(RUN, precision=Precision(parameter=2, gradient=2))


def test_finite_difference_copies_the_largest_parameter() -> None:
    """One expert has 80 * 32 elements; of QKV a rank has half of 96 * 32, which is less."""
    assert _work_space(RUN, STAGE, DIFFERENCE) == 2 * 4 * 80 * 32
    assert _work_space(IN_16_BITS, STAGE, DIFFERENCE) == 3 * 4 * 80 * 32


def test_ghost_makes_one_product() -> None:
    """16 tokens. Products of QKV and of the projection are [16, 32], the smaller side of each.

    An expert gets 8 tokens. In 16 bits and twice in 32 an element takes 10 bytes, and v of QKV,
    48 rows of 32, 2 bytes an element where it is not in the passes' precision yet.
    """
    assert _work_space(RUN, STAGE, GHOST_CURRENT) == max(
        16 * 32 * 10 + 2 * 48 * 32,  # QKV
        16 * 32 * 10 + 2 * 32 * 32,  # the projection
        8 * 32 * 10 + 2 * 80 * 32,  # an expert
    )
    assert _work_space(IN_16_BITS, STAGE, GHOST_CURRENT) == 16 * 32 * 10


def test_stage_without_weights_needs_none() -> None:
    for method in (DIFFERENCE, GHOST_CURRENT):
        assert _work_space(RUN, Stage(()), method) == 0
