"""The run to plan: a model's matrices, their pipeline stages, and the layout.

Everything else follows from these: parameters, arithmetic, communication, memory. Layer names are
those of Megatron's classes, because the ghost estimator uses them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; `dp` takes the remaining ranks."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    vp: int = 1
    sequence_parallel: bool = False

    @property
    def world(self) -> int:
        """Number of all ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def sequence_share(self) -> int:
        """Number of ranks over which sequence parallelism splits a sample's hidden states."""
        return self.tp if self.sequence_parallel else 1


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, and how it is used.

    Attributes:
        name: name of the module within its layer.
        layer: class of the module.
        rows: outputs of the whole matrix.
        columns: inputs.
        split: how it is split: `column` and `row` over tensor-parallel ranks, `expert column` and
            `expert row` over expert-parallel ranks and the experts' tensor-parallel ranks, `none`.
        copies: number of experts.
        uses: number of times that a token goes through one of the copies.
        bias: whether it has one.
        gathered: whether its output, split by columns, is gathered at once (latent attention).
    """

    name: str
    layer: str
    rows: int
    columns: int
    split: str = "none"
    copies: int = 1
    uses: float = 1.0
    bias: bool = False
    gathered: bool = False

    @property
    def expert(self) -> bool:
        """Whether the matrix belongs to routed experts."""
        return self.split.startswith("expert")

    def parameters(self) -> int:
        """Trained elements of all copies."""
        return self.copies * self.rows * (self.columns + self.bias)

    def local(self, layout: Layout) -> int:
        """Trained elements on one rank."""
        if self.expert:
            ways, bias_ways = layout.etp, layout.etp if "column" in self.split else 1
            copies = self.copies // layout.ep
        else:
            ways = 1 if self.split == "none" else layout.tp
            bias_ways, copies = ways if self.split == "column" else 1, self.copies
        return copies * (self.rows * self.columns // ways + self.bias * self.rows // bias_ways)


@dataclass(frozen=True)
class Norm:
    """Scale (and shift) of a norm, the same on all tensor-parallel ranks.

    Attributes:
        name: name of the module within its layer.
        layer: class of the module.
        size: trained elements.
        of_heads: whether it normalises queries or keys, whose gradients Megatron sums over
            tensor-parallel ranks.
    """

    name: str
    layer: str
    size: int
    of_heads: bool = False


@dataclass(frozen=True)
class Layer:
    """A transformer layer.

    Attributes:
        matrices: its linear layers.
        norms: its norms.
        attention: heads x (size of a query + size of a value): the multiplications of attention's
            two products for a pair of positions.
        routed: number of experts per token; 0: the layer is dense.
        experts: number of routed experts.
    """

    matrices: tuple[Matrix, ...]
    norms: tuple[Norm, ...]
    attention: int
    routed: int = 0
    experts: int = 0


@dataclass(frozen=True)
class Stage:
    """What a rank of a pipeline stage holds, over all of its virtual stages.

    Attributes:
        layers: transformer layers.
        embedding: words (and positions), on the first stage.
        positions: learned positions.
        output: the output layer, on the last stage; None elsewhere.
        final_norm: on the last stage.
        tied: whether the output layer has no weight of its own here, because the same rank holds
            the embedding. (The last of several stages has a copy.)
    """

    layers: tuple[Layer, ...]
    embedding: Matrix | None = None
    positions: Matrix | None = None
    output: Matrix | None = None
    final_norm: Norm | None = None
    tied: bool = False

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices used in products, including the output layer."""
        found = [m for layer in self.layers for m in layer.matrices]
        return [*found, self.output] if self.output is not None else found

    @property
    def weights(self) -> list[Matrix]:
        """Everything that is trained, except norms."""
        found = [m for layer in self.layers for m in layer.matrices]
        extra = (self.embedding, self.positions, None if self.tied else self.output)
        return [*found, *(m for m in extra if m is not None)]

    @property
    def norms(self) -> list[Norm]:
        """Every norm."""
        found = [n for layer in self.layers for n in layer.norms]
        return [*found, self.final_norm] if self.final_norm is not None else found

    def parameters(self, layout: Layout) -> tuple[int, int]:
        """Returns trained elements on one rank: those outside and inside distributed experts.

        The latter have their own data-parallel groups under expert parallelism.
        """
        shared_out = sum(m.local(layout) for m in self.weights if m.expert and layout.ep > 1)
        found = sum(m.local(layout) for m in self.weights) + sum(n.size for n in self.norms)
        return found - shared_out, shared_out


@dataclass(frozen=True)
class Model:
    """A model over its pipeline stages.

    Attributes:
        stages: stages by pipeline rank.
        hidden: size of the hidden states.
        causal_share: share of the square of positions that attention computes: 1/2 if the kernel
            skips masked positions, 1 if it computes the whole square.
        recompute: the forward work that the backward pass repeats: `none`, `full`, `attention`.
        recomputed_layers: layers of a virtual stage that `full` repeats; None: all.
        dispatcher: how tokens reach experts: `alltoall`, `allgather`, `flex`.
        shared_copy: whether the last stage has a copy of the word embedding, kept equal to the
            first's.
    """

    stages: tuple[Stage, ...]
    hidden: int
    causal_share: float = 0.5
    recompute: str = "none"
    recomputed_layers: int | None = None
    dispatcher: str = "alltoall"
    shared_copy: bool = False

    def parameters(self) -> int:
        """Trained elements of the whole model, counting tied copies once."""
        weights = sum(m.parameters() for stage in self.stages for m in stage.weights)
        if self.shared_copy:
            assert self.stages[0].embedding is not None
            weights -= self.stages[0].embedding.parameters()
        return weights + sum(n.size for stage in self.stages for n in stage.norms)

    def recomputed_share(self, stage: Stage, layout: Layout) -> float:
        """Returns the share of a stage's layers that the backward pass runs forward again."""
        if self.recompute != "full":
            return 0.0
        if self.recomputed_layers is None:
            return 1.0
        return min(1.0, self.recomputed_layers * layout.vp / max(1, len(stage.layers)))

    def active_parameters(self) -> float:
        """Trained elements that a token goes through, without the word embedding."""
        return sum(
            m.uses * m.parameters() / m.copies for stage in self.stages for m in stage.matrices
        ) + sum(n.size for stage in self.stages for n in stage.norms)


@dataclass(frozen=True)
class Batch:
    """Sizes of a step.

    Attributes:
        micro: samples per micro-batch.
        seq: positions per sample.
        samples: samples per global batch.
        meta_samples: samples per meta batch.
    """

    micro: int
    seq: int
    samples: int
    meta_samples: int

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of a step on one rank."""
        return self.samples // (self.micro * layout.dp)

    def meta_micro_batches(self, layout: Layout) -> int:
        """Micro-batches of a meta batch on one rank."""
        return self.meta_samples // (self.micro * layout.dp)


@dataclass(frozen=True)
class Precision:
    """Bytes per element.

    Attributes:
        parameter: bytes of the model's parameters, and of what its passes send.
        gradient: bytes of the gradient buffers, which hold h and v.
        distributed: whether the optimizer is sharded over data-parallel ranks.
        overlap_gather: `--overlap-param-gather`.
    """

    parameter: int = 2
    gradient: int = 4
    distributed: bool = False
    overlap_gather: bool = False


@dataclass(frozen=True)
class Weighting:
    """How samples are weighted, as far as it affects the cost.

    Attributes:
        weighs: whether samples are weighted at all.
        ahead: whether each step's influence is computed ahead of it, in separate passes.
        exact: whether the optimizer's own Jacobian is used.
        keeps_gradient: whether a step's gradient is kept for it.
        head: width of the head's features, 0 without one.
        regression: width of its regression.
        dwm: the separate weighting model, None without one.
        updates: its updates per meta step.
        scorings: its passes over past samples per meta step.
        taught: whether it also learns in each plain step, from a head.
        whole_batch: whether its map needs the scores of the global batch.
        share: meta steps per step over the whole run.
        interval: steps from one meta step to the next, ignoring the start of the run.
    """

    weighs: bool = True
    ahead: bool = False
    exact: bool = True
    keeps_gradient: bool = True
    head: int = 0
    regression: int = 0
    dwm: Model | None = None
    updates: int = 0
    scorings: int = 0
    taught: bool = False
    whole_batch: bool = False
    share: float = 0.0
    interval: int = 1


@dataclass(frozen=True)
class Run:
    """A run to plan.

    Attributes:
        model: what is trained.
        layout: parallel layout.
        batch: sizes of a step.
        precision: bytes per element.
        weighting: what is added.
        per_token: `--calculate-per-token-loss`.
        mask_in_batches: whether batches hold attention masks.
        notes: what the plan leaves out, for the reader.
    """

    model: Model
    layout: Layout
    batch: Batch
    precision: Precision
    weighting: Weighting
    per_token: bool = False
    mask_in_batches: bool = False
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Method:
    """How influence is computed: estimator and lookahead."""

    estimator: str
    lookahead: str

    def __str__(self) -> str:
        """Returns it as the log shows it."""
        return f"{self.estimator}, lookahead {self.lookahead}"


GHOST_CURRENT = Method("ghost", "current")
GHOST_NEXT = Method("ghost", "next")
DIFFERENCE = Method("finite_difference", "next")
