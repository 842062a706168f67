"""Runs of the stock trainer that are stopped before a step, which is then taken apart.

For workers under torchrun: importing the trainer takes longer than a tiny run, so a worker takes
many cases. A case is a dict with the `name` and the script's `args`.
"""

import contextlib
import functools
import json
import os
import runpy
import sys
import traceback

from tests.functional.run_many import SCRIPT, clean, end_process  # installs the host

# isort: split
from megatron_dwm.hosts.megatron_lm.session import Session

plain_train_step = Session.train_step


class Done(Exception):  # noqa: N818 - not an error
    """Ends a run when its step has been taken apart."""


@contextlib.contextmanager
def replaced(owner, name, value):
    """Replaces an attribute within it."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def stopped(case, after, take_apart, allowance):
    """Runs a case; returns what came out of its step, or the traceback.

    Args:
        case: the run.
        after: plain steps before the one that is taken apart.
        take_apart: called in the place of `Session.train_step`, with the case before its arguments.
        allowance: a context that the run needs.
    """
    kept = {}

    @functools.wraps(plain_train_step)
    def train_step(self, *args, **kwargs):
        if kwargs["iteration"] < after:
            return plain_train_step(self, *args, **kwargs)
        kept["out"] = take_apart(case, self, *args, **kwargs)
        raise Done

    sys.argv = [SCRIPT, *case["args"]]
    try:
        with replaced(Session, "train_step", train_step), allowance:
            runpy.run_path(SCRIPT, run_name="__main__")
    except Done:
        return kept["out"]
    except BaseException:
        return {"error": traceback.format_exc()}
    return {"error": "the run ended before the step that was to be taken apart"}


def in_order(run):
    """Runs the cases of the file CASES; the last rank writes what came out to OUT/<name>.json."""
    with open(os.environ["CASES"]) as file:
        cases = json.load(file)
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for case in cases:
        out = run(case)
        if last or "error" in out:
            with open(os.path.join(os.environ["OUT"], f"{case['name']}.json"), "w") as file:
                json.dump(out, file)
        if "error" in out:
            break  # the ranks may be out of step
        clean()
    end_process()
