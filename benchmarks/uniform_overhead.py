#!/usr/bin/env python
"""Step time with `--dwm-policy uniform` over the stock trainer, side by side in one run.

    python benchmarks/uniform_overhead.py [--ranks 2] [--steps 80]

One training run alternates: of every two steps, one is the stock trainer's own and one goes
through the weighted loss with w = 1, in the order A B B A. Both see the same machine at the same
time, so their ratio holds where single times do not. Prints the median of each and the median of
the ratio pair by pair; exit code 1 when that is above --limit.
"""

from __future__ import annotations

import argparse
import os
import runpy
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SKIPPED = 8  # steps before the caches are warm

MODEL = """
--num-layers 6 --hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 8 --seq-length 256
--max-position-embeddings 256 --swiglu --normalization RMSNorm --disable-bias-linear
--position-embedding-type rope --untie-embeddings-and-output-weights --hidden-dropout 0
--attention-dropout 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 4095
--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --lr-decay-style constant --eval-iters 1
--eval-interval 100000 --log-interval 1000 --num-workers 0 --split 98,1,1
--no-create-attention-mask-in-dataloader --dwm --dwm-policy uniform
""".split()


def worker() -> None:
    """One rank: trains, and times every step; the last rank prints."""
    sys.path.insert(0, ROOT)
    from megatron_dwm.hosts import cpu

    cpu.install()
    import torch

    from megatron_dwm.hosts.megatron_lm.session import Session

    steps = int(os.environ["BENCH_STEPS"])
    times: dict[str, list[float]] = {"stock": [], "uniform": []}
    attached = Session.train_step

    def alternating(self, stock, *args, iteration=None, **kwargs):  # noqa: ANN001, ANN202
        kind = "stock" if iteration % 4 in (0, 3) else "uniform"
        torch.distributed.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        if kind == "stock":
            result = stock(*args, iteration=iteration, **kwargs)
        else:
            result = attached(self, stock, *args, iteration=iteration, **kwargs)
        torch.cuda.synchronize()
        if iteration >= SKIPPED:
            times[kind].append(time.perf_counter() - start)
        return result

    Session.train_step = alternating  # type: ignore[method-assign]
    script = os.path.join(ROOT, "examples", "pretrain_dwm.py")
    flags = [*cpu.default_flags(), *MODEL, "--train-iters", str(steps + SKIPPED)]
    sys.argv = [script, *flags, *sys.argv[1:]]
    runpy.run_path(script, run_name="__main__")
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        pairs = [u / s for u, s in zip(times["uniform"], times["stock"], strict=True)]
        print(
            f"UNIFORM-OVERHEAD {statistics.median(times['stock']):.6f} "
            f"{statistics.median(times['uniform']):.6f} {statistics.median(pairs):.4f} "
            f"{min(pairs):.4f} {max(pairs):.4f} {len(pairs)}",
            flush=True,
        )


def main() -> int:
    """Spawns the ranks and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--steps", type=int, default=80, help="timed steps, a multiple of 4")
    parser.add_argument("--limit", type=float, default=1.02, help="highest ratio that passes")
    args = parser.parse_args()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(args.ranks), os.path.abspath(__file__)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH_STEPS": str(args.steps)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [x for x in done.stdout.splitlines() if x.startswith("UNIFORM-OVERHEAD")]
    if not lines:
        print(done.stderr[-3000:], file=sys.stderr)
        return 2
    stock, uniform, ratio, low, high, count = (float(x) for x in lines[0].split()[1:])
    print(f"stock step      {stock * 1000:8.1f} ms (median of {count:.0f})")
    print(f"uniform step    {uniform * 1000:8.1f} ms")
    print(f"ratio           {ratio:8.4f}    (median of pairs; {low:.3f} to {high:.3f})")
    return 0 if ratio <= args.limit else 1


if __name__ == "__main__":
    if "RANK" in os.environ and "BENCH_STEPS" in os.environ:
        worker()
    else:
        raise SystemExit(main())
