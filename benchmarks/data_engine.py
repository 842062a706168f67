#!/usr/bin/env python
"""Start-up of a weighted epoch: the data engine beside NumPy, torch and Megatron, in one run.

    python benchmarks/data_engine.py [--documents 1000000 10000000 100000000] [--threads 0]

For every size: synthetic lengths (log-normal) and weights, memory-mapped from a temporary
folder, and an epoch of as many draws as documents.

- ours: systematic counts, order of the draws, sample index. The order of samples is computed
  on the fly. Independent draws (the alias method) are timed beside it.
- NumPy: `Generator.choice(n, n, p=p)`, whose draws come in random order, then Megatron's
  `build_sample_idx`.
- torch: `torch.multinomial` with replacement, which takes at most 2^24 categories.
- equal weights: Megatron's own start-up (document index, sample index, shuffle index, all of
  one epoch) beside ours, with the memory that each keeps for an epoch.

Everybody's best of --repeats runs counts (of two beyond 20M documents: the first touch of so much
memory is slow on a virtual machine).

Prints one markdown table. Exit code 1 when a size misses a target: ten times as fast as NumPy;
with equal weights as fast as Megatron, in less memory; and time per document within 2.5 times
that of the smallest size, whose arrays lie in the cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

from megatron_dwm.data.draws import draw_counts, sample_index, visit_order

SEQUENCE_LENGTH = 4096
MEAN_LOG_LENGTH, DEVIATION_LOG_LENGTH = 5.3, 1.0  # a mean of 330 tokens
MOST_TOKENS = 1 << 17
MULTINOMIAL_LIMIT = 1 << 24
NUMPY_RATIO = 10.0
FLAT_RATIO = 2.5
REPEATED = 20_000_000  # documents up to which all --repeats are taken
PIECE = 1 << 22  # documents that are made at a time


@dataclass
class Times:
    """What one size took, in seconds, and what an epoch of it keeps, in bytes."""

    documents: int
    samples: int = 0
    draw: float = 0.0
    order: float = 0.0
    index: float = 0.0
    independent: float = 0.0
    choice: float = 0.0
    choice_index: float = 0.0
    multinomial: float | None = None
    equal: float = 0.0
    megatron: float = 0.0
    order_bytes: int = 0
    index_bytes: int = 0
    megatron_order_bytes: int = 0
    megatron_index_bytes: int = 0

    @property
    def total(self) -> float:
        """Our start-up, with systematic draws."""
        return self.draw + self.order + self.index

    @property
    def numpy_ratio(self) -> float:
        """How many times as fast as NumPy's draw and Megatron's index we are."""
        return (self.choice + self.choice_index) / self.total

    @property
    def equal_ratio(self) -> float:
        """How many times as fast as Megatron's start-up we are with equal weights."""
        return self.megatron / self.equal

    def each(self, seconds: float) -> str:
        """Nanoseconds per document."""
        return f"{seconds / self.documents * 1e9:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--threads", type=int, default=0, help="of our kernels; 0 for all cores")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the best counts")
    args = parser.parse_args()
    if min(args.documents) < 1000 or args.threads < 0 or args.repeats < 1:
        parser.error("--documents: at least 1000; --threads: at least 0; --repeats: at least 1")

    rows = []
    for documents in sorted(set(args.documents)):
        repeats = args.repeats if documents <= REPEATED else min(args.repeats, 2)
        with tempfile.TemporaryDirectory() as folder:
            lengths, weights = synthetic_corpus(Path(folder), documents)
            rows.append(measure(lengths, weights, args.threads, repeats))
            del lengths, weights
    print_table(rows)
    missed = [miss for row in rows for miss in misses(row, rows[0])]
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return 1 if missed else 0


def synthetic_corpus(folder: Path, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Write lengths and weights piece by piece; return them `[D]`, memory-mapped."""
    rng = np.random.default_rng(0)
    with open(folder / "lengths", "wb") as lengths, open(folder / "weights", "wb") as weights:
        for begin in range(0, documents, PIECE):
            size = min(PIECE, documents - begin)
            tokens = rng.lognormal(MEAN_LOG_LENGTH, DEVIATION_LOG_LENGTH, size)
            np.clip(tokens, 1, MOST_TOKENS).astype("<i4").tofile(lengths)
            rng.lognormal(0.0, 1.0, size).astype("<f4").tofile(weights)
    return (
        np.memmap(folder / "lengths", dtype="<i4", mode="r"),
        np.memmap(folder / "weights", dtype="<f4", mode="r"),
    )


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the best wall time in seconds, and the last result."""
    best = float("inf")
    result = None
    for _ in range(repeats):
        del result  # never two results at once
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def measure(lengths: np.ndarray, weights: np.ndarray, threads: int, repeats: int) -> Times:
    """Measure one size: everybody's best of `repeats` runs."""
    documents = len(lengths)
    times = Times(documents)
    # What is mapped is read once, so that no time has the disk in it.
    lengths.sum(dtype=np.int64)
    weights.sum(dtype=np.float64)

    measure_ours(times, lengths, weights, threads, repeats)
    measure_equal(times, lengths, threads, repeats)
    measure_numpy(times, lengths, weights, repeats)
    if documents <= MULTINOMIAL_LIMIT:
        tensor = torch.from_numpy(np.array(weights))
        times.multinomial, _ = timed(
            lambda: torch.multinomial(tensor, documents, replacement=True), repeats
        )
    return times


def measure_ours(
    times: Times, lengths: np.ndarray, weights: np.ndarray, threads: int, repeats: int
) -> None:
    """Weighted draws by our kernels."""
    documents = len(weights)
    key = dict(seed=1234, epoch=0, threads=threads)
    times.draw, counts = timed(lambda: draw_counts(weights, documents, **key), repeats)
    times.order, order = timed(lambda: visit_order(counts, **key), repeats)
    times.index, _ = timed(
        lambda: sample_index(order, lengths, SEQUENCE_LENGTH, threads=threads), repeats
    )
    times.independent, _ = timed(
        lambda: draw_counts(weights, documents, method="independent", **key), repeats
    )


def measure_numpy(times: Times, lengths: np.ndarray, weights: np.ndarray, repeats: int) -> None:
    """Weighted draws by NumPy, in random order as they come, packed by Megatron."""
    documents = len(weights)

    def choose() -> np.ndarray:
        probabilities = weights.astype(np.float64)
        probabilities /= probabilities.sum()
        rng = np.random.default_rng(1234)
        return rng.choice(documents, size=documents, p=probabilities).astype(np.int32)

    times.choice, drawn = timed(choose, repeats)
    times.choice_index, _ = timed(lambda: megatron_index(lengths, drawn), repeats)


def measure_equal(times: Times, lengths: np.ndarray, threads: int, repeats: int) -> None:
    """Equal weights: our start-up and Megatron's own."""
    documents = len(lengths)
    equal = np.ones(documents, dtype=np.float32)
    key = dict(seed=1234, epoch=0, threads=threads)

    def ours() -> tuple[np.ndarray, np.ndarray]:
        order = visit_order(draw_counts(equal, documents, **key), **key)
        return order, sample_index(order, lengths, SEQUENCE_LENGTH, threads=threads)

    times.equal, (order, index) = timed(ours, repeats)
    times.samples = len(index) - 1
    times.order_bytes, times.index_bytes = order.nbytes, index.nbytes
    del order, index

    def megatron() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        state = np.random.RandomState(1234)
        order = _build_document_index(np.arange(documents, dtype=np.int32), 1, state, False)
        index = megatron_index(lengths, order)
        samples = len(index) - 1
        return order, index, _build_shuffle_index(samples, samples, state)

    times.megatron, (order, index, shuffle) = timed(megatron, repeats)
    times.megatron_order_bytes = order.nbytes
    times.megatron_index_bytes = index.nbytes + shuffle.nbytes


def megatron_index(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Megatron's sample index; it is told the number of tokens, which it must know."""
    tokens = int(lengths[order].sum(dtype=np.int64))
    return helpers.build_sample_idx(lengths, order, SEQUENCE_LENGTH, 1, tokens)


def misses(times: Times, smallest: Times) -> list[str]:
    """Return the targets that a size misses, in words."""
    found = []
    if times.numpy_ratio < NUMPY_RATIO:
        found.append(f"{times.numpy_ratio:.1f} times as fast as NumPy, not {NUMPY_RATIO:g}")
    if times.equal_ratio < 1.0:
        found.append(f"{times.equal_ratio:.2f} times as fast as Megatron with equal weights")
    kept = times.order_bytes + times.index_bytes
    theirs = times.megatron_order_bytes + times.megatron_index_bytes
    if kept >= theirs:
        found.append(f"an epoch of equal weights keeps {kept:,} bytes, Megatron's {theirs:,}")
    growth = growth_of(times, smallest)
    if growth > FLAT_RATIO:
        found.append(f"{growth:.2f} times the time per document of {smallest.documents:,}")
    return [f"{times.documents:,} documents: {miss}" for miss in found]


def growth_of(times: Times, smallest: Times) -> float:
    return times.total / times.documents / (smallest.total / smallest.documents)


def print_table(rows: list[Times]) -> None:
    """Print one column per size; times are nanoseconds per document but where it says so."""
    lines: list[tuple[str, Callable[[Times], str]]] = [
        ("ns per document", lambda t: f"{t.documents:,} documents"),
        ("draw (systematic)", lambda t: t.each(t.draw)),
        ("order", lambda t: t.each(t.order)),
        ("sample index", lambda t: t.each(t.index)),
        ("**total**", lambda t: f"**{t.each(t.total)}**"),
        ("total, seconds", lambda t: f"{t.total:.3f}"),
        ("total / that of the smallest size", lambda t: f"{growth_of(t, rows[0]):.2f}"),
        ("draw (independent)", lambda t: t.each(t.independent)),
        ("NumPy: choice", lambda t: t.each(t.choice)),
        ("Megatron: build_sample_idx of it", lambda t: t.each(t.choice_index)),
        ("**NumPy and Megatron / ours**", lambda t: f"**{t.numpy_ratio:.1f}**"),
        ("torch.multinomial", multinomial_text),
        ("equal weights: ours", lambda t: t.each(t.equal)),
        ("equal weights: Megatron", lambda t: t.each(t.megatron)),
        ("**Megatron / ours**", lambda t: f"**{t.equal_ratio:.1f}**"),
        ("bytes kept per document: ours", lambda t: f"{t.order_bytes / t.documents:.1f}"),
        (
            "bytes kept per document: Megatron",
            lambda t: f"{t.megatron_order_bytes / t.documents:.1f}",
        ),
        ("bytes kept per sample: ours", lambda t: f"{t.index_bytes / t.samples:.1f}"),
        (
            "bytes kept per sample: Megatron",
            lambda t: f"{t.megatron_index_bytes / t.samples:.1f}",
        ),
    ]
    for number, (name, text) in enumerate(lines):
        print("| " + " | ".join([name, *(text(row) for row in rows)]) + " |")
        if number == 0:
            print("|---" + "|---:" * len(rows) + "|")


def multinomial_text(times: Times) -> str:
    if times.multinomial is None:
        return "refuses more than 2^24"
    return f"{times.each(times.multinomial)} ({times.multinomial / times.independent:.1f} x ours)"


if __name__ == "__main__":
    raise SystemExit(main())
