"""Takes runs, several processes at a time; a finished run leaves one small JSON file."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quality import plan
from quality.data import data_flags
from quality.plan import ORACLE_VARIABLE, REGIMES, WARMUP_SHARE, Run, Size, trainer_flags

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
WORKER = Path(__file__).with_name("worker.py")
# Keeps freed memory in the process: with small models, getting it from the system again for every
# tensor takes a tenth of the time.
QUICK_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


class RunError(Exception):
    """A run's file cannot be used; the message says why and what to do."""


@dataclass
class Place:
    """Where things are.

    Attributes:
        runs: the results, `REGIME/ARM/SEED.json`.
        work: folders of runs that are under way.
        data: the data sets.
    """

    runs: Path
    work: Path
    data: Path

    @property
    def timing(self) -> Path:
        """Where the results of timing runs are."""
        return self.runs.with_name("timing")

    def result(self, run: Run) -> Path:
        """Returns the file that a finished run leaves."""
        return self.runs / f"{run.key}.json"

    def folder(self, run: Run) -> Path:
        """Returns where a run works."""
        return self.work / run.key.replace("/", "_")


@dataclass
class Started:
    """A run under way."""

    run: Run
    process: subprocess.Popen
    lock: Any
    log: Path
    at: float = field(default_factory=time.time)


def settings(size: Size, run: Run, corpus: str) -> dict[str, Any]:
    """Returns what a result depends on, as it is written with it."""
    return {
        "flags": " ".join([*trainer_flags(size, run), *run.flags.split()]),
        "shares": REGIMES[run.regime].shares,
        "eval_samples": size.eval_samples,
        "corpus": corpus,
    }


def finished(place: Place, size: Size, run: Run, corpus: str) -> bool:
    """Whether the run has its result.

    Raises:
        RunError: there is one with other settings.
    """
    path = place.result(run)
    if not path.exists():
        return False
    found, wanted = read(path)["settings"], settings(size, run, corpus)
    other = [name for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise RunError(
            f"{path} was made with other settings ({', '.join(other)}); give another --out, or "
            f"remove it to run it again"
        )
    return True


def read(path: Path) -> dict[str, Any]:
    """Returns a result.

    Raises:
        RunError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not found.keys() >= {"settings", "final", "curve"}:
            raise ValueError("not a result of this command")
    except ValueError as error:
        raise RunError(f"{path}: {error}; remove it to run it again") from None
    return found


def read_all(runs: Path) -> list[dict[str, Any]]:
    """Returns every result of a folder, `REGIME/ARM/SEED.json`."""
    return [read(path) for path in sorted(runs.glob("*/*/*.json"))]


def keep(results: list[dict[str, Any]], timing: list[dict[str, Any]], path: Path) -> None:
    """Writes results, and those of timing runs, to one file, one per line."""
    runs, times = (",\n".join(map(json.dumps, found)) for found in (results, timing))
    path.write_text(f'{{"runs": [\n{runs}\n],\n"timing": [\n{times}\n]}}\n')


def take_over(place: Place, path: Path, size: Size) -> None:
    """Files the results of `keep` where they are missing, as if the runs had been taken here.

    Raises:
        RunError: the file is not one of `keep`, or of another size.
    """
    try:
        found = json.loads(path.read_text())
        pairs = [(place.runs, result) for result in found["runs"]]
        pairs += [(place.timing, result) for result in found["timing"]]
        named = [(folder / "{regime}/{arm}/{seed}.json".format(**r), r) for folder, r in pairs]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: {error!r}; give a file that --write has written") from None
    shape = f"--num-layers {size.layers} --hidden-size {size.hidden} "
    for name, result in named:
        if not result.get("settings", {}).get("flags", "").startswith(shape):
            raise RunError(f"{path} is of another size than {size.name}; see --size")
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(json.dumps(result, indent=1))


def take(place: Place, size: Size, runs: list[Run], corpus: str, jobs: int) -> int:
    """Takes the runs that have no result yet, in order; returns how many failed."""
    left = [run for run in runs if not finished(place, size, run, corpus)]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them are done", flush=True)
    active: list[Started] = []
    failed = done = 0
    start = time.time()
    try:
        while left or active:
            while left and len(active) < jobs:
                begun = begin(place, size, left.pop(0))
                if begun is not None:
                    active.append(begun)
            time.sleep(0.5)
            for one in [a for a in active if a.process.poll() is not None]:
                active.remove(one)
                done += 1
                failed += not end(place, size, one, corpus)
                rest = (time.time() - start) / done * (len(left) + len(active))
                print(f"  {len(left) + len(active)} to go, about {rest / 60:.0f} minutes")
                sys.stdout.flush()
    finally:
        for one in active:
            one.process.kill()
            one.process.wait()
    return failed


def begin(place: Place, size: Size, run: Run) -> Started | None:
    """Starts a run; None where another command is taking it."""
    folder = place.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")  # noqa: SIM115 - held while the run is under way
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{run.key}: another command is taking it")
        return None
    # What a killed run has left.
    for name in ("save", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "result.json").unlink(missing_ok=True)
    log = folder / "log.txt"
    with open(log, "w") as out:
        process = subprocess.Popen(
            prepared(place, size, run) if run.recipe else command(place, size, run),
            env=environment(run),
            stdout=out,
            stderr=out,
            cwd=ROOT,
            # Held by the worker too: one that outlives this command keeps the run.
            pass_fds=(lock.fileno(),),
        )
    return Started(run, process, lock, log)


def prepared(place: Place, size: Size, run: Run) -> list[str]:
    """Returns the command that makes what a run needs, and becomes the run."""
    smaller, teacher = plan.teacher(size, run)
    folder = place.work.with_name("teachers") / teacher.key.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    # Where it lies is where the teacher's own command must put it.
    own = Place(place.runs, folder, place.data)
    words = command(own, smaller, teacher)
    job = {
        "recipe": run.recipe,
        "folder": str(folder),
        "save": str(own.folder(teacher) / "save"),
        "teacher": words,
        "data": str(place.data),
        "names": list(REGIMES[run.regime].shares),
        "shares": list(REGIMES[run.regime].shares.values()),
        "run": command(place, size, run, made=folder / "made"),
    }
    return [sys.executable, str(WORKER.with_name("prepare.py")), json.dumps(job)]


def command(place: Place, size: Size, run: Run, made: Path | None = None) -> list[str]:
    """Returns the command of a run.

    Args:
        place: where things are.
        size: of the model.
        run: what to run.
        made: where what its recipe makes lies.
    """
    from megatron_dwm.hosts import cpu

    folder = place.folder(run)
    cpu = cpu.default_flags()
    # A GPU without Transformer Engine and Apex has Megatron's own layers.
    gpu = "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion"
    gpu += " --no-persist-layer-norm --no-rope-fusion"
    arm = run.flags.format(meta=place.data / "meta", made=made).split()
    return [
        *(sys.executable, str(WORKER), str(folder / "result.json")),
        *(str(size.curve_samples), str(size.eval_samples)),
        *(cpu or gpu.split()),
        *trainer_flags(size, run),
        *data_flags(place.data, size, run.regime),
        *arm,
        *("--data-cache-path", str(folder / "cache"), "--save", str(folder / "save")),
        *("--save-interval", str(10**9), "--no-save-optim", "--ckpt-format", "torch_dist"),
    ]


def environment(run: Run) -> dict[str, str]:
    """Returns the environment of the only rank of a run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    path = os.pathsep.join([str(ROOT), str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    found = {"OMP_NUM_THREADS": "1", **os.environ, **rank, "PYTHONPATH": path}
    found.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, CUDA_DEVICE_MAX_CONNECTIONS="1")
    found = {**QUICK_MALLOC, **found}
    found[ORACLE_VARIABLE] = json.dumps(REGIMES[run.regime].oracle_weights())
    return found


def end(place: Place, size: Size, one: Started, corpus: str) -> bool:
    """Files the result of a run that has ended; returns whether it has one."""
    run, folder = one.run, place.folder(one.run)
    measured = folder / "result.json"
    good = one.process.returncode == 0 and measured.exists()
    if good:
        result = summary(size, run, corpus, json.loads(measured.read_text()), folder / "save")
        path = place.result(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(result, indent=1))
        os.replace(partial, path)
        steps = result["seconds"] / run.steps * 1000
        print(
            f"{run.key:36} loss {result['final']:.4f}  {steps:6.1f} ms a step, "
            f"{result['seconds']:.0f} s of steps, {time.time() - one.at:.0f} s in all"
        )
    else:
        tail = "".join(open(one.log).readlines()[-12:])
        print(f"{run.key} failed (exit code {one.process.returncode}), see {one.log}:\n{tail}")
    one.lock.close()
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    return good


def summary(
    size: Size, run: Run, corpus: str, measured: dict[str, Any], save: Path
) -> dict[str, Any]:
    """Returns what is kept of a run."""
    from megatron_dwm.logs.log_file import FILE_NAME, read_log

    kinds: dict[str, list[float]] = {}
    for kind, seconds in measured["steps"]:
        kinds.setdefault(kind, []).append(seconds)
    log = save / FILE_NAME
    lines = read_log(str(log)) if log.exists() else []
    return {
        "regime": run.regime,
        "arm": run.arm,
        "seed": run.seed,
        "steps": run.steps,
        "tokens": run.steps * size.batch * size.sequence,
        "lr": run.lr,
        "settings": settings(size, run, corpus),
        "curve": measured["curve"],
        "final": measured["final"],
        "seconds": sum(seconds for _, seconds in measured["steps"]),
        "kinds": {
            kind: {
                "steps": len(values),
                "median": statistics.median(values),
                "low": sorted(values)[len(values) // 4],
            }
            for kind, values in kinds.items()
        },
        "weights": of_weights(lines, run),
    }


def of_weights(lines: list[dict[str, Any]], run: Run) -> dict[str, list[float | None]]:
    """Returns means of the step log by quarter of the weighted steps.

    Returns:
        `useful`: share of the weight on useful samples; `useful_weight`: their mean weight;
        `effective`: share of effective samples; `correlation`: out-of-sample, on meta steps;
        `gate`: its opening.
    """
    warm = round(run.steps * WARMUP_SHARE)
    useful = REGIMES[run.regime].useful
    found: dict[str, list[float | None]] = {}
    weighted = [line for line in lines if line["iteration"] > warm]
    if not weighted:
        return found
    for quarter in range(4):
        part = weighted[quarter * len(weighted) // 4 : (quarter + 1) * len(weighted) // 4]
        shares, means = [], []
        for line in part:
            weight, count = line["domain_weight"], line["domain_samples"]
            total = sum(weight[name] * count[name] for name in weight)
            on = [name for name in weight if name in useful]
            if on and total > 0:
                good = sum(weight[name] * count[name] for name in on)
                shares.append(good / total)
                means.append(good / sum(count[name] for name in on))
        values = {
            "useful": shares,
            "useful_weight": means,
            "effective": [line["effective_sample_size"] for line in part],
            "correlation": [
                line["score_correlation"]
                for line in part
                if "meta_loss" in line and line.get("score_correlation") is not None
            ],
            "gate": [line["gate"] for line in part if line.get("gate") is not None],
        }
        for name, numbers in values.items():
            mean = round(statistics.fmean(numbers), 4) if numbers else None
            found.setdefault(name, []).append(mean)
    return found
