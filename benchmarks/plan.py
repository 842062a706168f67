#!/usr/bin/env python
"""Compares `megatron-dwm plan` for small runs with what these runs actually do.

    python benchmarks/plan.py [--cases tp2-pp2 ...]

Each case trains a tiny model on four CPU ranks. Its steps are taken in turn: a stock step, a plain
weighted step, and a meta step with each method that the layout allows. On every rank are counted

    FLOPs    by torch's FlopCounterMode
    bytes    of every collective of a process group, as a rank sends them in a ring
    memory   of the live tensors in passes C and D, beyond those before the step

and a step's excess over the stock step is compared with the plan for the same flags. The ratios
planned / measured are printed: of FLOPs over all ranks, of each group's bytes on the rank that
sends most (expert parallel: on average), and of memory on the rank that keeps most. Exit code 1 if
one is off by more than 15%.

Times are not compared: see benchmarks/cost.py. Not run: multi-latent attention, which needs
Transformer Engine, and Transformer Engine's own layers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RANKS = 4
LIMIT = 0.15
# Below this a group's bytes are scalars that ranks agree by.
LEAST_BYTES = 1024
COMMON = """
--num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4
--seq-length 32 --max-position-embeddings 32 --normalization RMSNorm --disable-bias-linear --swiglu
--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 --mock-data
--tokenizer-type NullTokenizer --vocab-size 255 --micro-batch-size 2 --global-batch-size 16
--lr 1e-3 --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --log-interval 1000
--num-workers 0 --split 98,1,1 --no-create-attention-mask-in-dataloader --dwm --train-iters 100
""".split()
LLAMA = "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2"
MOE = """
--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 128 --moe-layer-freq [0,1,1,1]
--moe-shared-expert-intermediate-size 128 --moe-token-dispatcher-type alltoall
--moe-aux-loss-coeff 0.01
"""
ALL = ["ghost current", "ghost next", "finite_difference next"]
# Flags, and the methods of the meta steps.
CASES: dict[str, tuple[str, list[str]]] = {
    "tp2-pp2": (
        f"{LLAMA} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        ALL,
    ),
    "tp2-dp2-tied": (
        "--tensor-model-parallel-size 2 --use-distributed-optimizer --qk-layernorm",
        ALL,
    ),
    "pp2-dp2-bf16": (
        "--pipeline-model-parallel-size 2 --use-distributed-optimizer --bf16 "
        "--accumulate-allreduce-grads-in-fp32 --calculate-per-token-loss",
        ALL,
    ),
    "tp2-sp-dp2": (f"{LLAMA} --tensor-model-parallel-size 2 --sequence-parallel", ALL),
    "vpp2-dp2-full": (
        f"{LLAMA} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ALL,
    ),
    "moe-pp2-dp2": (f"{LLAMA} {MOE} --pipeline-model-parallel-size 2", ALL),
    "moe-ep2": (
        f"{LLAMA} {MOE} --expert-model-parallel-size 2 --use-distributed-optimizer",
        ALL,
    ),
    "model-tp2-dp2": (
        f"{LLAMA} --tensor-model-parallel-size 2 --dwm-form model --dwm-rule chain "
        "--dwm-num-layers 2 --dwm-hidden-size 64 --dwm-schedule joint",
        ["ghost next"],
    ),
}


# Methods of a process group, what they do, and which argument holds what is sent.
METHODS = (
    ("allreduce", "all_reduce", 0),
    ("allreduce_coalesced", "all_reduce", 0),
    ("broadcast", "broadcast", 0),
    ("allgather", "all_gather", 1),
    ("_allgather_base", "all_gather", 1),
    ("all_gather_single", "all_gather", 1),
    ("all_gather_single_coalesced", "all_gather", 1),
    ("reduce_scatter", "reduce_scatter", 1),
    ("_reduce_scatter_base", "reduce_scatter", 1),
    ("reduce_scatter_single", "reduce_scatter", 1),
    ("reduce_scatter_single_coalesced", "reduce_scatter", 1),
    ("alltoall_base", "all_to_all", 1),
    ("all_to_all_single", "all_to_all", 1),
    ("send", "send", 0),
)

# ------------------------------------------------------------------------------- on each rank


def worker() -> None:
    """Takes the steps of every case, one after the other, and writes what was counted."""
    for folder in (ROOT, os.path.join(ROOT, "tests", "functional")):
        sys.path.insert(0, folder)
    from megatron_dwm.hosts import cpu

    cpu.install()
    import run_many
    import torch
    from torch_norms import torch_norms

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in os.environ["PLAN_CASES"].split():
        flags, methods = CASES[name]
        words = [*cpu.default_flags(), *COMMON, *flags.split()]
        sequence = "--sequence-parallel" in words
        with torch_norms() if sequence else contextlib.nullcontext():
            found = measured(words, methods)
        if rank == 0:
            from megatron_dwm.hosts.megatron_lm.planned import planned

            found["plans"] = {}
            for method in methods:
                estimator, lookahead = method.split()
                chosen = ["--dwm-estimator", estimator, "--dwm-lookahead", lookahead]
                plan = planned([*words, *chosen], world)
                found["plans"][method] = plan.plan()
            found["planned_layers"] = [
                sorted({f"{part.name} {part.layer}" for part in (*stage.weights, *stage.norms)})
                for stage in plan.run.model.stages
            ]
        path = os.path.join(os.environ["OUT"], f"{name}.{rank}.json")
        with open(path, "w") as file:
            json.dump(found, file)
        run_many.clean()
    torch.distributed.barrier()
    os._exit(0)


class Done(BaseException):
    """Ends a run."""


def measured(words: list[str], methods: list[str]) -> dict[str, Any]:
    """Runs the script's first steps; returns what each kind of step did on this rank."""
    from measuring import Always

    from megatron_dwm.hosts.megatron_lm.session import Session

    attached, found, done = Session.train_step, {}, [0]
    plan = ["plain", methods[0], "stock", "plain", *methods]
    plan += [f"memory {method}" for method in methods]
    script = os.path.join(ROOT, "examples", "pretrain_dwm.py")

    def train_step(self: Any, stock: Any, *args: Any, iteration: int, **kwargs: Any) -> tuple:
        if done[0] == len(plan):
            raise Done
        kind, warm = plan[done[0]], done[0] < 2
        done[0] += 1
        if not found:
            found.update(held(args[2]))
        name = kind.removeprefix("memory ")
        self.step.schedule = Always(name in methods)
        if name in methods:
            self.step.influence.config = with_method(self.step.influence.config, name)

        def act() -> tuple:
            if name == "stock":
                return stock(*args, iteration=iteration, **kwargs)
            return attached(self, stock, *args, iteration=iteration, **kwargs)

        if warm:
            return act()
        if kind != name:
            result, found[kind] = with_memory(self.step, act)
            return result
        with counted() as counts:
            result = act()
        found[name] = counts
        return result

    Session.train_step = train_step  # type: ignore[method-assign]
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except Done:
        pass
    finally:
        Session.train_step = attached  # type: ignore[method-assign]
    return found


def held(model: list[Any]) -> dict[str, Any]:
    """Returns this rank's stage, its trained elements, and the layers that have them."""
    from megatron.core import mpu
    from megatron.core.utils import unwrap_model

    layers = []
    for chunk in unwrap_model(model):
        for name, module in chunk.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                name = re.sub(r"^decoder\.layers\.\d+\.|^decoder\.|^embedding\.", "", name)
                name = re.sub(r"local_experts\.\d+\.", "", name)
                layers.append(f"{name} {type(module).__name__}")
    return {
        "stage": mpu.get_pipeline_model_parallel_rank(),
        "parameters": sum(p.numel() for chunk in model for p in chunk.parameters()),
        "layers": sorted(set(layers)),
    }


def with_method(config: Any, method: str) -> Any:
    """Returns settings with an estimator and a lookahead."""
    import dataclasses

    estimator, lookahead = method.split()
    return dataclasses.replace(config, estimator=estimator, lookahead=lookahead)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, Any]]:
    """Counts products of matrices, and what this rank sends; filled at the end."""
    from torch.utils.flop_counter import FlopCounterMode

    found: dict[str, Any] = {"sent": {}}
    counter = FlopCounterMode(display=False)
    with sending(found["sent"]), counter:
        yield found
    found["flops"] = counter.get_total_flops()


@contextlib.contextmanager
def sending(sent: dict[str, float]) -> Iterator[None]:
    """Adds up what this rank sends, by group, at the methods of the process groups themselves."""
    import torch

    from megatron_dwm.planning import traffic

    kind_of = torch.distributed.ProcessGroup
    names = group_names()

    def size(tensors: Any) -> int:
        if isinstance(tensors, torch.Tensor):
            return tensors.numel() * tensors.element_size()
        return sum(size(t) for t in tensors)

    def watched(method: str, kind: str, argument: int) -> Any:
        original = getattr(kind_of, method)

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            name = names.get(group.group_name, group.group_name)
            if kind == "send":  # of two stages, one direction goes by the group of all ranks
                name = traffic.PP
            count = traffic.sent(kind, size(args[argument]), group.size())
            if group.size() > 1:
                sent[name] = sent.get(name, 0.0) + count
            return original(group, *args, **kwargs)

        # As the class holds it: what `getattr` returns would not be bound again.
        return vars(kind_of)[method], call

    kept = {}
    for method, kind, argument in METHODS:
        if not hasattr(kind_of, method):  # of another version of torch
            continue
        kept[method], replacement = watched(method, kind, argument)
        setattr(kind_of, method, replacement)
    try:
        yield
    finally:
        for method, original in kept.items():
            setattr(kind_of, method, original)


def group_names() -> dict[str, str]:
    """Returns the plan's name of each of Megatron's groups that this rank is in."""
    import torch
    from megatron.core import parallel_state as mpu

    from megatron_dwm.planning import traffic

    groups = [
        (torch.distributed.group.WORLD, traffic.WORLD),
        (mpu.get_expert_data_parallel_group(), traffic.EXPERT_DP),
        (mpu.get_expert_tensor_and_model_parallel_group(), traffic.TP_EP),
        (mpu.get_expert_tensor_parallel_group(), traffic.EXPERT_TP),
        (mpu.get_expert_model_parallel_group(), traffic.EP),
        (mpu.get_embedding_group(check_initialized=False), traffic.ENDS),
        (mpu.get_model_parallel_group(), traffic.TP_PP),
        (mpu.get_pipeline_model_parallel_group(), traffic.PP),
        (mpu.get_tensor_model_parallel_group(), traffic.TP),
        (mpu.get_data_parallel_group(with_context_parallel=True), traffic.DP),
        (mpu.get_data_parallel_group(), traffic.DP),
    ]
    return {group.group_name: name for group, name in groups if group is not None}


def with_memory(step: Any, act: Any) -> tuple[Any, float]:
    """Takes a meta step; returns its result, and what it keeps where passes C and D begin."""
    from measuring import live_bytes

    gc.collect()
    before, seen = live_bytes(), []

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(live_bytes())
            return function(*args, **kwargs)

        return call

    if step.influence.config.lookahead == "current":
        places = [(step.influence, "weighted_step")]
    else:
        places = [(step.passes, "meta_loss_gradient"), (step.passes, "run")]
    for owner, name in places:
        setattr(owner, name, watched(getattr(owner, name)))
    try:
        result = act()
    finally:
        for owner, name in places:
            delattr(owner, name)
    return result, max(seen) - before


# ------------------------------------------------------------------------------- comparison


def compared(folder: str, name: str) -> list[tuple[str, str, float, float]]:
    """Returns rows of a case: what step, what of it, planned, and measured."""
    ranks = []
    for rank in range(RANKS):
        with open(os.path.join(folder, f"{name}.{rank}.json")) as file:
            ranks.append(json.load(file))
    methods, plans, rows = CASES[name][1], ranks[0]["plans"], []
    sizes = plans[methods[0]]["model"]["parameters_by_stage"]
    for rank in ranks:
        rows.append(("model", "parameters", sizes[rank["stage"]], rank["parameters"]))
    stock = sum(r["stock"]["flops"] for r in ranks)
    rows.append(("stock", "FLOPs", plans[methods[0]]["stock"]["flops"], stock))
    for step in ("plain", *methods):
        plan = plans[methods[0]]["plain"]
        if step != "plain":
            (plan,) = plans[step]["methods"]
        planned = sum(plan["flops"]["total"].values())
        extra = sum(r[step]["flops"] for r in ranks) - stock
        if planned or extra:
            rows.append((step, "FLOPs", planned, extra))
        excess = [_excess(r[step]["sent"], r["stock"]["sent"]) for r in ranks]
        for group in sorted({g for e in excess for g in e} | set(plan["sent"]["most"])):
            sent = max(e.get(group, 0.0) for e in excess)
            if group == "EP":
                # How many tokens a rank gets differs from step to step, all of them together not.
                sent = sum(e.get(group, 0.0) for e in excess) / RANKS
            expected = plan["sent"]["most"].get(group, 0.0)
            if max(sent, expected) >= LEAST_BYTES:
                rows.append((step, f"bytes {group}", expected, sent))
        if step != "plain":
            kept = [
                sum(of_stage.get(k, 0.0) for k in ("v", "theta", "theta+", "the step's gradient"))
                for of_stage in plan["kept"]
            ]
            rows.append((step, "memory", max(kept), max(r[f"memory {step}"] for r in ranks)))
    return rows


def _excess(sent: dict[str, float], stock: dict[str, float]) -> dict[str, float]:
    return {g: sent.get(g, 0.0) - stock.get(g, 0.0) for g in {*sent, *stock}}


def off(planned: float, measured: float) -> float:
    """Returns how far a plan is off, as a share of what was measured."""
    return abs(planned - measured) / max(abs(measured), 1e-9)


def main() -> int:
    """Spawns the ranks and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        env.update(PLAN_CASES=" ".join(args.cases), OUT=folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(RANKS), os.path.abspath(__file__)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-6000:], file=sys.stderr)
            return 2
        print("| run | step | what | planned | measured | planned / measured |")
        print("|---|---|---|---|---|---|")
        for name in args.cases:
            for step, what, planned, measured in compared(folder, name):
                ratio = planned / measured if measured else float("inf")
                print(
                    f"| {name} | {step} | {what} | {planned:.4g} | {measured:.4g} | {ratio:.3f} |"
                )
                worst = max(worst, off(planned, measured))
    print(f"\nfurthest off: {worst:.1%}, allowed {LIMIT:.0%}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    if "PLAN_CASES" in os.environ:
        worker()
    raise SystemExit(main())
