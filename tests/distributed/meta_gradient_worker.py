"""Run under torchrun: compares the product's meta-gradient with brute force and the reference.

A real run of the stock trainer (examples/pretrain_dwm.py). After some plain steps, one meta step
is taken apart:

    c          the product's own passes A to D (finite difference)
    reference  <v, g_i> by a backward pass for every sample, v from passes B and C
    brute      w_i really changed, the trainer's own step re-run, the meta loss measured

The last rank writes the three vectors as JSON to the file named by PROBE_OUT.
"""

import json
import os
import runpy
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from megatron_dwm import host  # noqa: E402

host.install()

import torch  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402

from megatron_dwm.batches import StepBatches, tokens_of  # noqa: E402
from megatron_dwm.guards import gathered_parameters  # noqa: E402
from megatron_dwm.integration.session import Session  # noqa: E402
from megatron_dwm.meta import collectives, probe  # noqa: E402
from megatron_dwm.train_step import Trainee  # noqa: E402
from megatron_dwm.weighting.weights import weights_from_scores  # noqa: E402

AFTER = int(os.environ.get("PROBE_AFTER", "3"))
DELTA = float(os.environ.get("PROBE_DELTA", "0.25"))
plain_train_step = Session.train_step


def train_step(self, stock, forward_step, iterator, model, optimizer, scheduler, *rest, **kwargs):
    """Takes plain steps, then the one that is compared, and ends the run."""
    arguments = (stock, forward_step, iterator, model, optimizer, scheduler, *rest)
    iteration = kwargs["iteration"]
    if iteration < AFTER:
        return plain_train_step(self, *arguments, **kwargs)
    config, schedule = rest[:2]
    step = self.step
    step.forward_step.forward_step = forward_step
    num_microbatches = get_num_microbatches()
    batches = StepBatches(iterator, num_microbatches)
    again = Trainee(model, optimizer, config, schedule, batches.replay())

    def stock_step(data):
        return stock(step.forward_step, data, model, optimizer, scheduler, *rest, **kwargs)

    local = step.scorer.scores(tokens_of(batches.first()), num_microbatches)
    weights = torch.zeros(local.numel() * step.groups.dp.size())
    if step.sees_losses:
        scores = collectives.gather_samples(local, step.groups.dp)
        weights = weights_from_scores(scores, step.config.temperature)
    # Every rank needs the weights only to agree on their number.
    samples = list(range(weights.numel()))
    common = (step, again, scheduler, stock_step, batches, weights)
    reference = probe.reference(*common)
    brute = probe.brute_force(*common, samples, DELTA)
    state = probe.TrainerState(again, scheduler)
    lr = max(float(group["lr"]) for group in optimizer.param_groups)
    result, record = step(stock_step, again, iteration)
    moved = [t.detach().clone() for t, _ in state.tensors]
    # The meta step must leave the LLM exactly where the trainer's step alone takes it.
    state.restore()
    with gathered_parameters(again):
        probe.weighted_step(step, stock_step, batches, weights)
    left_alone = all(
        torch.equal(t, m) for (t, _), m in zip(state.tensors, moved, strict=True) if t.dim() > 0
    )
    flag = torch.tensor(float(left_alone))
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        with open(os.environ["PROBE_OUT"], "w") as file:
            json.dump(
                {
                    "c": (record.meta.influence * lr).tolist(),
                    "reference": reference.tolist(),
                    "brute": brute.tolist(),
                    "weights": weights.tolist(),
                    "grad_norm": float(result[5]),
                    "left_alone": bool(flag.item()),
                },
                file,
            )
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    Session.train_step = train_step
    script = os.path.join(ROOT, "examples", "pretrain_dwm.py")
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
