"""Arithmetic of a training step and of what weighting adds to it, pass by pass.

It counts matrix products, with a multiplication and an addition each, like
`torch.utils.flop_counter.FlopCounterMode`, on one rank of a pipeline stage. With

    T    tokens of a micro-batch (on one context-parallel rank)
    L    sum over matrices of 2 T uses out in / ranks that split it
    A    sum over layers of 2 T s causal_share heads (d_query + d_value) / tensor-parallel ranks
    F  = L + A, a micro-batch forward; R what the backward pass recomputes
    m    micro-batches of a step, m' of a meta batch

a backward pass costs 2 F: the gradients of inputs and of weights (or of both factors, in
attention). So, on a rank:

    stock step                  m (3 F + R)
    C  meta                     m' (3 F + R)        the trainer's schedule on the meta batch
    D  ghost, next              m (3 F + R - L + G) the same without weight gradients, plus G
    D  ghost, current           m G                 as part of the training pass
    D  finite_difference        2 m F (1 + 1/100)   forward only; the check of linearity repeats it

    G = L, one product per matrix (`ghost.linear.linear_dot`), but
        2 L for a matrix that is fused with its norm (`norm_column_linear`), and 2 L for a router,
        whose logits are recomputed (`ghost.experts.router`)
    E  head                     2 n k^2 in the regression's Gram matrix, on the last stage
    A  model                    m F' per step, F' the weighting model's
    E  model                    3 m F' per update, m F' for each pass over past samples

Everything that is not a matrix product is left out: softmax, norms, the optimizer, the Cholesky
decomposition of a k x k matrix, k <= 1024 (`head.LIMIT`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dwm.meta_gradient.finite_difference import LINEARITY_INTERVAL
from megatron_dwm.planning.model import Layout, Matrix, Method, Model, Run, Stage

# Ghost's products for a matrix, relative to its forward product.
_TWICE = ("TELayerNormColumnParallelLinear", "TopKRouter")


@dataclass(frozen=True)
class MicroBatch:
    """Arithmetic of one micro-batch on one rank of a stage.

    Attributes:
        linear: L.
        attention: A.
        again: R.
        inner: G.
    """

    linear: float
    attention: float
    again: float
    inner: float

    @property
    def forward(self) -> float:
        """F."""
        return self.linear + self.attention

    @property
    def training(self) -> float:
        """Forward and backward."""
        return 3 * self.forward + self.again

    def influence(self, method: Method) -> float:
        """Pass D, including its linearity check on average."""
        if method.estimator == "finite_difference":
            return 2 * self.forward * (1 + 1 / LINEARITY_INTERVAL)
        if method.lookahead == "current":
            return self.inner
        return self.training - self.linear + self.inner


def of_matrix(matrix: Matrix, tokens: float, layout: Layout) -> float:
    """Returns the FLOPs of a forward product on one rank."""
    ways = layout.tp
    if matrix.split == "none":
        ways = layout.sequence_share
    return 2.0 * tokens * matrix.uses * matrix.rows * matrix.columns / ways


def micro_batch(model: Model, stage: Stage, run: Run, samples: int | None = None) -> MicroBatch:
    """Returns the arithmetic of a micro-batch of `samples` (the run's own size)."""
    layout, seq = run.layout, run.batch.seq
    tokens = (samples or run.batch.micro) * seq / layout.cp

    def linear(matrices: list[Matrix]) -> float:
        return sum(of_matrix(m, tokens, layout) for m in matrices)

    heads = sum(layer.attention for layer in stage.layers)
    attention = 2.0 * tokens * seq * model.causal_share * heads / layout.tp
    of_layers = linear([m for layer in stage.layers for m in layer.matrices]) + attention
    again = model.recomputed_share(stage, layout) * of_layers
    if model.recompute == "attention":
        again = attention
    inner = linear(stage.matrices) + linear([m for m in stage.matrices if m.layer in _TWICE])
    return MicroBatch(linear(stage.matrices), attention, again, inner)


def stock_step(run: Run, stage: int) -> float:
    """Returns the arithmetic of a stock step on one rank of a stage."""
    once = micro_batch(run.model, run.model.stages[stage], run)
    return run.batch.micro_batches(run.layout) * once.training


def plain_step(run: Run, stage: int) -> dict[str, float]:
    """Returns what weighting adds to every step on one rank of a stage, by pass."""
    found: dict[str, float] = {}
    weighting, count = run.weighting, run.batch.micro_batches(run.layout)
    if weighting.dwm is not None:
        own = micro_batch(weighting.dwm, weighting.dwm.stages[stage], run)
        found["A score"] = count * own.forward
    if weighting.ahead:
        once = micro_batch(run.model, run.model.stages[stage], run)
        found["C meta"] = run.batch.meta_micro_batches(run.layout) * once.training
        found["D influence"] = count * (once.training - once.linear + once.inner)
    return found


def meta_step(run: Run, stage: int, method: Method) -> dict[str, float]:
    """Returns what weighting adds to a meta step on one rank of a stage, by pass."""
    found = dict(plain_step(run, stage))
    weighting, count = run.weighting, run.batch.micro_batches(run.layout)
    once = micro_batch(run.model, run.model.stages[stage], run)
    meta = run.batch.meta_micro_batches(run.layout) * once.training
    found["C meta"] = found.get("C meta", 0.0) + meta
    found["D influence"] = found.get("D influence", 0.0) + count * once.influence(method)
    update = 0.0
    if weighting.head and stage == len(run.model.stages) - 1:
        update += _of_regression(run)
    if weighting.dwm is not None:
        own = micro_batch(weighting.dwm, weighting.dwm.stages[stage], run)
        update += count * (weighting.updates * own.training + weighting.scorings * own.forward)
    found["E update"] = update
    return found


def _of_regression(run: Run) -> float:
    return 2.0 * run.batch.samples / run.layout.dp * run.weighting.regression**2


def lesson(run: Run, stage: int) -> float:
    """Returns what a plain step adds if a head teaches the weighting model."""
    weighting = run.weighting
    if weighting.dwm is None or not weighting.taught:
        return 0.0
    own = micro_batch(weighting.dwm, weighting.dwm.stages[stage], run)
    return run.batch.micro_batches(run.layout) * own.training


def in_stock_steps(run: Run, method: Method | None) -> float:
    """Returns a step's time relative to the stock step's, by arithmetic and idle pipeline stages.

    A pass over m micro-batches takes as long as m + (p - 1) / v of them on the slowest stage: p
    stages with v virtual ones each are filled and drained once (Narayanan et al., 2021, arXiv
    2104.04473, section 2.2). A small meta batch therefore costs more than its share.

    Args:
        run: the run to plan.
        method: method of a meta step; None: a plain step.
    """
    layout = run.layout
    idle = (layout.pp - 1) / layout.vp
    count, meta = run.batch.micro_batches(layout), run.batch.meta_micro_batches(layout)
    every = [micro_batch(run.model, stage, run) for stage in run.model.stages]
    training = max(once.training for once in every)
    stock = (count + idle) * training
    weighting, extra = run.weighting, 0.0
    if weighting.dwm is not None:
        own = [micro_batch(weighting.dwm, stage, run) for stage in weighting.dwm.stages]
        # One chunk per stage, whatever the language model has.
        filled = count + layout.pp - 1
        extra += filled * max(once.forward for once in own)
        of_update = filled * max(once.training for once in own)
        of_scoring = filled * max(once.forward for once in own)
        if method is not None:
            extra += weighting.updates * of_update + weighting.scorings * of_scoring
        elif weighting.taught:
            extra += of_update
    if weighting.ahead:
        extra += (meta + idle) * training
        extra += (count + idle) * max(o.training - o.linear + o.inner for o in every)
    if method is not None:
        extra += (meta + idle) * training
        extra += (count + idle) * max(once.influence(method) for once in every)
        extra += _of_regression(run)
    return 1 + extra / stock if stock else math.nan
