"""Run under torchrun: one training step at many layouts, and in float64 in one process.

Reads a JSON list of cases from the file named by CASES, each a run of the stock trainer that is
stopped before its fourth step. Writes what came out to OUT/<name>.json; a `reference` has its
tensors in OUT/<name>.pt.

`reference`  one process, parameters in float64, a forward and backward pass for each sample of the
             step by its own few lines: cross-entropy of the model's logits, the division of losses
             as Megatron documents it, clipping, Adam and SGD written out and differentiated by
             autograd. Nothing of the package takes part but the reading of the batches.
`layout`     the trainer's own step under the package, with the same weights: its loss as it is
             differentiated, the gradient that reaches the optimizer, and the influence.

Gradients are told apart by the names and places under which Megatron's distributed checkpoints know
the parameters, so each rank compares what it holds.
"""

import os
import sys

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
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedTensor,
    apply_factories,
)
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.pipeline_parallel import schedules  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402

from megatron_dwm.core import collectives  # noqa: E402
from megatron_dwm.core.batches import StepBatches  # noqa: E402
from megatron_dwm.core.contexts import gathered_parameters  # noqa: E402
from megatron_dwm.core.trainee import Trainee  # noqa: E402
from megatron_dwm.hosts.megatron_lm.build import outcome  # noqa: E402
from megatron_dwm.step import probe  # noqa: E402
from tests.functional.torch_norms import torch_norms  # noqa: E402

START = 3


# --- where a parameter is ------------------------------------------------------------------------


def placed(model, values):
    """Yields (key, global shape, place, value) of what stands in for each parameter of a rank.

    Args:
        model: chunks.
        values: what stands in, by `id` of the parameter.
    """
    for chunk in unwrap_model(model):
        parameters = list(chunk.parameters())
        kept = [p.data for p in parameters]
        try:
            for p in parameters:
                p.data = values[id(p)]
            found = chunk.sharded_state_dict()
            apply_factories(found)
            shards = [v for v in nested_values(found) if isinstance(v, ShardedTensor)]
            for shard in shards:
                value = shard.data.detach().clone()
                yield shard.key, shard.global_shape, shard.global_slice(), value
        finally:
            for p, data in zip(parameters, kept, strict=True):
                p.data = data


# --- reference -----------------------------------------------------------------------------------


class InFloat64:
    """The language model in float64, in one process.

    Args:
        model: its only chunk.
    """

    def __init__(self, model):
        (self.chunk,) = unwrap_model(model)
        self.chunk.double()
        self.parameters = list(self.chunk.parameters())
        self.sizes = [p.numel() for p in self.parameters]

    def flat(self, tensors):
        """Returns one vector of all parameters' tensors."""
        return torch.cat([t.detach().double().reshape(-1) for t in tensors])

    def parts(self, vector):
        """Returns the parameters' tensors of a vector."""
        pieces = vector.split(self.sizes)
        return [v.view(p.shape) for v, p in zip(pieces, self.parameters, strict=True)]

    def load(self, vector):
        """Sets the parameters."""
        for p, value in zip(self.parameters, self.parts(vector), strict=True):
            p.data = value.clone()

    def gradient(self, batch, i):
        """Returns sample i's summed loss over the positions that count, and its gradient."""
        mask = batch.get("attention_mask")
        logits = self.chunk(
            batch["tokens"][i : i + 1],
            batch["position_ids"][i : i + 1],
            None if mask is None else mask[i : i + 1],
        )
        losses = torch.nn.functional.cross_entropy(
            logits[0].double(), batch["labels"][i], reduction="none"
        )
        loss = (losses * batch["loss_mask"][i].double()).sum()
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        given = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.parameters, found, strict=True)
        ]
        return loss.detach(), self.flat(given)


def shares(tokens, layout):
    """Returns what each sample's summed loss is multiplied by, in the order of the data `[N]`.

    Megatron: by the tokens of the global batch; or by those of its micro-batch, then by the number
    of micro-batches, and by the data-parallel size.
    """
    if layout["per_token"]:
        return torch.full_like(tokens, 1 / tokens.sum().item())
    size = layout["micro_batch"]
    of_micro_batch = tokens.view(-1, size).sum(1).clamp(min=1)
    # As many terms as there are micro-batches over all replicas.
    return (1 / of_micro_batch / len(of_micro_batch)).repeat_interleave(size)


def groups_and_states(optimizer):
    """Returns the group and the state of each parameter by its `id`; they are whole on one rank."""
    groups, states = {}, {}
    for leaf in getattr(optimizer, "chained_optimizers", [optimizer]):
        whole = {id(p): p for group in leaf.optimizer.param_groups for p in group["params"]}
        if isinstance(leaf, DistributedOptimizer):
            # It steps flat tensors in the place of the parameters.
            model = [p for g in [*leaf.model_float16_groups, *leaf.model_fp32_groups] for p in g]
            main = [
                p
                for g in [*leaf.shard_fp32_from_float16_groups, *leaf.shard_fp32_groups]
                for p in g
            ]
            whole = {id(m): p for m, p in zip(main, model, strict=True)}
        for group in leaf.optimizer.param_groups:
            for stepped_one in group["params"]:
                p = whole[id(stepped_one)]
                state = leaf.optimizer.state[stepped_one]
                groups[id(p)] = group
                states[id(p)] = {
                    name: value if name == "step" else value.view(p.shape)
                    for name, value in state.items()
                    if value is not None
                }
    return groups, states


def stepped(llm, optimizer, theta, gradient, limit):
    """Returns the parameters after the optimizer's step, as a function of the gradient."""
    norm = gradient.norm()
    if limit > 0 and norm > limit:
        gradient = gradient * (limit / (norm + 1e-6))
    groups, states = groups_and_states(optimizer)
    moved = []
    for p, x, g in zip(llm.parameters, llm.parts(theta), llm.parts(gradient), strict=True):
        group, state = groups[id(p)], states[id(p)]
        lr, decay = group["lr"], group["weight_decay"]
        if "momentum" in group:
            assert group["momentum"] == 0
            moved.append(x - lr * (g + decay * x))
            continue
        (b1, b2), step = group["betas"], float(state["step"]) + 1
        first = b1 * state["exp_avg"].double() + (1 - b1) * g
        second = b2 * state["exp_avg_sq"].double() + (1 - b2) * g.square()
        # At 0 the root has no derivative, but the step has: its numerator is 0 as well.
        root = (second.clamp(min=1e-300) / (1 - b2**step)).sqrt()
        root = torch.where(second > 0, root, 0.0) + group["eps"]
        moved.append(x - lr * decay * x - lr * first / (1 - b1**step) / root)
    return torch.cat([m.reshape(-1) for m in moved])


def reference(case, self, stock, forward_step, iterator, model, optimizer, *rest, **kw):
    """Saves the samples' gradients, and what each layout has to come to, to OUT/<name>.pt."""
    (batch,) = StepBatches(iterator, 1).first()
    (meta,) = self.step.meta_data.batches_at(self.step.meta_data.consumed_samples)
    llm = InFloat64(model)
    theta = llm.flat(llm.parameters)
    count = len(batch["tokens"])
    samples = [llm.gradient(batch, i) for i in range(count)]
    losses, gradients = torch.stack([s for s, _ in samples]), torch.stack([g for _, g in samples])
    tokens = batch["loss_mask"].double().sum(1)
    meta_tokens = meta["loss_mask"].double().sum(1)
    found = {"gradients": {}, "layouts": {}}
    for i in range(count):
        values = {id(p): v for p, v in zip(llm.parameters, llm.parts(gradients[i]), strict=True)}
        for key, shape, place, value in placed(model, values):
            whole = found["gradients"].setdefault(key, torch.zeros(count, *shape).double())
            whole[(i, *place)] = value
    limit = optimizer.config.clip_grad
    for layout in case["layouts"]:
        share, weights = shares(tokens, layout), torch.tensor(layout["weights"]).double()
        gradient = ((weights * share) @ gradients).requires_grad_()
        after = stepped(llm, optimizer, theta, gradient, limit)
        llm.load(after.detach())
        terms = [llm.gradient(meta, i) for i in range(count)]
        h = shares(meta_tokens, layout) @ torch.stack([g for _, g in terms])
        llm.load(theta)
        (v,) = torch.autograd.grad(h @ after, gradient)
        found["layouts"][layout["name"]] = {
            "factors": weights * share,
            "loss": float(weights * share @ losses),
            "norm": float(gradient.detach().norm()),
            "influence": share * (gradients @ v),
            "tokens": tokens,
        }
    torch.save(found, os.path.join(os.environ["OUT"], f"{case['name']}.pt"))
    return {"samples": count}


# --- layout --------------------------------------------------------------------------------------


def layout(case, self, stock, forward_step, iterator, model, optimizer, scheduler, *rest, **kw):
    """Returns how far the trainer's step under the package is from the reference."""
    config, schedule = rest[:2]
    step = self.step
    step.forward_step.forward_step = forward_step
    batches = StepBatches(iterator, get_num_microbatches())
    trainee = Trainee(model, optimizer, config, schedule, batches.replay())

    def stock_step(data):
        return outcome(stock(step.forward_step, data, model, optimizer, scheduler, *rest, **kw))

    # As passed on by the policy: the parameters' device and the rank's own order.
    weights = torch.tensor(case["weights"], device=cpu.device()).float()
    probed = probe.ProbedStep(step, trainee, scheduler, stock_step, batches, weights)
    expected = torch.load(os.path.join(os.environ["OUT"], f"{case['reference']}.pt"))
    mine = expected["layouts"][case["name"]]
    out = {"dp": step.groups.dp.size(), "influence": {}}
    out.update(one_step(probed, model, optimizer, expected["gradients"], mine, case["per_token"]))
    for name in case["estimators"]:
        found = probe.influence(probed, name)
        out["influence"][name] = found.values.tolist()
    out["expected"] = {"loss": mine["loss"], "norm": mine["norm"]}
    out["expected"]["influence"] = mine["influence"].tolist()
    return out


def one_step(probed, model, optimizer, gradients, mine, per_token):
    """Takes the weighted step up to the optimizer's, and compares what is there."""
    state, found, losses, tokens = probed.state(), {}, [], []
    calculate, step = schedules.forward_step_calc_loss, optimizer.step

    def seen(*args, **kwargs):
        value, count = calculate(*args, **kwargs)
        if probed.step.sees_losses and getattr(value, "ndim", 1) == 0:
            losses.append(value.detach().double())
            tokens.append(count)
        return value, count

    def at_optimizer(*args, **kwargs):
        for chunk in model:
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                if buffer.ddp_config.use_distributed_optimizer:
                    for bucket in buffer.buckets:
                        handle = collectives.gather_shards(
                            bucket.grad_data, buffer.data_parallel_group
                        )
                        if handle is not None:
                            handle.wait()
        found.update(gradient_errors(model, gradients, mine["factors"]))
        return step(*args, **kwargs)

    with replaced(schedules, "forward_step_calc_loss", seen):
        optimizer.step = at_optimizer
        try:
            with gathered_parameters(probed.trainee):
                result, _ = probed.step.influence.weighted_step(
                    probed.stock_step, probed.batches, probed.weights
                )
        finally:
            vars(optimizer).pop("step", None)
    state.restore()
    found["norm"] = float(result.grad_norm)
    found["loss"] = None
    if losses:
        group = probed.step.groups.dp
        loss = collectives.sum_over_data_parallel(torch.stack(losses).sum(), group)
        if per_token:
            count = torch.stack(tokens).sum().double()
            loss = loss / collectives.sum_over_data_parallel(count, group)
        else:
            loss = loss / group.size()
        found["loss"] = float(loss)
    return found


def gradient_errors(model, gradients, factors):
    """Returns the gradient's relative error, over all and of the worst parameter of any rank."""
    values = {
        id(p): p.main_grad.detach().clone().view(p.shape)
        for chunk in model
        for p in chunk.parameters()
    }
    for chunk in unwrap_model(model):
        for p in chunk.parameters():
            values.setdefault(id(p), p.main_grad.detach().clone().view(p.shape))
    whole = {key: torch.tensordot(factors, g, 1) for key, g in gradients.items()}
    total = sum(float(g.square().sum()) for g in whole.values()) ** 0.5
    square, worst, name = 0.0, 0.0, ""
    for key, shape, place, value in placed(model, values):
        there = whole[key]
        assert there.shape == tuple(shape), (key, there.shape, shape)
        there = there[place]
        off = float((value.double() - there).norm())
        square += off**2
        # One whose gradient is 0 but for rounding, as that of the keys' biases, is measured
        # against a thousandth of the whole.
        relative = off / max(float(there.norm()), 1e-3 * total)
        if relative > worst:
            worst, name = relative, key
    errors = torch.tensor([square**0.5 / total, worst], dtype=torch.float64)
    torch.distributed.all_reduce(errors, op=torch.distributed.ReduceOp.MAX)
    return {"gradient": errors[0].item(), "worst": errors[1].item(), "worst_here": name}


ROLES = {"reference": reference, "layout": layout}


def run(case):
    """Runs a case; returns what came out, or the traceback."""
    return stopped(case, START, ROLES[case["role"]], torch_norms())


if __name__ == "__main__":
    in_order(run)
