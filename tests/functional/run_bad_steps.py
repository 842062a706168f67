"""Run under torchrun: as run_many.py, with values poisoned at chosen steps.

POISON is a JSON list of {"what", "rank", "steps"}: at those iterations (1-based), on that rank,

    parameter  an element of the DWM's score head is NaN during the step, and then what it was
    broken     the same, for good
    scores     a score that the DWM gives is infinite
    influence  a sample's influence is NaN
    gradient   an element of the DWM's reduced gradient is NaN
    loss       a token's loss of the LLM is NaN

OLD=1 saves as a version that did not count bad steps. What comes out has, beside run_many's, for
every step: the weights, the causes and counts, and hashes of the DWM's parameters and of its
optimizer's state.
"""

import contextlib
import hashlib
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from tests.functional import run_many  # noqa: E402  (installs the host before Megatron)

# isort: split
import torch  # noqa: E402

from megatron_dwm.checkpoint import state as checkpoint  # noqa: E402
from megatron_dwm.core.optimizers import leaf_optimizers  # noqa: E402
from megatron_dwm.step.influence_passes import InfluencePasses  # noqa: E402
from megatron_dwm.step.loss import WeightedForwardStep  # noqa: E402
from megatron_dwm.step.train_step import DWMTrainStep  # noqa: E402
from megatron_dwm.weighting_model.scorer import Scorer  # noqa: E402

NAN = float("nan")


def digest(tensors):
    """Returns a hash of the exact bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def moments(scorer):
    """Yields every tensor of the DWM's optimizer."""
    for leaf in leaf_optimizers(scorer.optimizer):
        for group in leaf.optimizer.param_groups:
            for parameter in group["params"]:
                state = leaf.optimizer.state.get(parameter, {})
                yield from (state[k].view(-1) for k in sorted(state))


class Poison:
    """Knows the step that is being taken, and what is poisoned in it on this rank."""

    def __init__(self):
        self.plan = json.loads(os.environ.get("POISON", "[]"))
        self.rank = int(os.environ["RANK"])
        self.step = 0

    def __contains__(self, what):
        return any(
            p["what"] == what and p["rank"] == self.rank and self.step in p["steps"]
            for p in self.plan
        )


@contextlib.contextmanager
def poisoned(seen):
    """Within it, values are poisoned as POISON says, and every step is written down."""
    poison = Poison()
    step, scores, run = DWMTrainStep.__call__, Scorer.scores, Scorer._run
    influence, forward = InfluencePasses._influence, WeightedForwardStep.__call__

    def noted_step(self, stock_step, trainee, iteration):
        poison.step = iteration + 1
        if self.scorer is None:
            return step(self, stock_step, trainee, iteration)
        head = self.scorer.module.score.weight
        kept = head.detach().clone()
        if "parameter" in poison or "broken" in poison:
            head.data.view(-1)[0] = NAN
        result, record = step(self, stock_step, trainee, iteration)
        if "parameter" in poison:
            head.data.copy_(kept)
        weights = None if record.weights is None else record.weights.tolist()
        seen.append(
            {
                "iteration": record.iteration,
                "weights": weights,
                "causes": record.causes,
                "bad_steps": record.bad_steps,
                "updated": record.meta is not None and record.meta.updated,
                "dwm": digest(self.scorer.module.parameters()),
                "moments": digest(moments(self.scorer)),
                "finite": all(bool(torch.isfinite(m).all()) for m in moments(self.scorer)),
            }
        )
        return result, record

    def poisoned_scores(self, *args):
        found = scores(self, *args)
        if "scores" in poison:
            found[0] = float("inf")
        return found

    def poisoned_run(self, tokens, count, loss_func, forward_only):
        run(self, tokens, count, loss_func, forward_only)
        if "gradient" in poison and not forward_only:
            self.ddp.buffers[0].grad_data[3] = NAN

    def poisoned_influence(self, local, *rest):
        found = influence(self, local, *rest)
        if "influence" in poison:
            found.values[0] = NAN
        return found

    def poisoned_forward(self, *args, **kwargs):
        output, loss_func = forward(self, *args, **kwargs)
        if "loss" in poison and self._weights is not None:
            output = output + torch.zeros_like(output).index_fill(0, torch.tensor([0]), NAN)
        return output, loss_func

    def older(*args, **kwargs):
        state = saving(*args, **kwargs)
        if os.environ.get("OLD") == "1":
            del state["bad_steps"]
        return state

    saving, checkpoint.state_for_saving = checkpoint.state_for_saving, older
    DWMTrainStep.__call__, Scorer.scores, Scorer._run = noted_step, poisoned_scores, poisoned_run
    InfluencePasses._influence, WeightedForwardStep.__call__ = poisoned_influence, poisoned_forward
    try:
        yield
    finally:
        checkpoint.state_for_saving = saving
        DWMTrainStep.__call__, Scorer.scores, Scorer._run = step, scores, run
        InfluencePasses._influence, WeightedForwardStep.__call__ = influence, forward


def main():
    """Runs all, in order."""
    with open(os.environ["RUNS"]) as file:
        runs = json.load(file)
    for item in runs:
        before = dict(os.environ)
        os.environ.update(item["env"])
        seen = []
        with poisoned(seen):
            result = run_many.run(item["args"])
        os.environ.clear()
        os.environ.update(before)
        name = os.path.join(os.environ["OUT"], f"{item['name']}.{os.environ['RANK']}.json")
        with open(name, "w") as file:
            json.dump({**result, "seen": seen}, file)
        run_many.clean()
    run_many.end_process()


if __name__ == "__main__":
    main()
