"""Spawns ranks that take many tiny runs, and gives access to what came out of each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parents[2]

TINY = """
--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --seq-length 32 --max-position-embeddings 32
--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--tokenizer-type NullTokenizer --vocab-size 255 --micro-batch-size 2 --global-batch-size 16
--train-iters 4 --lr 1e-3 --lr-decay-style constant --eval-iters 1 --eval-interval 100
--log-interval 1 --seed 1234 --num-workers 0 --split 98,1,1
--no-create-attention-mask-in-dataloader
""".split()
MOCK = ["--mock-data"]
DWM = """
--dwm --dwm-form model --dwm-rule chain --dwm-schedule joint
--dwm-num-layers 2 --dwm-hidden-size 64 --dwm-num-attention-heads 4
""".split()


@dataclass
class Run:
    """One tiny run: a name, the script's arguments, and environment variables."""

    name: str
    args: list[str]
    env: dict[str, str] | None = None


def host_flags() -> list[str]:
    """Returns the flags that this machine needs; none on a GPU."""
    from megatron_dwm.hosts import cpu

    return cpu.default_flags()


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a rank."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


def torchrun(
    ranks: int, words: list[str], timeout: int = 900, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a script as so many ranks and returns the finished process.

    On the CPU a script's ranks are forked from a process that has imported the trainer; a module
    (`-m`), and what is given a variable that counts at import, are started with torchrun.

    Variables: TRANSFORMER_ENGINE, the folder of its Python files, for ranks that have it (on the
    CPU only, see `tests.transformer_engine_cpu`).
    """
    if words[0].endswith(".py") and "TORCHDYNAMO_DISABLE" not in variables and host_flags():
        server = RankServer.running(variables.get("TRANSFORMER_ENGINE", ""))
        return server.run(ranks, words, timeout, environment(**variables))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(free_port()), *words]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class RankServer:
    """The process that ranks are forked from, `rank_server.py`; one for the test session.

    Args:
        transformer_engine: as the variable of `torchrun`; a second process has it.
    """

    _running: ClassVar[dict[str, RankServer]] = {}

    def __init__(self, transformer_engine: str) -> None:
        self.transformer_engine = transformer_engine
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "functional" / "rank_server.py")],
            cwd=ROOT,
            env=environment(TRANSFORMER_ENGINE=transformer_engine),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @classmethod
    def running(cls, transformer_engine: str = "") -> RankServer:
        """Returns the session's server, started at the first call."""
        if transformer_engine not in cls._running:
            cls._running[transformer_engine] = cls(transformer_engine)
        return cls._running[transformer_engine]

    def run(
        self, ranks: int, words: list[str], timeout: int, variables: dict[str, str]
    ) -> subprocess.CompletedProcess:
        """Runs a script; as `torchrun` here."""
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "ranks": ranks,
                "script": words[0],
                "args": words[1:],
                "env": variables,
                "output": f"{folder}/rank",
                "timeout": timeout,
            }
            asked, answers = self.process.stdin, self.process.stdout
            assert asked is not None and answers is not None
            try:
                asked.write(json.dumps(request) + "\n")
                asked.flush()
                answer = answers.readline()
                if not answer:
                    raise RuntimeError("the rank server has ended; see its standard error")
                code = json.loads(answer)["code"]
            except BaseException:
                # Whatever it is still at is not the next request's.
                self.process.kill()
                self.process.wait()
                del type(self)._running[self.transformer_engine]
                raise
            out, err = (Path(folder, f"rank.{name}").read_text() for name in ("out", "err"))
        if code is None:
            raise subprocess.TimeoutExpired(words, timeout, out, err)
        return subprocess.CompletedProcess(words, code, out, err)


class Results:
    """What came out of a list of runs, by name and rank."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks

    def __getitem__(self, name: str) -> list[dict]:
        """Returns each rank's result of a run."""
        found = []
        for rank in range(self.ranks):
            with open(self.folder / f"{name}.{rank}.json") as file:
                found.append(json.load(file))
        return found

    def succeeded(self, name: str) -> list[dict]:
        """Returns each rank's result, after checking that all ended well."""
        found = self[name]
        for rank, result in enumerate(found):
            assert result["code"] == 0, f"{name}, rank {rank}:\n{result['stderr'][-3000:]}"
        return found

    def losses(self, name: str) -> list[list]:
        """Returns the last rank's losses and gradient norms, iteration by iteration."""
        return self.succeeded(name)[-1]["steps"]


def run_all(ranks: int, runs: list[Run], folder: Path, **variables: str) -> Results:
    """Takes all runs in one set of ranks; variables as those of `torchrun`."""
    flags = host_flags()
    with open(folder / "runs.json", "w") as file:
        json.dump(
            [{"name": r.name, "args": [*flags, *r.args], "env": r.env or {}} for r in runs], file
        )
    done = torchrun(
        ranks,
        [str(ROOT / "tests" / "functional" / "run_many.py")],
        RUNS=str(folder / "runs.json"),
        OUT=str(folder),
        **variables,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Results(folder, ranks)
