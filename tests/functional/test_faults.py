"""Runs killed at random instants go on as if nothing had happened (`make test-faults`: more kills).

Two data-parallel ranks with the distributed optimizer, a learned DWM with meta and frozen windows,
documents drawn by weight, a save every second step. See `run_faults.py` for what is compared.

FAULTS: the number of kills (default 20), with as many full disks for every tenth; FAULT_SEED: what
they are drawn from; FAULT_ASYNC=1: saves in the background (`--async-save`), whose process outlives
the rank that is killed, and which takes ten times as long. What is not exercised here: GPUs; a
machine that goes down, so that files already written are lost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.data.index import read_index
from megatron_dwm.data.weight_file import write_weights
from tests.functional.corpus import write_dataset
from tests.functional.harness import DWM, ROOT, TINY, environment, host_flags

FAULTS = int(os.environ.get("FAULTS", "20"))
SEED = int(os.environ.get("FAULT_SEED", "20250711"))
ASYNC = os.environ.get("FAULT_ASYNC") == "1"
STEPS, INTERVAL = 8, 2

# In the background a save has a process of its own, which imports all anew.
pytestmark = pytest.mark.timeout((120 + 60 * FAULTS) * (6 if ASYNC else 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def weigh(prefix: str, seed: int, path: Path) -> str:
    """Writes random weights of a data set's documents."""
    index = read_index(prefix)
    weights = np.random.default_rng(seed).random(index.documents) + 0.05
    write_weights(path, weights.astype(np.float32), index)
    return str(path)


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    """Takes all runs."""
    data = {n: write_dataset(folder / n, seed) for seed, n in enumerate(("train", "meta"))}
    used = weigh(data["train"], 0, Path(f"{data['train']}.weights"))
    other = weigh(data["train"], 1, folder / "other.weights")
    at = TINY.index("--split")
    size = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --micro-batch-size 1"
    args = [
        *(*host_flags(), *TINY[:at], *TINY[at + 2 :], *size.split()),
        *f"--global-batch-size 4 --train-iters {STEPS} --eval-iters 0 --hidden-dropout 0.1".split(),
        *f"--ckpt-format torch_dist --save-interval {INTERVAL} --save FOLDER".split(),
        *f"--use-distributed-optimizer --split 100,0,0 --data-path {data['train']}".split(),
        *f"--data-cache-path FOLDER-cache --dwm-meta-data-path {data['meta']}".split(),
        *(*DWM, "--dwm-num-layers", "1", "--dwm-hidden-size", "32", "--dwm-log-samples"),
        *"--dwm-schedule staged --dwm-stages 2 --dwm-sampling weights --dwm-head-lr 0.03".split(),
        *(
            "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()
            if ASYNC
            else []
        ),
    ]
    plan = {
        "args": args,
        "folder": str(folder),
        "faults": FAULTS,
        "full": max(1, FAULTS // 10),
        "seed": SEED,
        "weights": [used, other],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    script = str(ROOT / "tests" / "functional" / "run_faults.py")
    words = [sys.executable, script, str(folder / "plan.json"), str(folder / "out.json")]
    start = time.monotonic()
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((folder / "out.json").read_text())
    print(
        f"\nFAULT_SEED={SEED}: {FAULTS} kills in {len(result['killed'])} trainings of "
        f"{result['length']:.1f} s, {time.monotonic() - start:.0f} s in all"
    )
    return result


def last_words(chain: dict) -> str:
    """Returns the end of what the last process of a training printed."""
    life = len(chain["codes"]) - 1
    texts = [Path(chain["folder"], f"out.{life}.{r}").read_text()[-1500:] for r in (0, 1)]
    return "\n".join([json.dumps(chain["faults"]), *texts])


def test_run_is_the_same_when_repeated(found: dict) -> None:
    """Without a fault two runs are alike; else no comparison here would mean anything."""
    assert found["repeated"]["differences"] == [], last_words(found["repeated"])
    assert found["saves"] == STEPS // INTERVAL
    windows = [line["window"] for line in found["log"]]
    assert windows == ["meta", "meta", "frozen", "frozen"] * 2
    assert found["log"][-1]["max_weight"] > 1.01


def test_killed_runs_go_on_as_if_they_had_not_been(found: dict) -> None:
    """Every step of every process, and the end, is that of the run that was never killed."""
    assert sum(len(chain["faults"]) for chain in found["killed"]) == FAULTS
    for chain in found["killed"]:
        assert chain["differences"] == [], f"seed {SEED}: {chain}\n{last_words(chain)}"
        assert chain["codes"][-1] == [0, 0]


def test_kills_were_of_every_kind(found: dict) -> None:
    """Within a save and anywhere, of one rank and of both; and they did end the ranks."""
    faults = [f for chain in found["killed"] for f in chain["faults"]]
    assert {f["where"] for f in faults} == {"anytime", "saving"}
    assert {tuple(f["whom"]) for f in faults} == {(0,), (1,), (0, 1)}
    for chain in found["killed"]:
        for fault, codes in zip(chain["faults"], chain["codes"], strict=False):
            assert any(codes[rank] == -9 for rank in fault["whom"])


def test_full_disk_ends_the_run_and_loses_nothing(found: dict) -> None:
    """The save fails, both ranks end by themselves, and the run resumes from the one before."""
    for chain in found["full"]:
        assert chain["differences"] == [], f"seed {SEED}: {chain}\n{last_words(chain)}"
        assert len(chain["faults"]) == 1 and all(code not in (0, -9) for code in chain["codes"][0])
        assert chain["codes"][-1] == [0, 0]
        said = "".join(Path(chain["folder"], f"out.0.{rank}").read_text() for rank in (0, 1))
        # On a disk that is full at once, the message has no room either.
        assert "CheckpointException" in said or chain["faults"][0]["bytes"] == 0


def test_empty_tracker_is_mended(found: dict) -> None:
    """The run goes on from the newest whole checkpoint, and says so."""
    chain = found["empty_tracker"]
    assert chain["differences"] == [], f"{chain}\n{last_words(chain)}"
    said = Path(chain["folder"], "out.1.0").read_text()
    assert "latest_checkpointed_iteration.txt was empty" in said and "now names iteration 4" in said


@pytest.mark.parametrize("what", ["optimizer", "data"])
def test_comparison_finds_what_was_tampered_with(found: dict, what: str) -> None:
    """Negative control: a resume without the optimizers, one with other weights of documents."""
    chain = found["tampered"][what]
    assert chain["codes"][-1] == [0, 0]
    text = " ".join(chain["differences"])
    assert "step 4" in text and "step end" in text and "logs differ" in text
    assert ("'data'" in text) == (what == "data")
