"""Makes what a run needs of a smaller one, then becomes that run.

    python prepare.py JOB      (see `runner.prepared`)

The smaller run, the teacher, is taken once for all runs that learn from it. Recipes:

    dsir       weight files of the half of the documents that DSIR selects, and shares; no teacher
    from-run   weight files and shares of the data sets, of what the teacher made of the documents
    snapshot   the teacher's head, as it was at each stage's end
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@contextlib.contextmanager
def alone(job: dict[str, Any]) -> Iterator[None]:
    """Within it, no other run makes what this one makes."""
    with open(Path(job["folder"]) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def taught(job: dict[str, Any]) -> Path:
    """Returns the folder of the teacher's run, taking it if it has not been taken."""
    folder, save = Path(job["folder"]), Path(job["save"])
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(save.parent, ignore_errors=True)
        save.parent.mkdir(parents=True)
        subprocess.run(job["teacher"], check=True)
        done.touch()
    return save


def from_run(job: dict[str, Any], save: Path) -> list[str]:
    """Returns the blend of data sets with weight files beside them."""
    from megatron_dwm.cli import weights

    made = Path(job["folder"]) / "made"
    blend = made / "blend.txt"
    if not blend.exists():
        linked(job, made)
        prefixes = [str(made / name) for name in job["names"]]
        partial = made / "blend.part"
        if weights.main(["from-run", str(save), *prefixes, "--blend", str(partial)]):
            raise SystemExit(1)
        partial.rename(blend)
    return blend.read_text().split()


def dsir(job: dict[str, Any]) -> list[str]:
    """Returns the blend of data sets with the documents that DSIR selects.

    All documents compete, each data set by the share of its tokens that is selected.
    """
    from megatron_dwm.corpus.dsir import Features, Hasher, count, log_ratios, log_weight, select
    from megatron_dwm.data.index import read_index
    from megatron_dwm.data.weight_file import write_weights

    made = Path(job["folder"]) / "made"
    blend = made / "blend.txt"
    if blend.exists():
        return blend.read_text().split()
    linked(job, made)
    features = Features(ngrams=2, buckets=10_000)
    hasher = Hasher(features)
    texts = {name: documents(made / name) for name in job["names"]}
    buckets = {name: [hasher.buckets(text) for text in found] for name, found in texts.items()}
    target = [hasher.buckets(text) for text in documents(Path(job["data"]) / "meta")]
    # The raw texts as the blend has them, not as many as lie there.
    raw = numpy.zeros(features.buckets)
    for name, share in zip(job["names"], job["shares"], strict=True):
        counts = count(buckets[name], features)
        raw += share * counts / max(1, counts.sum())
    ratios = log_ratios(count(target, features), raw)
    weights = numpy.array([log_weight(b, ratios) for n in job["names"] for b in buckets[n]])
    chosen = select(weights, numpy.ones(len(weights), bool), 0.5, seed=1)
    words, first = [], 0
    for name, share in zip(job["names"], job["shares"], strict=True):
        index = read_index(made / name)
        mine = numpy.asarray(chosen[first : first + index.documents], numpy.float32)
        first += index.documents
        tokens = numpy.asarray(index.sequence_lengths, float)
        part = float((tokens * mine).sum() / tokens.sum())
        if part > 0:
            write_weights(made / f"{name}.weights", mine, index)
            words += [f"{share * part:.6g}", str(made / name)]
    partial = made / "blend.part"
    partial.write_text(" ".join(words))
    partial.rename(blend)
    return words


def documents(prefix: Path) -> list[str]:
    """Returns the texts of a data set of bytes."""
    from megatron_dwm.data.index import read_index

    index = read_index(prefix)
    data = numpy.fromfile(f"{prefix}.bin", index.dtype).astype(numpy.uint8).tobytes()
    ends = numpy.cumsum(index.sequence_lengths).tolist()
    starts = [0, *ends[:-1]]
    # Without the end-of-document byte.
    return [data[a : b - 1].decode(errors="replace") for a, b in zip(starts, ends, strict=True)]


def linked(job: dict[str, Any], made: Path) -> None:
    """Makes a folder of the run's data sets, for weight files of its own."""
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for name in job["names"]:
        for suffix in (".bin", ".idx"):
            (made / f"{name}{suffix}").symlink_to(Path(job["data"]) / f"{name}{suffix}")


def snapshot(job: dict[str, Any], save: Path) -> None:
    """Puts the teacher's snapshots where the run looks for them."""
    made = Path(job["folder"]) / "made"
    if not made.is_symlink():
        made.symlink_to(save)


def main(job: dict[str, Any]) -> None:
    """Makes it, and becomes the run."""
    run, recipe = job["run"], job["recipe"]
    with alone(job):
        if recipe == "snapshot":
            snapshot(job, taught(job))
        else:
            blend = dsir(job) if recipe == "dsir" else from_run(job, taught(job))
    if recipe != "snapshot":
        first = run.index("--train-data-path") + 1
        last = run.index("--valid-data-path")
        run = [*run[:first], *blend, *run[last:]]
    sys.stdout.flush()
    os.execv(run[0], run)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
