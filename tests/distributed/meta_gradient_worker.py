"""Run under torchrun: takes the meta-gradients of many real runs apart, one after the other.

Reads a JSON list of cases from the file named by CASES, each a run of the stock trainer
(examples/pretrain_dwm.py) that is stopped before a step:

    name, args   the run
    after        plain steps before the one that is taken apart
    estimators   the product's passes B to D with each of these: `c` by name
    reference    <v, g_i> by a backward pass for every sample, v from the product's B and C
    brute        half the change of the weight: w_i really changed, the trainer's step re-run,
                 the meta loss measured; 0: not wanted
    break        a name of `BREAKS`: something is put wrong first, to see that a check notices
    allow        a name of `ALLOWANCES`: a stand-in for what the case needs
    update       take the whole step, and tell how the scores of its batch changed
    memory       tell the bytes that a meta step keeps beyond the trainer's own step

The last rank writes what came out to OUT/<name>.json, vectors in the order (data-parallel rank,
micro-batch, sample).
"""

import contextlib
import dataclasses
import gc
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from megatron_dwm.hosts import cpu  # noqa: E402
from tests.distributed.stopped_runs import (  # noqa: E402  (installs the host before Megatron)
    in_order,
    replaced,
    stopped,
)

# isort: split
import torch  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402

from megatron_dwm.core import collectives  # noqa: E402
from megatron_dwm.core.batches import StepBatches  # noqa: E402
from megatron_dwm.core.contexts import gathered_parameters  # noqa: E402
from megatron_dwm.core.trainee import Trainee  # noqa: E402
from megatron_dwm.hosts.megatron_lm.build import outcome  # noqa: E402
from megatron_dwm.meta_gradient.ghost import recording as ghost  # noqa: E402
from megatron_dwm.meta_gradient.optimizers import derivatives as jacobian  # noqa: E402
from megatron_dwm.policies import features  # noqa: E402
from megatron_dwm.step import loss, probe  # noqa: E402
from tests.contract import stand_in_muon  # noqa: E402
from tests.functional.torch_norms import torch_norms  # noqa: E402

# What each negative control puts wrong.
BREAKS = {
    None: contextlib.nullcontext,
    # The sum over tensor- and pipeline-parallel ranks is left out.
    "no-model-parallel-sum": lambda: replaced(
        collectives, "sum_over_model_parallel", lambda value, group: value
    ),
    # A replicated norm counts on every tensor-parallel rank.
    "norms-twice": lambda: replaced(ghost.Ghost, "share", lambda self, parameter: 1.0),
    # Clipping is taken for a constant factor.
    "no-clip-projection": lambda: replaced(
        jacobian,
        "clip_projection",
        lambda norm, limit: (jacobian.clip_coefficient(norm, limit), 0.0),
    ),
    # Shards of v are not completed under the distributed optimizer.
    "no-shard-gather": lambda: replaced(collectives, "gather_shards", lambda buffer, group: None),
    # Each rank takes the moments of its own part of the positions for those of the samples.
    "states-not-merged": lambda: replaced(features, "merged", lambda parts, group: parts),
    # Weights do not reach the losses of multi-token prediction, as if nobody listened.
    "further-losses-unheard": lambda: replaced(
        loss, "listening", lambda listener: contextlib.nullcontext()
    ),
    # Of parameters that another rank steps, what pass C has left is taken for v.
    "owners-not-summed": lambda: replaced(collectives, "sum_of_owners", lambda buffer, group: None),
    # Each data-parallel rank learns from its own samples only.
    "sums-not-reduced": lambda: replaced(
        collectives, "sum_over_data_parallel", lambda value, group: value.clone()
    ),
}


# What a case needs to run at all without Transformer Engine and emerging-optimizers.
ALLOWANCES = {
    None: contextlib.nullcontext,
    "sequence-parallel": torch_norms,
    "muon": stand_in_muon.installed,
    # The trainer takes grouped GEMMs on devices with kernels for them only.
    "grouped-gemm": lambda: replaced(torch.cuda, "get_device_capability", lambda *_: (8, 0)),
}


def take_apart(case, *args, **kw):
    """Returns what the case asks for at this step, with what is wrong in all of it."""
    with BREAKS[case.get("break_all")]():
        return taken_apart(case, *args, **kw)


def taken_apart(
    case, self, stock, forward_step, iterator, model, optimizer, scheduler, *rest, **kw
):
    """Returns what the case asks for at this step."""
    config, schedule = rest[:2]
    step = self.step
    step.forward_step.forward_step = forward_step
    batches = StepBatches(iterator, get_num_microbatches())
    trainee = Trainee(model, optimizer, config, schedule, batches.replay())

    def stock_step(data):
        return outcome(stock(step.forward_step, data, model, optimizer, scheduler, *rest, **kw))

    weights = step.weights_of(trainee, batches, kw["iteration"])
    scores = scores_of(step)
    if weights is None:  # every rank needs their number
        count = get_num_microbatches() * step.shape.micro_batch_size * step.groups.dp.size()
        weights = torch.zeros(count)
    probed = probe.ProbedStep(step, trainee, scheduler, stock_step, batches, weights)
    out = {"weights": weights.tolist(), "dp": step.groups.dp.size(), "c": {}}
    out["micro_batch_size"] = step.shape.micro_batch_size
    if case.get("scores"):
        out["scores"] = None if scores is None else scores.tolist()
    with BREAKS[case.get("break")]():
        for name in case.get("estimators", ["ghost"]):
            found = probe.influence(probed, name)
            out["c"][name] = found.values.tolist()
            out.setdefault("quality", {}).update(found.quality)
    if case.get("reference"):
        out["reference"] = probe.reference(probed).tolist()
    if case.get("brute"):
        samples = list(range(weights.numel()))
        out["brute"] = probe.brute_force(probed, samples, case["brute"]).tolist()
    if case.get("memory"):
        out.update(memory(probed))
    if case.get("update"):
        out.update(update(probed, scores, kw["iteration"]))
    return out


def scores_of(step):
    """Returns the scores [N] of the samples that were weighed last; None where none are seen."""
    if not step.sees_losses:
        return None
    return collectives.gather_samples(step.policy.local_scores(), step.groups.dp)


def update(probed, scores, iteration):
    """Takes the whole step; tells what it did to the scores, and to the LLM."""
    step, state = probed.step, probed.state()
    result, record = step(probed.stock_step, probed.trainee, iteration)
    moved = [t.detach().clone() for t, _ in state.tensors]
    # The meta step must leave the LLM exactly where the trainer's step alone takes it.
    state.restore()
    with gathered_parameters(probed.trainee):
        step.influence.weighted_step(probed.stock_step, probed.batches, probed.weights)
    left_alone = all(
        torch.equal(t, m) for (t, _), m in zip(state.tensors, moved, strict=True) if t.dim() > 0
    )
    flag = torch.tensor(float(left_alone), device=cpu.device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    step.weights_of(probed.trainee, probed.batches, iteration)
    after = scores_of(step)
    change = None if scores is None else (after - scores).tolist()
    return {
        "left_alone": bool(flag.item()),
        "grad_norm": float(result[5]),
        "updated": record.meta is not None and record.meta.updated,
        "scores": None if scores is None else scores.tolist(),
        "score_change": change,
    }


def live_bytes():
    """Returns the bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory(probed):
    """Returns what each kind of meta step keeps in passes C and D, in bytes a local parameter."""
    step, found = probed.step, {}
    elements = sum(p.numel() for chunk in probed.trainee.model for p in chunk.parameters())
    state = probed.state()

    def without_meta_step():
        step.influence.weighted_step(probed.stock_step, probed.batches, probed.weights)

    def peak_of(act, *places):
        """Runs `act` and returns the most that is alive at the entry of one of the places."""
        seen = []

        def watched(function):
            def call(*args, **kwargs):
                time.sleep(0.2)  # gloo's thread lets go of a collective a moment after its end
                seen.append(live_bytes())
                return function(*args, **kwargs)

            return call

        with contextlib.ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(replaced(owner, name, watched(getattr(owner, name))))
            act()
        state.restore()
        return max(seen, default=0)

    def measure_after_step():
        without_meta_step()
        seen.append(live_bytes())

    seen = []
    with gathered_parameters(probed.trainee):
        measure_after_step()
        state.restore()
    base = seen[0]
    passes = (step.passes, "meta_loss_gradient"), (step.passes, "run")
    for name in ("ghost", "finite_difference", "current"):
        lookahead = "current" if name == "current" else "next"
        config = dataclasses.replace(step.influence.config, lookahead=lookahead)
        places = passes if name != "current" else [(step.influence, "weighted_step")]
        with replaced(step.influence, "config", config), gathered_parameters(probed.trainee):
            peak = peak_of(
                lambda name=name: step.influence.step(
                    probed.stock_step,
                    probed.trainee,
                    probed.batches,
                    probed.weights,
                    None if name == "current" else name,
                ),
                *places,
            )
        found[name] = (peak - base) / elements
    return {"bytes_per_parameter": found}


def run(case):
    """Runs a case; returns what came out, or the traceback."""
    return stopped(case, case.get("after", 3), take_apart, ALLOWANCES[case.get("allow")]())


if __name__ == "__main__":
    in_order(run)
