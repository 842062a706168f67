#!/usr/bin/env python
"""Speed of `megatron-dwm convert export` over a plain copy of the same bytes with safetensors.

    python benchmarks/export.py [--layers 16] [--rounds 5] [--max-shard-size 300MB] [--dtype bf16]

A random Llama of Hugging Face's format is imported; then, in turn, its checkpoint is exported, and
the exported shards are loaded and written again by `safetensors.torch`. Both read and write the
same bytes, from the page cache and to the same disk. Each round also copies first every other time.
Peak memory is that of a process which does nothing but export, beyond what it has after its
imports; the floor is the largest shard.

Exit code 1 when the median ratio of the speeds is below 0.7.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_dwm.conversion.export import export  # noqa: E402
from megatron_dwm.conversion.import_model import import_model  # noqa: E402

LIMIT = 0.7


def write_model(folder: Path, layers: int, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


@contextlib.contextmanager
def silent():  # noqa: ANN201
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def export_to(start: str, out: str, shard: str) -> None:
    with silent():
        export(start, out, max_shard_size=shard, tokenizer_model="none", force=True)


def copy_of(source: Path, out: Path) -> None:
    """Loads and writes every shard; nothing else."""
    out.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), out / path.name, metadata={"format": "pt"})


def seconds(act: Callable[[], None], out: Path) -> float:
    """Times writing into a folder that is not there, to the end of the writes to the disk."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    act()
    os.sync()
    return time.perf_counter() - start


def peak_megabytes() -> float:
    """Returns the most memory that this process has had."""
    (line,) = (x for x in open("/proc/self/status") if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16, help="of 1024, with 32000 tokens")
    parser.add_argument("--rounds", type=int, default=5, help="exports and copies")
    parser.add_argument("--max-shard-size", default="300MB", help="largest weights file")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        before = peak_megabytes()
        export_to(*args.memory, args.max_shard_size)
        print(peak_megabytes() - before)
        return 0

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
        write_model(folder / "hf", args.layers, dtype)
        with silent():
            import_model(str(folder / "hf"), str(folder / "start"))
        start, out, copy = str(folder / "start"), folder / "out", folder / "copy"
        export_to(start, str(out), args.max_shard_size)  # the shards that are copied, and warm
        shards = folder / "shards"
        shutil.copytree(out, shards)
        times: list[tuple[float, float]] = []
        for k in range(args.rounds):
            acts = [
                lambda: seconds(lambda: export_to(start, str(out), args.max_shard_size), out),
                lambda: seconds(lambda: copy_of(shards, copy), copy),
            ]
            first, second = acts if k % 2 == 0 else reversed(acts)
            pair = (first(), second())
            times.append(pair if k % 2 == 0 else (pair[1], pair[0]))
        sizes = [p.stat().st_size / 2**20 for p in shards.glob("*.safetensors")]
        words = [sys.executable, __file__, "--memory", start, str(folder / "again")]
        words += ["--max-shard-size", args.max_shard_size]
        peak = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    exported, copied = (statistics.median(t) for t in zip(*times, strict=True))
    ratios = sorted(c / e for e, c in times)
    ratio = statistics.median(ratios)
    print(f"{sum(sizes):.0f} MiB in {len(sizes)} shards of at most {max(sizes):.0f} MiB")
    print(f"export {exported:.2f} s, copy {copied:.2f} s, median of {args.rounds}")
    print(f"speed of the export over the copy: {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"peak memory of the export: {peak:.0f} MiB beyond the imports")
    if ratio < LIMIT:
        print(f"missed: {LIMIT} of the copy's speed", file=sys.stderr)
    return int(ratio < LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
