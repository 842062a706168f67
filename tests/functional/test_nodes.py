"""Two hosts train by the SLURM script; one dies, comes back, and the end is the same bit for bit.

Hosts are network namespaces with an address each, where this machine lets us make them (Linux, as
root); elsewhere two launchers on one address. `srun` and `scontrol` are stand-ins that do what the
script asks of SLURM: a task a node, `SLURM_NODEID`, and the end of the whole job when a task fails.

What is not exercised: a host whose connections stay open when it dies (power, network), which is
left to Megatron's own timeouts; file systems of several hosts; GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.functional.corpus import write_dataset
from tests.functional.harness import ROOT, environment
from tests.functional.resuming import log_of

STEPS, INTERVAL, KILLED_AFTER = 8, 3, 4
PATIENCE = 400.0  # seconds
ADDRESSES = ["10.231.77.1", "10.231.77.2"]

pytestmark = [pytest.mark.timeout(1500), pytest.mark.extended]

# Starts the command once for each node, as `srun --ntasks-per-node=1 --kill-on-bad-exit=1` does.
SRUN = """
import json, os, subprocess, sys, time
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
hosts, folder = json.loads(os.environ["TEST_HOSTS"]), os.environ["TASKS"]
tasks = []
for node, prefix in enumerate(hosts):
    log = open(f"{folder}/node{node}.log", "a")
    env = {**os.environ, "SLURM_NODEID": str(node)}
    task = subprocess.Popen([*prefix, *words], env=env, stdout=log, stderr=log)
    open(f"{folder}/node{node}.pid", "w").write(str(task.pid))
    tasks.append(task)
failed = False
while any(task.poll() is None for task in tasks):
    failed = failed or any(task.poll() for task in tasks)
    if failed:
        for task in tasks:
            task.terminate()
    time.sleep(0.1)
sys.exit(int(any(task.returncode for task in tasks)))
"""


def namespaces() -> Iterator[list[list[str]]]:
    """Makes two hosts that are linked; yields what starts a command in each of them."""
    names = [f"dwm{os.getpid()}_{node}" for node in range(2)]
    links = [f"dwm{os.getpid() % 100000}{node}" for node in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1],
           "netns", names[1])  # fmt: skip
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
        yield [
            [
                "ip",
                "netns",
                "exec",
                name,
                "env",
                f"GLOO_SOCKET_IFNAME={link}",
                f"TP_SOCKET_IFNAME={link}",
            ]
            for name, link in zip(names, links, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[list[list[str]], str]]:
    """What starts a command on each host, and the first one's address."""
    made = namespaces()
    try:
        prefixes = next(made)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no network namespaces ({error}): two launchers on one address")
        yield [[], []], "127.0.0.1"
        return
    yield prefixes, ADDRESSES[0]
    next(made, None)


class Job:
    """A job of the SLURM script on two hosts.

    Args:
        folder: for logs, checkpoints and stand-ins.
        hosts: what starts a command on each of them, and the first one's address.
        variables: of `pretrain_dwm.sh`.
    """

    def __init__(
        self, folder: Path, hosts: tuple[list[list[str]], str], variables: dict[str, str]
    ) -> None:
        self.folder, programs = folder, folder / "bin"
        programs.mkdir(parents=True)
        (programs / "srun.py").write_text(SRUN)
        (programs / "srun").write_text(
            f'#!/bin/sh\nexec {sys.executable} {programs / "srun.py"} "$@"\n'
        )
        (programs / "scontrol").write_text(f"#!/bin/sh\necho {hosts[1]}\necho second\n")
        for name in ("srun", "scontrol"):
            (programs / name).chmod(0o755)
        self.env = {
            **environment(),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TEST_HOSTS": json.dumps(hosts[0]),
            "TASKS": str(folder),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "two",
            "SLURM_JOB_NUM_NODES": "2",
            **variables,
            "SAVE_DIR": str(folder / "run"),
        }
        self.process: subprocess.Popen | None = None

    def start(self, number: int) -> None:
        """Submits the job."""
        words = ["--num-workers", "0", "--ckpt-format", "torch_dist", "--use-distributed-optimizer"]
        script = ROOT / "examples" / "pretrain_dwm.slurm"
        with open(self.folder / "job.log", "a") as log:
            self.process = subprocess.Popen(
                ["bash", str(script), *words, "--dist-ckpt-optim-fully-reshardable"],
                env={**self.env, "SLURM_JOB_ID": str(os.getpid() + 7 * number)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> int:
        """Returns how the job ended."""
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def text(self) -> str:
        """Returns what the tasks have printed."""
        paths = sorted(self.folder.glob("node*.log"))
        return "\n".join(path.read_text() for path in paths)

    def kill_host(self, node: int) -> None:
        """Ends all processes of a host at once."""
        task = psutil.Process(int((self.folder / f"node{node}.pid").read_text()))
        for process in [*task.children(recursive=True), task]:
            process.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Leaves nothing behind."""
        if self.process is not None and self.process.poll() is None:
            task = psutil.Process(self.process.pid)
            for process in [*task.children(recursive=True), task]:
                process.kill()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, hosts) -> dict[str, Job]:
    """A job that nothing happens to, and one whose second host dies."""
    folder = tmp_path_factory.mktemp("nodes")
    data = {n: write_dataset(folder / n, seed) for seed, n in enumerate(("good", "odd", "meta"))}
    variables = {
        "GPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1",
        "DATA_PATH": f"0.5 {data['good']} 0.5 {data['odd']}", "SPLIT": "100,0,0",
        "META_DATA_PATH": data["meta"], "DATA_CACHE_DIR": str(folder / "cache"),
        "TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": "255", "NUM_LAYERS": "2",
        "HIDDEN_SIZE": "32", "FFN_HIDDEN_SIZE": "64", "NUM_HEADS": "4", "NUM_QUERY_GROUPS": "2",
        "SEQ_LENGTH": "32", "MICRO_BATCH_SIZE": "2", "GLOBAL_BATCH_SIZE": "8",
        "TRAIN_ITERS": str(STEPS), "LR": "1e-2", "LR_WARMUP_ITERS": "0", "LOG_INTERVAL": "1",
        "EVAL_ITERS": "0", "SAVE_INTERVAL": str(INTERVAL), "DWM_META_INTERVAL": "2",
        "DWM_META_BATCH_SIZE": "4", "DWM_GATE": "off", "DWM_WARMUP_STEPS": "1",
    }  # fmt: skip
    found = {name: Job(folder / name, hosts, variables) for name in ("whole", "broken")}
    try:
        found["whole"].start(0)
        assert found["whole"].wait() == 0, found["whole"].text()[-4000:]
        broken = found["broken"]
        broken.start(1)
        deadline = time.monotonic() + PATIENCE
        while f"iteration {KILLED_AFTER:8d}/" not in broken.text():
            assert broken.process is not None and broken.process.poll() is None, broken.text()
            assert time.monotonic() < deadline, broken.text()[-4000:]
            time.sleep(0.02)
        broken.kill_host(1)
        died = time.monotonic()
        broken.code_of_first_life = broken.wait()
        broken.seconds_to_end = time.monotonic() - died
        broken.steps_of_first_life = broken.text().count(" lm loss: ")
        broken.text_of_first_life = broken.text()
        broken.start(2)
        assert broken.wait() == 0, broken.text()[-4000:]
        yield found
    finally:
        for job in found.values():
            job.end()
        shutil.rmtree(folder / "cache", ignore_errors=True)


def test_the_job_ends_soon_after_a_host_has_died(jobs):
    job = jobs["broken"]
    assert job.code_of_first_life != 0
    assert job.seconds_to_end < 90
    assert KILLED_AFTER <= job.steps_of_first_life < STEPS


def test_the_run_that_lost_a_host_ends_bit_for_bit_as_the_one_that_lost_none(jobs):
    whole, broken = (log_of(job.folder, "run") for job in (jobs["whole"], jobs["broken"]))
    assert [line["iteration"] for line in whole] == list(range(1, STEPS + 1))
    assert broken == whole
    assert whole[-1]["max_weight"] > 1.005
    states = [tensors(job.folder / "run" / f"iter_{STEPS:07d}") for job in jobs.values()]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for name, value in states[0].items():
        assert value.equal(states[1][name]), name


def test_it_went_on_from_its_last_checkpoint(jobs):
    job = jobs["broken"]
    assert "successfully loaded checkpoint from" not in job.text_of_first_life
    loaded = [line for line in job.text().splitlines() if "successfully loaded checkpoint" in line]
    assert len(loaded) == 1 and f"at iteration {INTERVAL}" in loaded[0]
    # The step after the checkpoint was taken in both lives.
    assert job.text().count(f"iteration {INTERVAL + 1:8d}/") == 2


def tensors(folder: Path) -> dict:
    """Returns the tensors of a `torch_dist` checkpoint: parameters and optimizer."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict = {}
    _load_state_dict(
        found,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    flat = {}

    def walk(prefix: str, value) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                walk(f"{prefix}.{key}", part)
        elif hasattr(value, "equal"):
            flat[prefix] = value

    walk("", found)
    return flat
