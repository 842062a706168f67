#!/usr/bin/env python
"""How well influences predict the effect of other weights: the linear datamodeling score.

    python benchmarks/attribution.py [--steps 1 4 16 64] [--reweightings 100]

A small byte-level model is trained for a while. From there the same K steps are repeated, each time
with other weights for every sample, drawn from U(0, 2), and the loss on held-out text is measured.
The score (Park et al., "TRAK", ICML 2023) is Spearman's correlation over these runs of that loss
with its prediction sum_ki c_ki (w_ki - 1), where c_ki is the influence of sample i of step k by a
method that saw the run with all weights at 1:

    one-step      the meta loss's gradient at the parameters of step k, with Adam's current
                  preconditioner: what `--dwm-lookahead current` uses
    running mean  the same, with the gradient at a running mean of the parameters
    look-ahead    the same, with the gradient at the parameters after the K steps, of one meta batch

each also with the part of a step that comes later through Adam's first moment counted in, a factor
(1 - beta1^(K - k)) / (1 - beta1). Cost is the time that the method's passes take, in parts of the
time of the K steps.

Shapes: K steps, N samples in a batch, R reweightings.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import numpy  # noqa: E402
import own_loop as example  # noqa: E402 - installs the host, before torch and Megatron
import torch  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from quality import data, plan  # noqa: E402

from megatron_dwm import DWMConfig  # noqa: E402
from megatron_dwm.core.batches import StepBatches  # noqa: E402
from megatron_dwm.core.trainee import Trainee  # noqa: E402
from megatron_dwm.core.trainer_state import TrainerState  # noqa: E402
from megatron_dwm.hosts.own_loop import OwnLoop  # noqa: E402
from megatron_dwm.meta_gradient.pull_back import trainable_parameters  # noqa: E402

SEQUENCE, BATCH = example.SEQUENCE, example.BATCH
BETA1 = 0.9
MEAN_DECAY = 0.9  # of the running mean of the parameters


class Tokens(torch.utils.data.Dataset):
    """An indexed data set in pieces of `SEQUENCE` tokens, each with the token after it."""

    def __init__(self, prefix: Path, domain: int = 0) -> None:
        self.tokens, self.domain = numpy.memmap(f"{prefix}.bin", numpy.uint16, "r"), domain

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // SEQUENCE

    def __getitem__(self, index: int) -> dict[str, Any]:
        piece = self.tokens[index * SEQUENCE : (index + 1) * SEQUENCE + 1].astype(numpy.int64)
        piece = torch.from_numpy(piece)
        return {"tokens": piece[:-1], "labels": piece[1:], "dataset_id": self.domain}


class Study:
    """A model on its way, and the steps that are taken again.

    Args:
        folder: of the data sets.
        regime: see `plan.REGIMES`.
        args: the command's.
        meta_batch: samples of a meta batch.
    """

    def __init__(self, folder: Path, regime: str, args: argparse.Namespace, meta_batch: int):
        torch.manual_seed(args.seed)
        model_parallel_cuda_manual_seed(args.seed)
        model, self.optimizer, schedule = example.build(args.lr)
        shares = plan.REGIMES[regime].shares
        self.sets = [Tokens(folder / name, k) for k, name in enumerate(shares)]
        self.shares, self.seed = torch.tensor(list(shares.values())), args.seed
        config = DWMConfig(enabled=True, meta_batch_size=meta_batch, lookahead="current")
        self.loop = OwnLoop(
            config,
            [model],
            self.optimizer,
            example.forward_step,
            micro_batch_size=example.MICRO_BATCH,
            seq_length=SEQUENCE,
            steps=args.warm + max(args.steps),
            meta_datasets=[Tokens(folder / "meta")],
            pipeline_schedule=schedule,
        )
        self.model = model
        self.trainee = Trainee(
            [model], self.optimizer, self.loop.transformer_config, schedule, iter(())
        )
        self.own_step = partial(example.train_step, model, self.optimizer, schedule)
        self.passes, self.influence = self.loop.weighting.passes, self.loop.weighting.influence
        valid = Tokens(folder / "valid")
        picked = numpy.random.default_rng(0).choice(len(valid), args.held_out, replace=False)
        self.valid = torch.utils.data.default_collate([valid[int(k)] for k in picked])
        self.parameters = trainable_parameters([model])
        self.mean: list[torch.Tensor] = []

    def batches(self, step: int) -> StepBatches:
        """Returns the micro-batches of a step, a function of its number."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        picked = torch.multinomial(self.shares, BATCH, True, generator=generator)
        places = torch.rand(BATCH, generator=generator, dtype=torch.float64)
        places = zip(picked.tolist(), places.tolist(), strict=True)
        samples = [self.sets[d][int(p * len(self.sets[d]))] for d, p in places]
        size = example.MICRO_BATCH
        chunks = [samples[i : i + size] for i in range(0, BATCH, size)]
        return StepBatches(iter(map(torch.utils.data.default_collate, chunks)), len(chunks))

    def step(self, number: int, weights: torch.Tensor) -> None:
        """Takes a step with weights `[N]`, and moves the running mean."""

        def own(iterator: Any) -> Any:
            return self.own_step(self.loop.weighting.forward_step, iterator)

        self.influence.weighted_step(own, self.batches(number), weights)
        for mean, parameter in zip(self.mean, self.parameters, strict=False):  # none at first
            mean.lerp_(parameter.detach(), 1 - MEAN_DECAY)

    def kept(self) -> list[torch.Tensor]:
        """Returns a copy of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def put(self, values: list[torch.Tensor]) -> None:
        """Overwrites the parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)

    def influences(self, number: int, at: list[torch.Tensor] | None, meta: int) -> torch.Tensor:
        """Returns `[N]` float64 influences of a step's samples, before it is taken.

        Args:
            number: of the step.
            at: parameters at which the meta loss is differentiated; None: those of now.
            meta: position in the meta set at which the meta batch begins.
        """
        assert self.passes.meta_data is not None
        self.passes.meta_data.consumed_samples = meta
        now = self.kept()
        stock = self.passes.meta_loss_gradient

        def elsewhere(trainee: Trainee) -> float:
            if at is not None:
                self.put(at)
            loss = stock(trainee)
            self.put(now)
            return loss

        self.passes.meta_loss_gradient = elsewhere  # type: ignore[method-assign]
        try:
            found = self.influence.ahead(self.trainee, self.batches(number))
        finally:
            self.passes.meta_loss_gradient = stock  # type: ignore[method-assign]
        assert found is not None
        return found.values.double()

    @torch.no_grad()
    def held_out(self) -> float:
        """Returns the loss per token on the held-out samples."""
        losses, _ = example.forward_step(iter([dict(self.valid)]), self.model)
        return losses.double().mean().item()


def study(folder: Path, regime: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each number of steps, method and size of the meta batch."""
    one = Study(folder, regime, args, args.meta_batch)
    ones = torch.ones(BATCH)
    for k in range(args.warm):
        if k == args.warm - 50:
            one.mean = one.kept()
        one.step(k, ones)
    longest = max(args.steps)
    begin = TrainerState(one.trainee, SimpleNamespace(num_steps=0))
    mean = [value.clone() for value in one.mean]
    ends: dict[int, list[torch.Tensor]] = {}
    start = time.process_time()
    for k in range(longest):
        one.step(args.warm + k, ones)
        if k + 1 in args.steps:
            ends[k + 1] = one.kept()
    seconds = (time.process_time() - start) / longest
    begin.restore()
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    spent: dict[tuple[str, int], float] = {}

    def note(method: str, steps: int, number: int, at: Any, meta: int) -> None:
        begun = time.process_time()
        values = one.influences(args.warm + number, at, meta)
        key = (method, steps)
        spent[key] = spent.get(key, 0.0) + time.process_time() - begun
        found.setdefault(key, []).append(values)

    one.mean = mean
    for k in range(longest):
        meta = args.meta_batch * k
        note("one-step", 0, k, None, meta)
        note("running mean", 0, k, one.mean, meta)
        for steps in args.steps:
            if k < steps:
                note("look-ahead", steps, k, ends[steps], 0)
        one.step(args.warm + k, ones)
    begin.restore()
    influences = {key: torch.stack(values) for key, values in found.items()}
    generator = torch.Generator().manual_seed(args.seed)
    for steps in args.steps:
        drawn = 2 * torch.rand(args.reweightings, steps, BATCH, generator=generator).double()
        losses = []
        for weights in drawn:
            for k in range(steps):
                one.step(args.warm + k, weights[k].float())
            losses.append(one.held_out())
            begin.restore()
        left = torch.arange(steps, 0, -1).double()
        later = (1 - BETA1**left) / (1 - BETA1)
        for method in ("one-step", "running mean", "look-ahead"):
            key = (method, steps if method == "look-ahead" else 0)
            for moment, factor in (("", torch.ones(steps)), (", later parts", later)):
                c = influences[key][:steps] * factor.double()[:, None]
                predicted = ((drawn - 1) * c).sum((1, 2))
                yield {
                    "regime": regime,
                    "steps": steps,
                    "meta_batch": args.meta_batch,
                    "method": method + moment,
                    "score": spearman(predicted.numpy(), numpy.array(losses)),
                    "cost": spent[key] / len(found[key]) / seconds,
                    "spread": float(numpy.std(losses)),
                }


def spearman(a: numpy.ndarray, b: numpy.ndarray) -> float:
    """Returns the rank correlation of `[R]` and `[R]`, all different."""
    places = [values.argsort().argsort() for values in (a, b)]
    return float(numpy.corrcoef(*places)[0, 1])


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[1, 4, 16, 64], help="K")
    add("--reweightings", type=int, default=100, help="R")
    add("--warm", type=int, default=300, help="steps before")
    add("--meta-batch", type=int, default=8, help="samples of a meta batch")
    add("--held-out", type=int, default=512, help="samples of the held-out loss")
    add("--regimes", nargs="+", choices=plan.REGIMES, default=["target"])
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=1)
    add("--out", type=Path, default=Path("quality_out"), help="as of benchmarks/quality.py")
    args = parser.parse_args()
    size = plan.SIZES["toy"]
    folder = args.out.resolve() / "toy" / "data"
    data.prepare(folder, None, size)
    example.start_ranks()
    print(f"{'regime':9} {'K':>3} {'meta':>5} {'method':26} {'score':>6} {'cost':>6} {'spread':>8}")
    for regime in args.regimes:
        for row in study(folder, regime, args):
            print(
                "{regime:9} {steps:3} {meta_batch:5} {method:26} {score:6.3f} {cost:6.3f} "
                "{spread:8.5f}".format(**row),
                flush=True,
            )
            if args.reweightings < 10:
                continue
            with open(args.out / "attribution.jsonl", "a") as file:
                file.write(json.dumps({**row, "seed": args.seed}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
