"""Bytes that one rank sends for weighting, by process group.

What a rank sends in a collective on a tensor of B bytes among n ranks, with ring algorithms
(Thakur, Rabenseifner and Gropp, 2005; NCCL's bus bandwidth uses the same counts):

    all-reduce 2 (n-1)/n B    reduce-scatter (n-1)/n B, B the input    broadcast (n-1)/n B
    all-gather (n-1) B, B its own part    all-to-all (n-1)/n B    to the next stage B

Weighting has its own collectives, all in `core.collectives`, and repeats those of the trainer's
passes. With H = b s h p bytes of hidden states of a micro-batch, a pass over it sends

    TP  forward   H all-reduced after the embedding and each row-parallel matrix; the loss's three
                  numbers a position in float32; what the data loader's rank 0 has read
        backward  the input's gradient all-reduced at each column-parallel matrix
        with sequence parallelism an all-reduce becomes a reduce-scatter there and an all-gather
        at the other kind of matrix, and where weight gradients are taken, column-parallel inputs
        are gathered once more
    PP  forward   H to the next stage (H / tp with sequence parallelism), times virtual stages
        backward  its gradient to the one before
    EP  each way  the tokens of each MoE layer out and back, times experts a token, with their
                  probabilities (all-to-all), or gathered and reduce-scattered (all-gather)

and pass C ends with the reduction of h (all-reduce, or reduce-scatter for the distributed
optimizer), the sums of norms' gradients and of tied embeddings (`finalize_model_grads`), and, with
the distributed optimizer, v's all-gather (`pull_back._transform`), in the buffers' precision.
Ghost's hooks gather once more what sequence parallelism has split (`ghost.linear`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from megatron_dwm.meta_gradient.finite_difference import LINEARITY_INTERVAL, RELATIVE_STEPS
from megatron_dwm.planning.model import Layer, Layout, Matrix, Method, Model, Run, Stage

TP, PP, DP, CP, EP = "TP", "PP", "DP", "CP", "EP"
EXPERT_TP, EXPERT_DP, TP_EP = "expert TP", "expert DP", "TP x EP"
TP_PP, ENDS, WORLD = "TP x PP", "first and last stage", "world"
# The order in which groups are shown.
GROUPS = (TP, PP, DP, CP, EP, TP_EP, EXPERT_TP, EXPERT_DP, TP_PP, ENDS, WORLD)
_LONG, _DOUBLE, _FLOAT = 8, 8, 4
# The loss of a split vocabulary: largest logit, the label's, and the sum of exponentials.
_OF_LOSS = 3
# Sums of the head's map and scores, in addition to its features' (`Head.end`).
_OF_MAP = 9


def sizes(layout: Layout) -> dict[str, int]:
    """Returns the number of ranks of each group."""
    return {
        TP: layout.tp,
        PP: layout.pp,
        DP: layout.dp,
        CP: layout.cp,
        EP: layout.ep,
        TP_EP: layout.ep * layout.etp,
        EXPERT_TP: layout.etp,
        EXPERT_DP: layout.expert_dp,
        TP_PP: layout.tp * layout.pp,
        ENDS: min(2, layout.pp),
        WORLD: layout.world,
    }


def sent(kind: str, size: float, ranks: int) -> float:
    """Returns the bytes that a rank sends in a collective.

    Args:
        kind: `all_reduce`, `reduce_scatter`, `broadcast`, `all_gather`, `all_to_all`, `send`.
        size: B of the docstring above.
        ranks: n.
    """
    if kind == "send":
        return size
    others = ranks - 1
    if kind == "all_gather":
        return others * size
    return (2 if kind == "all_reduce" else 1) * others / ranks * size


@dataclass
class Sent:
    """Adds up what one rank sends, by group."""

    layout: Layout
    bytes: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, kind: str, group: str, size: float, times: float = 1.0) -> None:
        """Adds a collective of a group."""
        ranks = sizes(self.layout)[group]
        if ranks > 1 and size and times:
            self.bytes[group] += times * sent(kind, size, ranks)

    def take(self, other: Sent, times: float = 1.0) -> None:
        """Adds the sums of another."""
        for group, count in other.bytes.items():
            self.bytes[group] += times * count


@dataclass(frozen=True)
class Pass:
    """A pass over micro-batches: forward, backward, and what it includes."""

    backward: bool = True
    weight_gradients: bool = True
    ghost: bool = False


TRAINING, FORWARD = Pass(), Pass(backward=False)
INPUTS_ONLY = Pass(weight_gradients=False, ghost=True)


def micro_batch(model: Model, run: Run, stage: int, kind: Pass, tokens_only: bool = False) -> Sent:
    """Returns what a pass over one micro-batch sends from one rank of a stage.

    Args:
        model: the language model, or the weighting model.
        run: the run to plan.
        stage: pipeline rank.
        kind: kind of the pass.
        tokens_only: whether it reads only tokens (the weighting model).
    """
    found, part = Sent(run.layout), model.stages[stage]
    positions = run.batch.micro * run.batch.seq / run.layout.cp
    again = model.recomputed_share(part, run.layout) if kind.backward else 0.0
    if part.embedding is not None:
        width = positions * model.hidden * run.precision.parameter
        sequence = run.layout.sequence_parallel and not tokens_only
        found.add("reduce_scatter" if sequence else "all_reduce", TP, width)
        if sequence and kind.backward:
            found.add("all_gather", TP, width / run.layout.tp, 1 + kind.ghost)
    for layer in part.layers:
        for matrix in layer.matrices:
            _of_matrix(found, matrix, run, positions, kind, 1 + again, tokens_only)
        if layer.routed:
            _of_experts(found, layer, model, run, positions, kind, 1 + again)
    if part.output is not None:
        _of_matrix(found, part.output, run, positions, kind, 1.0, tokens_only)
        found.add("all_reduce", TP, positions * _FLOAT, _OF_LOSS)
    _of_data(found, part, run, tokens_only)
    _of_pipeline(found, model, run, stage, kind, tokens_only)
    return found


def _of_matrix(
    found: Sent,
    matrix: Matrix,
    run: Run,
    positions: float,
    kind: Pass,
    forwards: float,
    tokens_only: bool,
) -> None:
    """Adds what a matrix split over tensor-parallel ranks sends."""
    p, tp = run.precision.parameter, run.layout.tp
    backwards = 1.0 if kind.backward else 0.0
    sequence = run.layout.sequence_parallel and not tokens_only
    if matrix.split == "column":
        width = positions * matrix.columns * p
        if sequence:
            gathers = forwards + backwards * kind.weight_gradients
            if kind.ghost:
                gathers += 2 if matrix.layer == "TELayerNormColumnParallelLinear" else 1
            found.add("all_gather", TP, width / tp, gathers)
            found.add("reduce_scatter", TP, width, backwards)
        else:
            found.add("all_reduce", TP, width, backwards)
        if matrix.gathered:
            found.add("all_gather", TP, positions * matrix.rows * p / tp, forwards)
    elif matrix.split == "row":
        width = positions * matrix.rows * p
        if sequence:
            found.add("reduce_scatter", TP, width, forwards)
            found.add("all_gather", TP, width / tp, backwards + kind.ghost)
        else:
            found.add("all_reduce", TP, width, forwards)


def _of_experts(
    found: Sent,
    layer: Layer,
    model: Model,
    run: Run,
    positions: float,
    kind: Pass,
    forwards: float,
) -> None:
    """Adds what the tokens of an MoE layer send, out and back."""
    p, layout = run.precision.parameter, run.layout
    tokens = positions / layout.sequence_share
    ways = forwards + (1.0 if kind.backward else 0.0)
    if kind.ghost:  # which rank's tokens an expert's rows are, `ghost.experts`
        found.add("all_gather", TP_EP, 2 * tokens * layer.experts * p, forwards)
    if model.dispatcher == "allgather":
        both = layout.ep * layout.etp
        found.add("all_gather", TP_EP, tokens * layer.experts, forwards)
        found.add("all_gather", TP_EP, tokens * (layer.experts + model.hidden) * p, forwards)
        found.add("reduce_scatter", TP_EP, tokens * both * model.hidden * p, forwards)
        if kind.backward:
            width = tokens * both * (layer.experts + model.hidden) * p
            found.add("reduce_scatter", TP_EP, width)
            found.add("all_gather", TP_EP, tokens * model.hidden * p)
        return
    copies = tokens * layer.routed
    found.add("all_gather", TP_EP, layer.experts * _LONG, forwards)
    found.add("all_to_all", EP, copies * (2 * model.hidden * p + p), ways)
    # Gathered on the way out, with its gradient reduced; the reverse on the way back.
    found.add("all_gather", EXPERT_TP, copies * (model.hidden * p + p), forwards)
    found.add("reduce_scatter", EXPERT_TP, copies * layout.etp * model.hidden * p, forwards)
    if kind.backward:
        width = copies * layout.etp * (model.hidden * p + p)
        found.add("reduce_scatter", EXPERT_TP, width)
        found.add("all_gather", EXPERT_TP, copies * model.hidden * p)


def _of_data(found: Sent, part: Stage, run: Run, tokens_only: bool) -> None:
    """Adds what the rank that reads the data sends to its tensor-parallel peers."""
    samples, seq = run.batch.micro, run.batch.seq
    first, last = part.embedding is not None, part.output is not None
    # Tokens and positions; labels and the loss mask.
    width = first * (_LONG if tokens_only else 2 * _LONG)
    width += 0 if tokens_only else last * (_LONG + _FLOAT)
    found.add("broadcast", TP, samples * seq * width)
    if run.mask_in_batches and not tokens_only and (first or last):
        found.add("broadcast", TP, samples * seq * seq)


def _of_pipeline(
    found: Sent, model: Model, run: Run, stage: int, kind: Pass, tokens_only: bool
) -> None:
    """Adds what is sent to the previous and next stage."""
    layout, last = run.layout, stage == run.layout.pp - 1
    chunks = 1 if tokens_only else layout.vp
    positions = run.batch.micro * run.batch.seq / layout.cp
    share = 1 if tokens_only else layout.sequence_share
    width = positions * model.hidden * run.precision.parameter / share
    found.add("send", PP, width, chunks - last)
    if kind.backward:
        found.add("send", PP, width, chunks - (stage == 0))


def gradients(model: Model, run: Run, stage: int, own: bool = False) -> Sent:
    """Returns what the end of a pass with weight gradients sends.

    Args:
        model: the language model, or the weighting model.
        run: the run to plan.
        stage: pipeline rank.
        own: whether it is the weighting model, whose gradients are in float32.
    """
    found, part = Sent(run.layout), model.stages[stage]
    precision = run.precision
    g = _FLOAT if own else precision.gradient
    dense, experts = part.parameters(run.layout)
    kind = "reduce_scatter" if precision.distributed else "all_reduce"
    found.add(kind, DP, g * dense)
    found.add(kind, EXPERT_DP, g * experts)
    if own:
        return found
    # `finalize_model_grads`: replicated parameters of which each rank sees a part of the gradient.
    summed = [n.size for n in part.norms if run.layout.sequence_parallel or n.of_heads]
    found.add("all_reduce", TP, g * sum(summed))
    if model.shared_copy and (part.embedding is not None or part.output is not None):
        matrix = part.embedding if part.embedding is not None else part.output
        assert matrix is not None
        found.add("all_reduce", ENDS, g * matrix.local(run.layout))
    if run.per_token:
        found.add("broadcast", PP, _FLOAT)
        found.add("all_reduce", DP, _FLOAT)
    return found


def gathered(model: Model, run: Run, stage: int, size: int) -> Sent:
    """Returns what is sent to gather parameters, or v, of `size` bytes per element."""
    found = Sent(run.layout)
    if run.precision.distributed:
        dense, experts = model.stages[stage].parameters(run.layout)
        found.add("all_gather", DP, size * dense / run.layout.dp)
        found.add("all_gather", EXPERT_DP, size * experts / run.layout.expert_dp)
    return found


def plain_step(run: Run, stage: int) -> dict[str, float]:
    """Returns what weighting adds to every step."""
    found, weighting, batch = Sent(run.layout), run.weighting, run.batch
    if not weighting.weighs:
        return found.bytes
    local, last = batch.samples // run.layout.dp, stage == run.layout.pp - 1
    count = batch.micro_batches(run.layout)
    if last:
        # Each sample's data set; for the log, weights and data sets.
        found.add("broadcast", TP, local * _LONG)
        found.add("all_gather", DP, local * (_FLOAT + _LONG))
        if weighting.head:
            found.add("all_reduce", DP, _DOUBLE * (2 * weighting.head + 1 + _OF_MAP))
            if run.layout.sequence_parallel:
                moments = batch.micro * (weighting.head - 1) * _FLOAT
                found.add("all_gather", TP, moments, count)
    if weighting.dwm is not None:
        found.take(_dwm_pass(run, stage, FORWARD))
        if last and weighting.whole_batch:
            found.add("all_gather", DP, local * _FLOAT)
            found.add("all_reduce", TP, _FLOAT)
        # Flags for bad scores and broken state.
        found.add("all_reduce", WORLD, _DOUBLE)
    if weighting.ahead:
        found.take(_meta_pass(run, stage))
        found.take(micro_batch(run.model, run, stage, INPUTS_ONLY), count)
        found.take(_values(run, stage, local, last))
        found.add("all_reduce", WORLD, _DOUBLE, 2)
    return found.bytes


def lesson(run: Run, stage: int) -> dict[str, float]:
    """Returns what a plain step adds if a head teaches the weighting model."""
    found = Sent(run.layout)
    if run.weighting.dwm is not None and run.weighting.taught:
        found.take(_dwm_update(run, stage))
        if stage == run.layout.pp - 1:
            local = run.batch.samples // run.layout.dp
            found.add("all_gather", DP, local * (_FLOAT + _DOUBLE))
    return found.bytes


def meta_step(run: Run, stage: int, method: Method) -> dict[str, float]:
    """Returns what weighting adds to a meta step, including a plain step's share."""
    found, weighting, batch = Sent(run.layout), run.weighting, run.batch
    for group, size in plain_step(run, stage).items():
        found.bytes[group] += size
    local, last = batch.samples // run.layout.dp, stage == run.layout.pp - 1
    count = batch.micro_batches(run.layout)
    # C, with v; parameters are gathered before the passes if the trainer overlaps the gathering
    found.take(_meta_pass(run, stage))
    if run.precision.overlap_gather:
        found.take(gathered(run.model, run, stage, run.precision.parameter))
    # D
    if method.estimator == "finite_difference":
        passes = 2 * (1 + 1 / LINEARITY_INTERVAL)
        found.take(micro_batch(run.model, run, stage, FORWARD), count * passes)
        numbers = 2 + (len(RELATIVE_STEPS) + 1) + 1
        found.add("all_reduce", WORLD, _DOUBLE * numbers)
    elif method.lookahead == "next":
        found.take(micro_batch(run.model, run, stage, INPUTS_ONLY), count)
    else:
        found.take(_ghost_alone(run, stage), count)
    found.take(_values(run, stage, local, last, method.estimator == "ghost"))
    # E
    found.add("all_reduce", WORLD, _DOUBLE * 4)
    if last:
        found.add("all_gather", DP, local * _DOUBLE)
        if weighting.head:
            k = weighting.regression
            found.add("all_reduce", DP, _DOUBLE * (k + (k + 1) * k))
            found.add("broadcast", TP, _DOUBLE * (k + 1))
    if weighting.dwm is not None:
        found.take(_dwm_update(run, stage), weighting.updates)
        found.take(_dwm_pass(run, stage, FORWARD), weighting.scorings)
        if last:
            found.add("all_gather", DP, local * (_FLOAT + _DOUBLE), weighting.scorings)
    return found.bytes


def _meta_pass(run: Run, stage: int) -> Sent:
    """Pass C: the trainer's schedule on the meta batch, h reduced, v gathered."""
    found = Sent(run.layout)
    meta = run.batch.meta_micro_batches(run.layout)
    found.take(micro_batch(run.model, run, stage, TRAINING), meta)
    found.take(gradients(run.model, run, stage))
    found.take(gathered(run.model, run, stage, run.precision.gradient))
    if stage == run.layout.pp - 1:
        found.add("all_reduce", DP, 2 * _DOUBLE)
    return found


def _values(run: Run, stage: int, local: int, last: bool, summed: bool = True) -> Sent:
    """Returns the traffic of influence: summed over parts of a replica, gathered over replicas."""
    found = Sent(run.layout)
    if summed:
        found.add("all_reduce", TP_PP, local * _FLOAT)
        if any(layer.routed for layer in run.model.stages[stage].layers):
            # What an expert's rows of other replicas come to.
            found.add("all_reduce", EP, local * run.layout.ep * _DOUBLE)
    if last:
        found.add("all_gather", DP, local * _FLOAT)
        if run.per_token:
            found.add("all_reduce", DP, _DOUBLE)
    return found


def _ghost_alone(run: Run, stage: int) -> Sent:
    """Returns what ghost's hooks gather in a training pass that runs anyway."""
    found = micro_batch(run.model, run, stage, Pass(ghost=True))
    found.take(micro_batch(run.model, run, stage, TRAINING), -1)
    return found


def _dwm_pass(run: Run, stage: int, kind: Pass) -> Sent:
    """Returns the traffic of a pass of the weighting model over a step's samples."""
    found, model = Sent(run.layout), run.weighting.dwm
    assert model is not None
    count = run.batch.micro_batches(run.layout)
    found.take(micro_batch(model, run, stage, kind, tokens_only=True), count)
    return found


def _dwm_update(run: Run, stage: int) -> Sent:
    """Returns the traffic of a step of the weighting model's optimizer."""
    found, model = _dwm_pass(run, stage, TRAINING), run.weighting.dwm
    assert model is not None
    found.take(gradients(model, run, stage, own=True))
    found.take(gathered(model, run, stage, run.precision.parameter))
    # Flags of what was not finite; the norm of the gradient.
    found.add("all_reduce", WORLD, 3 * _DOUBLE)
    return found
