"""Random layouts and flags under which weighted training must be what one process computes.

A case is drawn from all that changes how losses are divided and gradients are summed: ranks, their
parallelism, micro-batches, normalisation, masks, optimizer, schedules of communication. Every case
starts from a checkpoint that one rank has saved, so parameters, moments and data are known.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from tests.distributed.cases import COMMON, HEAD
from tests.functional.harness import Run, host_flags, run_all

BATCH = 8  # samples of a step, and of a meta batch
START = 3  # steps before the one that is compared
MODELS = {
    "llama": "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type "
    "rope --untie-embeddings-and-output-weights --qk-layernorm",
    "gpt": "--normalization LayerNorm --position-embedding-type learned_absolute",
    "moe": "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 "
    "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0",
}
# Megatron cannot load SGD's state in float32: without momentum there is none.
OPTIMIZERS = {
    "adam": "--clip-grad 0.3",
    "sgd": "--optimizer sgd --sgd-momentum 0 --lr 1e-2 --clip-grad 0.3 "
    "--no-save-optim --no-load-optim",
}
# Documents of 3 to 40 tokens in samples of 32: many have their end in the middle.
MASKS = {
    "plain": "",
    "masked": "--eod-mask-loss",
    "ragged": "--eod-mask-loss --reset-position-ids --reset-attention-mask",
}
_WITHOUT = ("--mock-data", "--no-create-attention-mask-in-dataloader")
_REPLACED = ("--micro-batch-size", "--global-batch-size", "--train-iters", "--split")


@dataclass(frozen=True)
class Case:
    """One layout with its flags.

    Attributes:
        number: by which it was drawn.
        model: of `MODELS`.
        optimizer: of `OPTIMIZERS`.
        masks: of `MASKS`.
        ranks: how many it takes.
        dp: data-parallel size.
        micro_batch: samples of a micro-batch.
        per_token: whether the loss is divided once by the tokens of the global batch.
        distributed: whether the optimizer is.
        estimators: which estimators are compared.
        flags: all that comes on top.
    """

    number: int
    model: str
    optimizer: str
    masks: str
    ranks: int
    dp: int
    micro_batch: int
    per_token: bool
    distributed: bool
    estimators: tuple[str, ...]
    flags: str

    @property
    def name(self) -> str:
        """Its name."""
        return f"{self.number:03}-{self.model}-{self.optimizer}-{self.masks}"

    @property
    def group(self) -> tuple[str, str, str]:
        """Model, optimizer and masks."""
        return self.model, self.optimizer, self.masks

    @property
    def start(self) -> str:
        """The checkpoint that it starts from, for each of which a reference is computed.

        Two that differ in how the optimizer was kept differ in rounding, and Adam's first steps
        make that as long as a step where the gradient is nearly 0.
        """
        return "-".join(["start", *self.group, "distributed" if self.distributed else "plain"])

    def deal(self, values: Any) -> Any:
        """Returns values in the order (replica, micro-batch, sample), from that of the data.

        Of every micro-step the trainer gives each replica a micro-batch, one after the other.
        """
        shape = (-1, self.dp, self.micro_batch)
        return numpy.asarray(values).reshape(shape).transpose(1, 0, 2).reshape(-1)


def draw(count: int, seed: int) -> list[Case]:
    """Returns so many cases, always the same ones for a seed."""
    chosen = random.Random(seed)
    return [_draw(number, chosen) for number in range(count)]


def _draw(number: int, chosen: random.Random) -> Case:
    pick = chosen.choice
    model, optimizer, masks = pick(list(MODELS)), pick(list(OPTIMIZERS)), pick(list(MASKS))
    ranks = pick([1, 2, 2, 4, 4, 4])
    tp = pick([1, 2]) if ranks > 1 else 1
    pp = pick([1, 2]) if ranks // tp > 1 else 1
    dp = ranks // (tp * pp)
    virtual = pp > 1 and pick([False, True])
    if virtual and masks == "ragged":  # the script refuses it: the mask would be lost
        masks = "masked"
    # With virtual stages, micro-batches come in groups of the stages.
    sizes = [b for b in (1, 2, 4) if BATCH % (b * dp) == 0]
    if virtual:
        sizes = [b for b in sizes if BATCH // (b * dp) % pp == 0]
    micro_batch = pick(sizes)
    flags = [f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"]
    if virtual:
        flags.append("--num-layers-per-virtual-pipeline-stage 1")
    # Megatron trains experts under tensor parallelism with sequence parallelism only.
    if tp > 1 and (model == "moe" or pick([False, True])):
        flags.append("--sequence-parallel")
    experts = 1
    if model == "moe":
        experts = pick([1, 2]) if dp > 1 else 1
        if experts > 1:  # Megatron cannot load Adam's state of experts that were on one rank
            optimizer = "sgd"
        flags.append(f"--expert-model-parallel-size {experts}")
        if experts > 1 and tp > 1 and pick([False, True]):
            flags.append("--expert-tensor-parallel-size 1")
        flags.append(f"--moe-token-dispatcher-type {pick(['alltoall', 'allgather'])}")
    per_token = pick([False, True])
    distributed = optimizer == "adam" and pick([False, True])  # the trainer distributes no SGD
    if per_token:
        flags.append("--calculate-per-token-loss")
    if distributed:
        flags.append("--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable")
    if pick([False, True]):
        flags.append("--overlap-grad-reduce --ddp-bucket-size 20000")
        if distributed and pick([False, True]):
            flags.append("--overlap-param-gather")
    recompute = pick(["", "", "full", "selective"])
    if recompute == "full":
        flags.append("--recompute-granularity full --recompute-method uniform")
        flags.append("--recompute-num-layers 1")
    elif recompute:
        flags.append("--recompute-granularity selective")
    if pick([False, True]):
        flags.append("--attention-softmax-in-fp32")
    return Case(
        number,
        model,
        optimizer,
        masks,
        ranks,
        dp,
        micro_batch,
        per_token,
        distributed,
        # A finite step changes which experts are chosen, which no derivative knows of.
        ("ghost",) if model == "moe" else ("ghost", "finite_difference"),
        " ".join(flags),
    )


def write_documents(prefix: Path, seed: int, end: int, documents: int = 600) -> str:
    """Writes documents of uneven lengths, each with its end; returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(documents):
        steps = rng.integers(-3, 4, size=int(rng.integers(2, 40)))
        tokens = numpy.abs(numpy.cumsum(steps) + int(rng.integers(end))) % end
        tokens = numpy.append(tokens, end).astype(numpy.int32)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


class Setting:
    """Data and start checkpoints of all cases, in a folder.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # NullTokenizer's end of a document is its last id.
        self.data = write_documents(folder / "train", 1, 254)
        self.meta = write_documents(folder / "meta", 2, 254)

    def arguments(self, model: str, optimizer: str, masks: str, flags: str) -> list[str]:
        """Returns the arguments of a run."""
        common = [word for word in COMMON if word not in _WITHOUT]
        for name in _REPLACED:
            at = common.index(name)
            del common[at : at + 2]
        words = f"--global-batch-size {BATCH} --train-iters 20 --split 100,0,0 "
        words += f"--data-path {self.data} --dwm-meta-data-path {self.meta} --eval-iters 0 "
        words += f"--dwm-lookahead next --data-cache-path {self.folder / 'cache'}"
        if masks != "ragged":
            words += " --no-create-attention-mask-in-dataloader"
        return [
            *host_flags(),
            *common,
            *HEAD,
            *words.split(),
            *f"{MODELS[model]} {OPTIMIZERS[optimizer]} {MASKS[masks]} {flags}".split(),
        ]

    def save_starts(self, cases: list[Case]) -> None:
        """Saves the state after `START` steps of one rank for each start of the cases."""
        runs = []
        for case in {case.start: case for case in cases}.values():
            flags = f"--micro-batch-size {BATCH} --exit-interval {START} --save-interval {START} "
            flags += f"--save {self.folder / case.start} {_sharded(case)}"
            runs.append(Run(case.start, self.arguments(*case.group, flags)[len(host_flags()) :]))
        results = run_all(1, runs, self.folder)
        for run in runs:
            results.succeeded(run.name)

    def reference(self, cases: list[Case]) -> dict[str, Any]:
        """Returns what the worker computes in float64, in one process, for cases of one start."""
        first = cases[0]
        flags = f"--micro-batch-size {BATCH} --no-load-rng --load {self.folder / first.start} "
        return {
            "role": "reference",
            "name": f"reference-{first.start}",
            "args": self.arguments(*first.group, flags + _sharded(first)),
            "layouts": [
                {
                    "name": case.name,
                    "dp": case.dp,
                    "micro_batch": case.micro_batch,
                    "per_token": case.per_token,
                    "weights": weights(case).tolist(),
                }
                for case in cases
            ],
        }

    def layout(self, case: Case) -> dict[str, Any]:
        """Returns what the worker takes apart."""
        flags = f"--micro-batch-size {case.micro_batch} --no-load-rng "
        flags += f"--load {self.folder / case.start} {case.flags}"
        return {
            "role": "layout",
            "name": case.name,
            "args": self.arguments(*case.group, flags),
            "reference": f"reference-{case.start}",
            "weights": case.deal(weights(case)).tolist(),
            "estimators": list(case.estimators),
            "per_token": case.per_token,
        }


def _sharded(case: Case) -> str:
    return (
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
        if case.distributed
        else ""
    )


def weights(case: Case) -> numpy.ndarray:
    """Returns random weights of mean 1, in the order of the data; with SGD one sample has none.

    With Adam a token that only this sample has would be where its step has no derivative.
    """
    found = numpy.random.default_rng(case.number).uniform(0.2, 2.0, BATCH)
    if case.optimizer == "sgd":
        found[case.number % BATCH] = 0.0
    return found / found.mean()
