"""Forks the ranks of multi-rank scripts from one process that has imported the trainer.

Importing the trainer takes longer than most of what a test runs. So one process imports it for a
whole test session and forks the ranks of every script that the tests would start with torchrun. It
starts no thread and no process group, and touches no GPU. With a folder in TRANSFORMER_ENGINE it
has Transformer Engine's Python classes too (`tests.transformer_engine_cpu`).

Not exercised by scripts that run so: ranks whose sets differ in order, since all have one seed of
Python's string hashes. Each rank that `harness.torchrun` starts by torchrun has its own.

Reads requests from standard input, one JSON object per line:

    ranks, script, args   what runs, as `__main__`, in each rank
    env                   its environment, beside what torchrun sets
    output                prefix of two files for what all ranks print: `.out`, `.err`
    timeout               seconds after which the ranks are ended

and answers each with a line `{"code": 0}`; 1: a rank ended with an error, whereupon the others are
ended as torchrun does it; null: the time was up.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import queue
import runpy
import signal
import socket
import sys
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STARTED_WITH = dict(os.environ)  # the host adds to it
GRACE = 15.0  # seconds from SIGTERM to SIGKILL


def free_port():
    """Returns a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def end_with_parent():
    """Lets this process be killed when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ------------------------------------------------------------------------------- in a child


def forked(function, request):
    """Runs a function in a child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        end_with_parent()
        for number, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(f"{request['output']}.{name}", flags), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        code = function()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def run_script(request, rank, port):
    """Runs the script as one of the ranks."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    size = str(request["ranks"])
    for name in STARTED_WITH.keys() - request["env"].keys():
        os.environ.pop(name, None)
    os.environ.update(
        request["env"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size,
        LOCAL_WORLD_SIZE=size, GROUP_RANK="0", GROUP_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none",
    )  # fmt: skip
    if "--async-save" not in json.dumps(request):
        # The trainer's is in a helper process, which would import everything once more. Only a
        # save in the background needs it there.
        filesystem_async._results_queue = queue.Queue()
    sys.argv = [request["script"], *request["args"]]
    sys.path.insert(0, os.path.dirname(request["script"]))
    runpy.run_path(request["script"], run_name="__main__")
    return 0


def keep_store(port):
    """Holds the store through which ranks find each other, as torchrun's agent does."""
    import torch

    kept = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while kept:
        signal.pause()


# ------------------------------------------------------------------------------ in the server


def serve(request):
    """Runs a request; returns its answer."""
    port = free_port()
    ends = time.monotonic() + request["timeout"]
    store = forked(lambda: keep_store(port), request)
    ranks = [
        forked(lambda rank=rank: run_script(request, rank, port), request)
        for rank in range(request["ranks"])
    ]
    codes = dict.fromkeys(ranks)
    try:
        while None in codes.values() and not any(codes.values()) and time.monotonic() < ends:
            reap(codes)
            time.sleep(0.01)
        late = None in codes.values() and not any(codes.values())
        if None in codes.values():
            signalled(codes, signal.SIGTERM)
            patience = time.monotonic() + GRACE
            while None in codes.values() and time.monotonic() < patience:
                reap(codes)
                time.sleep(0.01)
    finally:
        for pid in (*ranks, store):
            # Their own helpers too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in (*(pid for pid, code in codes.items() if code is None), store):
            os.waitpid(pid, 0)
    return {"code": None if late else int(any(code != 0 for code in codes.values()))}


def reap(codes):
    """Notes which children have ended."""
    for pid, code in codes.items():
        if code is None:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)


def signalled(codes, number):
    """Sends a signal to the children that have not ended."""
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, number)


def remember_docstrings():
    """Lets each rank's parser of flags take the docstrings that this process has read from sources.

    Reading them takes a fifth of a second, twice a run.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, known = ArgumentGroupFactory._get_field_docstrings, {}

    def docstrings(self, config):
        if config not in known:
            known[config] = read(self, config)
        return dict(known[config])

    ArgumentGroupFactory._get_field_docstrings = docstrings
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module("megatron.training.arguments").add_megatron_arguments(parser)
    assert known


# What a run imports on its way.
LATER = (
    "megatron.core.tokenizers.text.text_tokenizer",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "psutil",
    "megatron_dwm.hosts.megatron_lm.session",
    "megatron_dwm.hosts.megatron_lm.build",
    "megatron_dwm.step.probe",
    "megatron_dwm.policies.features",
)


def main():
    """Imports everything, then serves until the end of standard input."""
    end_with_parent()
    # What imports print is no answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path[0] = ROOT
    from megatron_dwm.hosts import cpu

    cpu.install()
    if os.environ.get("TRANSFORMER_ENGINE"):
        from tests.transformer_engine_cpu.install import install

        install(os.environ["TRANSFORMER_ENGINE"])
    import torch

    runpy.run_path(os.path.join(ROOT, "examples", "pretrain_dwm.py"), run_name="imported")
    for name in LATER:
        importlib.import_module(name)
    remember_docstrings()
    torch.set_num_threads(1)
    # A thread would be missing in what is forked, with whatever it holds.
    assert len(os.listdir("/proc/self/task")) == 1, os.listdir("/proc/self/task")
    gc.collect()
    gc.freeze()  # what is here now is not looked through again in each rank
    for line in sys.stdin:
        answers.write(json.dumps(serve(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
