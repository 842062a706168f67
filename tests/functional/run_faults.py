"""Kills real runs at random instants, resumes them, and compares all of it with a run never killed.

    python tests/functional/run_faults.py PLAN.json OUT.json

Importing the trainer takes longer than a tiny run. So this process imports it once, and forks the
two ranks of every run: a zygote. It starts no thread and no process group, and touches no GPU.

PLAN: `args` of the training script, `folder`, `faults` (number of kills), `full` (number of full
disks), `seed`, `weights` (the weight file of the training data and another one). OUT: what every
fault was, what differed, and the same for runs that are tampered with on purpose.

A chain of runs is one training: it is killed and resumed a few times and then runs to its end.
Every step that any of its processes took is compared with the step of the whole run, bit by bit:
loss, gradient norm, weights, tokens and documents of every sample; and in the end the parameters,
the optimizers and the random states of every rank.

An instant is drawn over the life of a process, or, for a part of them, over the time from the
beginning of a save to a little after its end. SIGKILL goes to one rank, and the other one is ended
as torchrun does it a moment later; or to both at once.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, field

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPT = os.path.join(ROOT, "examples", "pretrain_dwm.py")
RANKS = 2
SAVES = "saves"  # a byte for each save that has begun, in a process's folder
PATIENCE = 180.0  # seconds after which a process counts as hanging


# ------------------------------------------------------------------------------- in a rank


def child(args, folder, life, rank, limit):
    """Runs the script in a forked rank; never returns."""
    code = 1
    try:
        out = os.open(f"{folder}/out.{life}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        # A rank that hangs says where, before it is ended.
        faulthandler.dump_traceback_later(0.8 * PATIENCE, file=2)
        code = observed(args, f"{folder}/steps.{life}.{rank}", f"{folder}/{SAVES}.{life}", limit)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def observed(args, path, saves, limit):
    """Runs the script, and writes a line for every step and one for the end."""
    import queue
    import resource
    import runpy

    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import training

    from megatron_dwm.core.batches import StepBatches
    from megatron_dwm.hosts.megatron_lm.session import Session
    from megatron_dwm.step.train_step import DWMTrainStep

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # The trainer's is in a helper process, which would import everything once more. Only a save
    # in the background needs it there.
    if "--async-save" not in args:
        filesystem_async._results_queue = queue.Queue()
    kept = {"save": 0}
    step, read, save = DWMTrainStep.__call__, StepBatches.__init__, training.save_checkpoint
    setup = Session.setup_model_and_optimizer

    def noted_read(self, *a):
        read(self, *a)
        kept["batch"] = digest(
            [v for chunk in self.chunks for b in chunk or () for v in b.values()]
        )

    def noted_step(self, stock_step, trainee, iteration):
        result, record = step(self, stock_step, trainee, iteration)
        line = {
            "iteration": record.iteration,
            "losses": digest(list(result[0].values())),
            "grad_norm": float(result[5] or 0.0).hex(),
            "weights": digest([record.weights, record.domains]),
            "data": kept["batch"],
            "meta_loss": None if record.meta is None else record.meta.loss.hex(),
            "influence": None if record.meta is None else digest([record.meta.influence]),
        }
        os.write(file, json.dumps(line).encode() + b"\n")
        return result, record

    def noted_setup(self, *a, **k):
        model, optimizer, scheduler = setup(self, *a, **k)
        kept["end"] = lambda: state_of(self.step, model, optimizer)
        return model, optimizer, scheduler

    def noted_save(*a, **k):
        kept["save"] += 1
        if limit is not None and kept["save"] == limit[0]:
            # Writing fails from here on, as it does on a full disk: Python ignores the signal.
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], resource.RLIM_INFINITY))
        if torch.distributed.get_rank() == 0:
            with open(saves, "a") as marks:
                marks.write("s")
        return save(*a, **k)

    DWMTrainStep.__call__, StepBatches.__init__ = noted_step, noted_read
    training.save_checkpoint, Session.setup_model_and_optimizer = noted_save, noted_setup
    sys.argv = [SCRIPT, *args]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as exit:
        if exit.code not in (None, 0):
            return exit.code if isinstance(exit.code, int) else 1
    os.write(file, json.dumps({"end": kept["end"]()}).encode() + b"\n")
    with open(f"{path}.modules", "w") as names:
        json.dump([name for name in sys.modules if "__main__" not in name], names)
    return 0


def digest(tensors):
    """Returns a hash of the exact bits of tensors, None among them left out."""
    import hashlib

    import torch

    found = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            flat = tensor.detach().cpu().contiguous().view(-1)
            found.update(str(flat.dtype).encode() + flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def state_of(step, model, optimizer):
    """Returns hashes of all that a rank holds at the end.

    A process that resumes after the last step has loaded it all.
    """
    from megatron.core.tensor_parallel.random import _get_all_rng_states

    from megatron_dwm.core.optimizers import leaf_optimizers

    def of_optimizer(optimizer):
        found = []
        for leaf in leaf_optimizers(optimizer):
            for group in leaf.optimizer.param_groups:
                for parameter in group["params"]:
                    state = leaf.optimizer.state[parameter]
                    found += [parameter, *(state[name] for name in sorted(state))]
        assert len(found) > 2
        return digest(found)

    cpu, _, tracker = _get_all_rng_states()
    return {
        "llm": digest([p for chunk in model for p in chunk.parameters()]),
        "llm_optimizer": of_optimizer(optimizer),
        "dwm": digest(list(step.scorer.module.parameters())),
        "dwm_optimizer": of_optimizer(step.scorer.optimizer),
        "random": digest([cpu, *tracker.values()]),
        "counts": [step.meta_steps_taken, step.meta_data.consumed_samples],
    }


# ------------------------------------------------------------------------------ in the zygote


@dataclass
class Fault:
    """What ends a process before its time.

    Attributes:
        where: `anytime`, `saving` or `full`.
        whom: ranks that it befalls.
        after: seconds from the beginning of the process, or of the save.
        save: the process's save that it waits for, counted from 1.
        bytes: of a file, that still fit on a full disk.
        grace: seconds until the other ranks are ended.
    """

    where: str
    whom: list
    after: float = 0.0
    save: int = 0
    bytes: int = 0
    grace: float = 0.0


@dataclass
class Chain:
    """One training: its folder, the faults that befell it, what differed from the whole run."""

    folder: str
    faults: list = field(default_factory=list)
    differences: list = field(default_factory=list)
    codes: list = field(default_factory=list)


class Zygote:
    """Forks the ranks of runs.

    Args:
        args: the script's arguments; FOLDER in one of them stands for the run's folder.
        more: arguments of runs that resume.
    """

    def __init__(self, args, more=()):
        self.args, self.more = args, list(more)

    def live(self, chain, fault=None, more=()):
        """Runs one process life, and returns its length in seconds; None if it was cut short."""
        life = len(chain.codes)
        save = f"{chain.folder}/run"
        words = [w.replace("FOLDER", save) for w in (*self.args, *more)]
        if life:
            words += ["--load", save]
        port, start = free_port(), time.monotonic()
        full = fault is not None and fault.where == "full"
        pids = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
                limit = (fault.save, fault.bytes) if full and rank in fault.whom else None
                child(words, chain.folder, life, rank, limit)
            pids.append(pid)
        codes = dict.fromkeys(range(RANKS))
        struck = False
        if fault is not None and not full:
            struck = self._strike(chain, fault, pids, codes, life, start)
        while None in codes.values() and time.monotonic() - start < PATIENCE:
            reap(pids, codes)
            time.sleep(0.005)
        hung = [rank for rank, code in codes.items() if code is None]
        end_all(pids, codes)
        if hung:
            chain.differences.append(f"life {life}: ranks {hung} hang")
        chain.codes.append([codes[rank] for rank in range(RANKS)])
        if struck or full:
            chain.faults.append(asdict(fault))
            return None
        if any(chain.codes[-1]):
            chain.differences.append(f"life {life}: exit codes {chain.codes[-1]}")
            return None
        return time.monotonic() - start

    def _strike(self, chain, fault, pids, codes, life, start):
        """Waits for the instant and kills; returns False when the run had ended before."""
        saves = f"{chain.folder}/{SAVES}.{life}"
        while fault.where == "saving" and begun(saves) < fault.save:
            reap(pids, codes)
            if None not in codes.values() or time.monotonic() - start > PATIENCE:
                return False
            time.sleep(0.001)
        instant = fault.after + (time.monotonic() if fault.where == "saving" else start)
        while time.monotonic() < instant:
            reap(pids, codes)
            if None not in codes.values():
                return False
            time.sleep(min(0.002, max(0.0, instant - time.monotonic())))
        reap(pids, codes)
        if any(codes[rank] is not None for rank in fault.whom):
            return False
        for rank in fault.whom:
            os.kill(pids[rank], signal.SIGKILL)
        time.sleep(fault.grace)
        for rank in range(RANKS):
            if codes[rank] is None and rank not in fault.whom:
                os.kill(pids[rank], signal.SIGTERM)
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline and None in codes.values():
            reap(pids, codes)
            time.sleep(0.005)
        end_all(pids, codes)
        return any(codes[rank] == -signal.SIGKILL for rank in fault.whom)


def reap(pids, codes):
    """Notes which ranks have ended."""
    for rank, pid in enumerate(pids):
        if codes[rank] is None:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)


def end_all(pids, codes):
    """Ends what is left of every rank, its own helpers too."""
    for rank, pid in enumerate(pids):
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if codes[rank] is None:
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port():
    """Returns a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def import_all(path):
    """Imports what a run has imported on its way, so that no later one has to.

    Args:
        path: a JSON list of the modules.
    """
    with open(path) as file:
        names = json.load(file)
    for name in names:
        if name not in sys.modules:
            # A module that a package made up, or that an optional package lacks.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    # What is forked has one thread of each, so there may be no other.
    assert len(os.listdir("/proc/self/task")) == 1


def begun(saves):
    """Returns how many saves have begun."""
    try:
        return os.path.getsize(saves)
    except FileNotFoundError:
        return 0


def steps_of(folder, life, rank):
    """Returns the lines that a process has written, a torn last one left out."""
    found = []
    path = f"{folder}/steps.{life}.{rank}"
    if os.path.exists(path):
        with open(path) as file:
            for text in file:
                if text.endswith("\n"):
                    found.append(json.loads(text))
    return found


def compare(chain, whole, log):
    """Adds to the chain what differs from the whole run.

    Args:
        chain: one that has run to its end.
        whole: each rank's lines of the whole run.
        log: the whole run's step log.
    """
    for rank in range(RANKS):
        expected = {line.get("iteration", "end"): line for line in whole[rank]}
        seen = set()
        for life in range(len(chain.codes)):
            for line in steps_of(chain.folder, life, rank):
                key = line.get("iteration", "end")
                seen.add(key)
                if line != expected[key]:
                    fields = [k for k in line if line[k] != expected[key][k]]
                    chain.differences.append(f"life {life}, rank {rank}, step {key}: {fields}")
        if seen != set(expected):
            chain.differences.append(f"rank {rank} took the steps {sorted(map(str, seen))}")
    if step_log(chain) != log:
        chain.differences.append("the step logs differ")


def step_log(chain):
    """Returns the lines of the run's log without what depends on the clock."""
    from megatron_dwm.logs.log_file import CLOCK_FIGURES, FILE_NAME, read_log

    lines = read_log(f"{chain.folder}/run/{FILE_NAME}")
    return [{k: v for k, v in line.items() if k not in CLOCK_FIGURES} for line in lines]


class Campaign:
    """All chains of a plan."""

    def __init__(self, plan):
        self.plan, self.random = plan, random.Random(plan["seed"])
        self.zygote = Zygote(plan["args"])
        self.chains = []

    def chain(self):
        """Begins a training of its own."""
        folder = f"{self.plan['folder']}/chain{len(self.chains)}"
        os.makedirs(folder)
        self.chains.append(Chain(folder))
        return self.chains[-1]

    def run(self):
        """Runs everything, and returns what came out."""
        started = time.monotonic()
        base = self.chain()
        assert self.zygote.live(base) is not None, base.differences
        import_all(f"{base.folder}/steps.0.0.modules")
        self.whole = [steps_of(base.folder, 0, rank) for rank in range(RANKS)]
        self.log = step_log(base)
        self.saves = begun(f"{base.folder}/{SAVES}.0")
        out = {"saves": self.saves, "log": self.log}
        again = self.chain()
        # Without imports, as all runs from here on.
        self.length = self.zygote.live(again)
        assert self.length is not None, again.differences
        compare(again, self.whole, self.log)
        out.update(repeated=asdict(again), length=self.length)
        out["killed"] = [asdict(chain) for chain in self.killed(self.plan["faults"])]
        out["full"] = [asdict(self.full_disk()) for _ in range(self.plan["full"])]
        out["empty_tracker"] = asdict(self.empty_tracker())
        out["tampered"] = {name: asdict(self.tampered(name)) for name in ("optimizer", "data")}
        return {**out, "seconds": time.monotonic() - started}

    def finish(self, chain, more=()):
        """Runs a chain to its end, and compares it."""
        self.zygote.live(chain, None, more)
        compare(chain, self.whole, self.log)
        return chain

    def fault(self):
        """Draws a kill."""
        draw = self.random
        whom = draw.choice([[0], [1], [0, 1]])
        grace = 0.0 if len(whom) == RANKS else draw.uniform(0.0, 0.15)
        if draw.random() < 0.4:
            save = draw.choice(range(1, self.saves))
            # A save takes about as long as a tenth of such a short run.
            return Fault("saving", whom, draw.uniform(0.0, 0.1 * self.length), save, grace=grace)
        return Fault("anytime", whom, draw.uniform(0.0, self.length), grace=grace)

    def killed(self, faults):
        """Kills as many times as asked for, in chains of one to four."""
        chains, left = [], faults
        while left > 0:
            chain = self.chain()
            chains.append(chain)
            for _ in range(min(left, self.random.randint(1, 4))):
                if self.zygote.live(chain, self.fault()) is not None or chain.differences:
                    break  # it ended before the instant
            left -= len(chain.faults)
            if len(chain.codes) > len(chain.faults):
                compare(chain, self.whole, self.log)
            else:
                self.finish(chain)
        return chains

    def full_disk(self):
        """Lets writing fail in the middle of the second save or a later one."""
        draw, chain = self.random, self.chain()
        whom = draw.choice([[0], [1], [0, 1]])
        # What the ranks print is a file too, of 60 kB; a shard has 500 kB.
        save, size = draw.choice(range(2, self.saves)), draw.choice([0, 150_000, 400_000])
        self.zygote.live(chain, Fault("full", whom, save=save, bytes=size))
        return self.finish(chain)

    def empty_tracker(self):
        """A kill between the moments when the tracker is emptied and when it is written."""
        chain = self.chain()
        self.zygote.live(chain, Fault("saving", [0, 1], 0.0, 3))
        with open(f"{chain.folder}/run/latest_checkpointed_iteration.txt", "w"):
            pass
        return self.finish(chain)

    def tampered(self, what):
        """Negative controls: what a comparison must find."""
        chain = self.chain()
        self.zygote.live(chain, Fault("saving", [0, 1], 0.0, 2))
        if what == "optimizer":
            return self.finish(chain, ["--no-load-optim"])
        used, other = self.plan["weights"]
        with open(used, "rb") as file:
            kept = file.read()
        os.replace(other, used)
        self.finish(chain)
        with open(used, "wb") as file:
            file.write(kept)
        return chain


def main():
    """Runs a plan."""
    sys.path.insert(0, ROOT)
    from megatron_dwm.hosts import cpu

    cpu.install()
    import runpy

    import torch

    import megatron_dwm.hosts.megatron_lm.session  # noqa: F401 - for the ranks, as all here

    runpy.run_path(SCRIPT, run_name="imported")
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    found = Campaign(plan).run()
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
