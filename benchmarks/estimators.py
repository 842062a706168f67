#!/usr/bin/env python
"""Trains the demo's model with each estimator and several seeds; compares the validation losses.

    make demo                       # builds the data sets
    python benchmarks/estimators.py [--demo demo_out] [--iters 150] [--seeds 3]

One run a line and seed, on two data-parallel ranks, all with the same tokens for a seed; "uniform"
is the floor to beat. Prints each final validation loss, mean and spread, and whether the means of
ghost and finite difference differ by less than the spread of seeds. Exit code 1 when they do not.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

VARIANTS = {
    "uniform": "--dwm-policy uniform",
    "finite_difference": "--dwm-estimator finite_difference",
    "ghost": "--dwm-estimator ghost",
    "ghost, current": "--dwm-estimator ghost --dwm-lookahead current",
}
MODEL = """
--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --seq-length 128 --max-position-embeddings 128
--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
--hidden-dropout 0 --attention-dropout 0 --tokenizer-type SentencePieceTokenizer
--micro-batch-size 8 --global-batch-size 16 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine
--lr-warmup-iters 20 --clip-grad 1.0 --weight-decay 0.1 --adam-beta2 0.95 --eval-iters 20
--log-interval 1000000 --num-workers 0 --no-create-attention-mask-in-dataloader --dwm
--dwm-pooling mean --dwm-stages 2
""".split()


def blend(demo: str) -> list[str]:
    """Returns the demo's training blend: every good domain alike, a third of all corrupt."""
    names = sorted(n[:-4] for n in os.listdir(f"{demo}/data") if n.endswith(".idx"))
    words = []
    for name in names:
        if name not in ("meta", "valid"):
            words += ["3" if name == "corrupt" else "1", f"{demo}/data/{name}"]
    return words


def validation_loss(demo: str, iters: int, seed: int, flags: str) -> float:
    """Trains once and returns the final loss on the held-out target."""
    from megatron_dwm.hosts import cpu

    learned = [
        "--dwm-form",
        "model",
        "--dwm-rule",
        "chain",
        "--dwm-init",
        "llm:2",
        "--dwm-warmup-steps",
        str(iters // 4),
    ]
    learned += ["--dwm-meta-data-path", f"{demo}/data/meta", "--dwm-meta-batch-size", "16"]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", os.path.join(ROOT, "examples", "pretrain_dwm.py")]
        command += [*cpu.default_flags(), *MODEL, "--train-iters", str(iters)]
        command += ["--lr-decay-iters", str(iters), "--eval-interval", str(iters)]
        command += ["--train-data-path", *blend(demo), "--valid-data-path", f"{demo}/data/valid"]
        command += ["--test-data-path", f"{demo}/data/valid", "--data-cache-path", cache]
        command += ["--tokenizer-model", f"{demo}/corpus/tokenizer.model", "--seed", str(seed)]
        command += [*([] if "uniform" in flags else learned), *flags.split()]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = re.findall(r"validation loss at iteration \d+ \| lm loss value: (\S+)", done.stdout)
    if not found:
        raise SystemExit(f"the run failed:\n{done.stderr[-3000:]}")
    return float(found[-1])


def main() -> int:
    """Trains all and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", default="demo_out", help="folder of `make demo`")
    parser.add_argument("--iters", type=int, default=150, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, 2 or more")
    args = parser.parse_args()
    if not os.path.exists(f"{args.demo}/data/meta.idx"):
        raise SystemExit(f"--demo {args.demo}: no data sets there; run `make demo` first")
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(1, args.seeds + 1):
        for name, flags in VARIANTS.items():
            losses[name].append(validation_loss(args.demo, args.iters, seed, flags))
            print(f"seed {seed}  {name:18s} {losses[name][-1]:.4f}", flush=True)
    print("\n| weights | validation loss, mean | spread (standard deviation) |\n|---|---|---|")
    for name, values in losses.items():
        print(f"| {name} | {statistics.mean(values):.4f} | {statistics.stdev(values):.4f} |")
    ghost, difference = losses["ghost"], losses["finite_difference"]
    gap = abs(statistics.mean(ghost) - statistics.mean(difference))
    spread = max(statistics.stdev(ghost), statistics.stdev(difference))
    print(f"\nghost and finite difference differ by {gap:.4f}; spread of seeds {spread:.4f}")
    return int(gap > spread)


if __name__ == "__main__":
    raise SystemExit(main())
