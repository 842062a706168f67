#!/usr/bin/env python
"""The cost of a step relative to the stock trainer's: time, memory, bytes sent, FLOP floor.

    python benchmarks/cost.py [--model 10m|134m|374m] [--rounds 5] [--defaults] [-- trainer flags]

One training run takes steps of every kind in turn, each between two stock steps: stock, uniform
weights, the head's plain step and meta step (the defaults), a frozen separate model, and with that
a meta step with each estimator, lookahead and meta batch (1, 1/4, 1/8 of the batch). A step's time
is divided by the mean of its two stock neighbours', so the ratio is valid on a shared machine; the
table shows the median over the rounds and the quartiles.

Time is wall-clock time on a GPU. On a CPU it is this rank's processor time, with one thread per
rank unless OMP_NUM_THREADS says otherwise: wall-clock time would include other work on the machine.

Floors count arithmetic only, F being one forward of the batch, a stock step 3F, the meta batch r
of the batch, and the DWM's own passes left out:

    ghost, lookahead next     (3 + 3r + 3) / 3     a forward and backward without weight gradients
    ghost, lookahead current  (3 + 3r + 1) / 3     inner products in the training pass
    finite difference         (3 + 3r + 2) / 3     two forwards
    frozen DWM                1 + DWM forward / 3F
    head, plain               1
    head, meta                as ghost, lookahead current, with the default meta batch of 1/4

Peak memory is that of all tensors, from the profiler on a CPU and from the allocator on a GPU.
A whole run at the defaults costs `plain + (meta - plain) / interval`. Exit code 1 when a step is
above --limit times its floor (1.05 for the frozen DWM, 1.01 for the head's plain step), or a whole
run with the head above 1.05 stock steps, or the head's state above 16 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARES = {"1": 1, "1/4": 4, "1/8": 8}
MICRO_BATCHES = 8  # of a step; the smallest meta batch is one
WARM = 3  # steps before anything is timed
HEAD = {"head, plain": False, "head, meta": True}  # whether it takes a meta step
HEAD_SHARE = 4  # of the batch is the default meta batch
LIMITS = {"frozen DWM": 1.05, "uniform": 1.05, "head, plain": 1.01}
WHOLE_RUN, HEAD_MIB = 1.05, 16.0


@dataclass(frozen=True)
class Shape:
    """A Llama's size; a DWM has no output layer to count (vocab 0)."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int = 0

    def forward_flops(self, sequence: int) -> float:
        """Returns the multiply-adds, times 2, of one token's forward pass."""
        hidden = self.hidden
        layer = 2 * (4 * hidden**2 + 3 * hidden * self.ffn) + 4 * sequence * hidden
        return self.layers * layer + 2 * hidden * self.vocab


@dataclass(frozen=True)
class Model:
    """What is trained: the LLM, the DWM, a micro-batch of sequences, and flags beside them."""

    llm: Shape
    dwm: Shape
    sequence: int
    micro_batch: int
    flags: str = ""

    def share(self) -> float:
        """Returns the DWM's forward pass over the LLM's."""
        return self.dwm.forward_flops(self.sequence) / self.llm.forward_flops(self.sequence)

    def arguments(self, ranks: int) -> list[str]:
        """Returns the trainer's flags."""
        llm, dwm, batch = self.llm, self.dwm, MICRO_BATCHES * self.micro_batch * ranks
        return f"""
            --num-layers {llm.layers} --hidden-size {llm.hidden} --ffn-hidden-size {llm.ffn}
            --num-attention-heads {llm.heads} --vocab-size {llm.vocab - 1}
            --seq-length {self.sequence} --max-position-embeddings {self.sequence}
            --micro-batch-size {self.micro_batch} --global-batch-size {batch}
            --dwm-meta-batch-size {batch} --dwm-num-layers {dwm.layers}
            --dwm-hidden-size {dwm.hidden} --dwm-ffn-hidden-size {dwm.ffn}
            --dwm-num-attention-heads {dwm.heads} {COMMON} {self.flags}
        """.split()


COMMON = """
--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --mock-data
--tokenizer-type NullTokenizer --lr 1e-4 --lr-decay-style constant --eval-iters 0
--eval-interval 1000000 --log-interval 1000000 --num-workers 0 --split 98,1,1
--no-create-attention-mask-in-dataloader --dwm --dwm-form model --dwm-rule chain
--dwm-schedule joint --dwm-estimator ghost
"""
# For a GPU: bf16, Megatron's own layers, as Transformer Engine need not be there, and micro-batches
# so large that it is busy: where the launches of kernels take longer than the kernels, forward
# passes cost as much as backward passes.
GPU = """
--num-workers 2 --bf16 --transformer-impl local --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion
"""
MODELS = {
    "10m": Model(Shape(6, 320, 896, 5, 4096), Shape(2, 128, 384, 4), 256, 4),
    "134m": Model(Shape(12, 768, 2048, 12, 32000), Shape(4, 256, 704, 4), 1024, 24, GPU),
    "374m": Model(Shape(24, 1024, 2816, 16, 32000), Shape(4, 256, 704, 4), 1024, 16, GPU),
}


def kinds() -> dict[str, tuple[str, str, int]]:
    """Returns the meta steps that are measured: (estimator, lookahead, 1 / share) by name."""
    found = {}
    for estimator, lookahead in (
        ("ghost", "next"),
        ("ghost", "current"),
        ("finite_difference", "next"),
    ):
        for label, share in SHARES.items():
            found[f"{estimator}, {lookahead}, meta {label}"] = (estimator, lookahead, share)
    return found


def floor_of(name: str, model: Model) -> float:
    """Returns the FLOP floor of a kind of step over a stock step."""
    if name in ("stock", "uniform", "head, plain"):
        return 1.0
    if name == "head, meta":
        return (3 + 3 / HEAD_SHARE + 1) / 3
    if name == "frozen DWM":
        return 1.0 + model.share() / 3
    estimator, lookahead, share = kinds()[name]
    extra = 2 if estimator == "finite_difference" else 1 if lookahead == "current" else 3
    return (3 + 3 / share + extra) / 3


def worker() -> None:
    """One rank: takes the steps; the last rank writes the measurements."""
    sys.path.insert(0, ROOT)
    from megatron_dwm.hosts import cpu

    cpu.install()
    from megatron_dwm.hosts.megatron_lm.session import Session

    rounds = int(os.environ["COST_ROUNDS"])
    names = ["uniform", *HEAD]
    if os.environ["COST_DEFAULTS"] != "1":
        names += ["frozen DWM", *kinds()]
    # Every timed step has a stock step before and after; the memory of each is taken first.
    plan = ["stock"] * WARM + [f"memory {n}" for n in ["stock", *names]]
    for k in range(rounds):
        for name in names if k % 2 == 0 else reversed(names):
            plan += ["stock", name]
    plan.append("stock")
    attached = Session.train_step
    measured: dict[str, Any] = {"times": [], "memory": {}, "traffic": {}}
    steps: dict[str, Any] = {}

    def train_step(self: Any, stock: Any, *args: Any, iteration: int, **kwargs: Any) -> tuple:
        if not steps:
            steps.update(build_steps(self.step, args[2]))
            measured["head_bytes"] = head_bytes(steps["head, meta"])
        name = plan[iteration].removeprefix("memory ")
        self.step = steps.get(name)

        def act() -> tuple:
            if name == "stock":
                return stock(*args, iteration=iteration, **kwargs)
            return attached(self, stock, *args, iteration=iteration, **kwargs)

        if plan[iteration].startswith("memory"):
            result, measured["memory"][name], measured["traffic"][name] = with_memory(act)
            return result
        seconds, result = timed(act)
        measured["times"].append((name, seconds))
        return result

    Session.train_step = train_step  # type: ignore[method-assign]
    script = os.path.join(ROOT, "examples", "pretrain_dwm.py")
    model = MODELS[os.environ["COST_MODEL"]].arguments(int(os.environ["WORLD_SIZE"]))
    flags = [*cpu.default_flags(), *model, "--train-iters", str(len(plan))]
    sys.argv = [script, *flags, *sys.argv[1:]]
    runpy.run_path(script, run_name="__main__")
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        with open(os.environ["COST_OUT"], "w") as file:
            json.dump(measured, file)


def build_steps(step: Any, model: list[Any]) -> dict[str, Any]:
    """Returns a modified step of each kind, all on one LLM and one DWM."""
    import dataclasses

    from measuring import Always

    from megatron_dwm.config import DWMConfig
    from megatron_dwm.core.state_tap import StateTap
    from megatron_dwm.data.meta_dataset import MetaData
    from megatron_dwm.policies.controls import Uniform
    from megatron_dwm.policies.head import Head
    from megatron_dwm.step.passes import Passes
    from megatron_dwm.step.train_step import DWMTrainStep

    passes, full, context = step.passes, step.meta_data, step.policy.context

    def with_share(share: int) -> Any:
        meta_data = MetaData(
            full.datasets,
            None,
            full.batch_size // share,
            full.micro_batch_size,
            full.dp_rank,
            full.dp_size,
            0,
        )
        return Passes(passes.forward_step, passes.groups, passes.shape, meta_data)

    found = {
        "uniform": DWMTrainStep(step.config, Always(False), passes, Uniform(context)),
        "frozen DWM": DWMTrainStep(step.config, Always(False), passes, step.policy),
    }
    config = dataclasses.replace(
        DWMConfig(enabled=True).with_defaults(), estimator="ghost", lookahead="current"
    )
    head = Head(dataclasses.replace(context, config=config))
    tap = StateTap(model[-1]) if context.sees_losses else None
    for name, meta in HEAD.items():
        found[name] = DWMTrainStep(config, Always(meta), with_share(HEAD_SHARE), head, tap)
    for name, (estimator, lookahead, share) in kinds().items():
        config = dataclasses.replace(step.config, estimator=estimator, lookahead=lookahead)
        found[name] = DWMTrainStep(config, Always(True), with_share(share), step.policy)
    return found


def head_bytes(step: Any) -> int:
    """Returns what the head keeps on this rank, in bytes."""
    import torch

    def tensors(value: Any) -> Any:
        for one in value.values():
            if isinstance(one, dict):
                yield from tensors(one)
            elif isinstance(one, torch.Tensor):
                yield one

    return sum(t.numel() * t.element_size() for t in tensors(step.policy.state_dict()))


def timed(act: Any) -> tuple[float, Any]:
    """Runs a step; returns its seconds, from when all ranks begin to when this one is done."""
    import torch

    from megatron_dwm.hosts import cpu

    clock = time.perf_counter if cpu.device().type == "cuda" else time.process_time
    torch.distributed.barrier()
    torch.cuda.synchronize()
    start = clock()
    result = act()
    torch.cuda.synchronize()
    return clock() - start, result


def with_memory(act: Any) -> tuple[Any, int, dict[str, int]]:
    """Runs a step; returns its result, the peak bytes of all tensors, and the bytes sent."""
    import torch
    from measuring import live_bytes

    from megatron_dwm.core import collectives
    from megatron_dwm.hosts import cpu

    collectives.traffic.clear()
    if cpu.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        result = act()
        return result, torch.cuda.max_memory_allocated(), dict(collectives.traffic)
    base = live_bytes()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = act()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, base + peak, dict(collectives.traffic)


def ratios(times: list[tuple[str, float]]) -> dict[str, list[float]]:
    """Returns each kind's times over the mean of the stock steps before and after it."""
    found: dict[str, list[float]] = {}
    for k in range(1, len(times) - 1):
        (before, a), (name, seconds), (after, b) = times[k - 1 : k + 2]
        if name != "stock" and before == after == "stock":
            found.setdefault(name, []).append(seconds / ((a + b) / 2))
    return found


def main() -> int:
    """Spawns the ranks and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=MODELS, default="10m", help="10m for a CPU, the others for a GPU"
    )
    parser.add_argument("--ranks", type=int, default=1, help="ranks, data parallel by default")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument(
        "--defaults", action="store_true", help="what a run at the defaults takes, and no more"
    )
    parser.add_argument("--limit", type=float, default=1.15, help="highest time over floor")
    parser.add_argument("flags", nargs="*", help="more flags for the trainer, after --")
    args = parser.parse_args()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(args.ranks), os.path.abspath(__file__), *args.flags]
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "cost.json")
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        env.update(COST_OUT=out, COST_ROUNDS=str(args.rounds), COST_MODEL=args.model)
        env["COST_DEFAULTS"] = str(int(args.defaults))
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if not os.path.exists(out):
            print(done.stderr[-3000:], file=sys.stderr)
            return 2
        with open(out) as file:
            measured = json.load(file)
    return report(measured, MODELS[args.model], args.limit)


def report(measured: dict[str, Any], model: Model, limit: float) -> int:
    """Prints the table; returns 1 when a kind of step is above its limit, else 0."""
    stock = statistics.median(t for name, t in measured["times"] if name == "stock")
    memory, traffic = measured["memory"], measured["traffic"]
    print(f"stock step {stock * 1000:.0f} ms, peak memory {memory['stock'] / 2**20:.0f} MiB\n")
    print("| step | time / stock | quartiles | floor | time / floor | memory / stock | MiB sent |")
    print("|---|---|---|---|---|---|---|")
    failed, medians = [], {}
    for name, values in ratios(measured["times"]).items():
        time_ratio, floor = statistics.median(values), floor_of(name, model)
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(
            f"| {name} | {time_ratio:.3f} | {low:.3f} to {high:.3f} | {floor:.3f} "
            f"| {time_ratio / floor:.3f} | {memory[name] / memory['stock']:.3f} "
            f"| {sum(traffic[name].values()) / 2**20:.2f} |"
        )
        medians[name] = time_ratio
        if time_ratio > floor * LIMITS.get(name, limit):
            failed.append(name)
    sys.path.insert(0, ROOT)
    from megatron_dwm.config import DWMConfig

    plain, meta = (medians[name] for name in HEAD)
    interval = DWMConfig().with_defaults().meta_interval or 1
    whole = plain + (meta - plain) / interval
    size = measured["head_bytes"] / 2**20
    print(
        f"\nA whole run with the head costs {whole:.3f} stock steps a step (a meta step every "
        f"{interval}); its state is {size:.2f} MiB."
    )
    failed += ["a whole run with the head"] if whole > WHOLE_RUN else []
    failed += ["the head's state"] if size > HEAD_MIB else []
    share = model.share()
    if "frozen DWM" in medians:
        print(
            f"\nThe DWM's forward is {share:.3f} of the LLM's; scoring and its update are 4 of "
            "them."
        )
    detail = traffic.get("ghost, next, meta 1/4", {})
    for name, sent in sorted(detail.items(), key=lambda item: -item[1]):
        print(f"ghost, next, meta 1/4 sends {sent:12d} bytes a rank in {name}")
    for name in failed:
        print(f"above its limit: {name}")
    return int(bool(failed))


if __name__ == "__main__":
    if "RANK" in os.environ and "COST_OUT" in os.environ:
        worker()
    else:
        raise SystemExit(main())
