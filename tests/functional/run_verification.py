"""Run under torchrun: training runs and probe commands, one after the other, in one set of ranks.

As run_many.py, with one more field of a run: `probe` (its arguments are those of the command
`megatron-dwm probe`).
"""

import contextlib
import io
import json
import os
import sys
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from tests.functional import run_many  # noqa: E402  (installs the host before Megatron)

# isort: split

from megatron_dwm.checkpoint import state as checkpoint  # noqa: E402
from megatron_dwm.cli import probe as command  # noqa: E402
from megatron_dwm.step.influence_passes import InfluencePasses  # noqa: E402


def scrambled(found):
    """Gives each sample another one's influence."""
    return lambda self, local, *rest: found(self, None if local is None else local.roll(1), *rest)


def scaled(found, factor):
    """Multiplies the influence, as a loss scale does that is not divided out."""
    return lambda self, local, *rest: found(self, None if local is None else local * factor, *rest)


@contextlib.contextmanager
def broken_estimate():
    """Breaks the product's meta-gradient where SCRAMBLE or SCALE is set, and nothing else."""
    whole = InfluencePasses._influence
    if os.environ.get("SCRAMBLE") == "1":
        InfluencePasses._influence = scrambled(whole)
    if "SCALE" in os.environ:
        InfluencePasses._influence = scaled(whole, float(os.environ["SCALE"]))
    try:
        yield
    finally:
        InfluencePasses._influence = whole


@contextlib.contextmanager
def older_checkpoint():
    """Where OLD is set, saves as a version that did not know how the run was started."""
    whole = checkpoint.state_for_saving
    if os.environ.get("OLD") == "1":

        def without_run(*args, **kwargs):
            return {k: v for k, v in whole(*args, **kwargs).items() if k != "run"}

        checkpoint.state_for_saving = without_run
    try:
        yield
    finally:
        checkpoint.state_for_saving = whole


def probe(args):
    """Runs the command in this process and returns what came out on this rank."""
    out, err = io.StringIO(), io.StringIO()
    folder, words = os.getcwd(), list(sys.argv)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.compared(args)
    except BaseException:
        code = -1
        err.write(traceback.format_exc())
    finally:
        os.chdir(folder)
        sys.argv = words
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


def main():
    """Runs all, in order."""
    with open(os.environ["RUNS"]) as file:
        runs = json.load(file)
    for item in runs:
        before = dict(os.environ)
        os.environ.update(item["env"])
        with broken_estimate(), older_checkpoint():
            result = (probe if item["probe"] else run_many.run)(item["args"])
        os.environ.clear()
        os.environ.update(before)
        name = os.path.join(os.environ["OUT"], f"{item['name']}.{os.environ['RANK']}.json")
        with open(name, "w") as file:
            json.dump(result, file)
        run_many.clean()
    run_many.end_process()


if __name__ == "__main__":
    main()
