"""Run under torchrun: several pre-training runs, one after the other, in the same processes.

Importing the trainer takes longer than a tiny run, so the ranks are spawned once. Reads a JSON
list of runs ({"name", "args", "env"}) from the file named by RUNS, runs each through
examples/pretrain_dwm.py ("launched": by the launcher, as another's script), and writes what came
out for every rank to the folder OUT:

    exit code, standard error, losses and gradient norms as exact numbers, a hash of the
    final parameters, and the documents of every sample that was drawn by weight.

Environment of a run: POISON_META_LOSS=1 makes the meta loss NaN; KILL_AT=K ends the run after step
K without saving; REPLACE=K:SOURCE:TARGET copies a file over another after step K.
"""

import contextlib
import functools
import gc
import hashlib
import io
import json
import os
import runpy
import shutil
import sys
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from megatron_dwm.hosts import cpu  # noqa: E402

cpu.install()

import psutil  # noqa: E402
import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from megatron.training import training  # noqa: E402

from megatron_dwm import launch  # noqa: E402
from megatron_dwm.step.loss import WeightedForwardStep  # noqa: E402

SCRIPT = os.environ.get("RUN_SCRIPT", os.path.join(ROOT, "examples", "pretrain_dwm.py"))


class Killed(BaseException):
    """Ends a run where it stands."""


def parameters_hash(model):
    """Returns a hash of the exact bits of this rank's parameters."""
    digest = hashlib.sha256()
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def poisoned(measure):
    """Makes every loss of the meta step's own passes NaN."""
    return lambda loss_func, losses, summed, output, **k: measure(
        loss_func, losses, summed, output * float("nan"), **k
    )


def run(args, launched=False):
    """Runs the script once and returns what came out on this rank."""
    seen = {"steps": [], "valid": [], "documents": []}
    kept, read = {}, set()
    setup, log = training.setup_model_and_optimizer, training.training_log
    evaluate, next_batch = training.evaluate, RerunDataIterator.__next__

    def keep_documents(self):
        batch = next_batch(self)
        if isinstance(batch, dict) and "document_ids" in batch:
            # A step reads its micro-batches once, and hands the same tensors to each of its passes.
            mark = len(seen["steps"]), batch["document_ids"].data_ptr()
            if mark in read:
                return batch
            read.add(mark)
            for ids, tokens in zip(batch["document_ids"], batch["tokens"], strict=True):
                seen["documents"].append([len(seen["steps"]) + 1, ids.tolist(), tokens.tolist()])
        return batch

    @functools.wraps(setup)
    def keep_model(*a, **k):
        kept["model"], optimizer, scheduler = setup(*a, **k)
        return kept["model"], optimizer, scheduler

    @functools.wraps(log)
    def keep_losses(loss_dict, total, lr, iteration, scale, report, skipped, norm, *a, **k):
        values = {name: float(value) for name, value in loss_dict.items()}
        seen["steps"].append([iteration, values, float(norm or 0.0)])
        after, *paths = os.environ.get("REPLACE", "0").split(":")
        if iteration == int(after):
            if torch.distributed.get_rank() == 0:
                shutil.copyfile(paths[0], f"{paths[1]}.new")
                os.replace(f"{paths[1]}.new", paths[1])
            torch.distributed.barrier()
        if iteration == int(os.environ.get("KILL_AT", "0")):
            raise Killed
        return log(loss_dict, total, lr, iteration, scale, report, skipped, norm, *a, **k)

    @functools.wraps(evaluate)
    def keep_evaluation(*a, **k):
        found = evaluate(*a, **k)
        seen["valid"].append({name: float(v) for name, v in (found[0] or {}).items()})
        return found

    if os.environ.get("POISON_META_LOSS") == "1":
        kept["measure"] = WeightedForwardStep._measure
        WeightedForwardStep._measure = staticmethod(poisoned(WeightedForwardStep._measure))
    training.setup_model_and_optimizer = keep_model
    training.training_log = keep_losses
    training.evaluate = keep_evaluation
    RerunDataIterator.__next__ = keep_documents
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [SCRIPT, *args]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if launched:
                launch.main([SCRIPT, *args])
            else:
                runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except Killed:
        code = 0
    except BaseException:
        code = 1
        err.write(traceback.format_exc())
    finally:
        training.setup_model_and_optimizer, training.training_log = setup, log
        training.evaluate = evaluate
        RerunDataIterator.__next__ = next_batch
        if "measure" in kept:
            WeightedForwardStep._measure = staticmethod(kept["measure"])
    if "model" in kept:
        seen["parameters"] = parameters_hash(kept["model"])
    return {**seen, "code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


def clean():
    """Brings Megatron's globals back to where a new run can start.

    Its process groups go too: each has threads of gloo, which poll for as long as it lives, and
    after a few runs those of the runs before take more time than the run.
    """
    with contextlib.suppress(AssertionError):
        training.destroy_global_state()
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    megatron_random.initialize_rng_tracker(force_reset=True)
    # What is collected for the log, of as many layers as the run before had.
    get_moe_metrics_tracker().metrics.clear()
    MTPLossLoggingHelper.tracker.clear()
    gc.collect()
    world = torch.distributed.group.WORLD
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not world:
            torch.distributed.destroy_process_group(group)


def end_process():
    """Ends this rank at once.

    Ranks that failed in different places may be out of step, so none waits for another; what they
    started (the checkpoint writer's helpers) must not outlive them.
    """
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


def main():
    """Runs all that the file RUNS lists."""
    with open(os.environ["RUNS"]) as file:
        run_in_order(json.load(file))


def run_in_order(runs):
    """Runs all, writes what came out to OUT, and ends the process."""
    out = os.environ["OUT"]
    rank = os.environ["RANK"]
    for item in runs:
        before = dict(os.environ)
        os.environ.update(item.get("env", {}))
        result = run(item["args"], item.get("launched", False))
        os.environ.clear()
        os.environ.update(before)
        with open(os.path.join(out, f"{item['name']}.{rank}.json"), "w") as file:
            json.dump(result, file)
        clean()
    end_process()


if __name__ == "__main__":
    main()
