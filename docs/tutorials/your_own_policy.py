"""# Write your own policy

A policy is a class that declares what it needs, gives each micro-batch its weights, and may learn
from the samples' influence. This one asks a question: do samples of high loss help or harm?
Policies that weigh by the loss answer it in advance (`linupper` prefers hard samples, `truncation`
avoids them). This one finds out.
"""

# %% [markdown]
# ## 1. The policy
#
# The step calls a policy in this order: `begin`, then `weights` inside the forward step of each
# micro-batch, then `observe` on meta steps, then `end`. Two rules make the result independent of
# the parallel layout:
#
# - The state that `weights` reads changes only in `observe` or `end`. A weight depends only on its
#   own sample and on past steps.
# - Sums over samples are taken over all data-parallel ranks, with `self.context.topology`.
#
# The mean weight must be one in expectation. Here a running mean of the unnormalised weights
# ensures that.
#
# `influence` is $c_i$ divided by the learning rate, for all $N$ samples of the global batch. It is
# negative where more weight would lower the meta loss. Only ranks that see losses (the last
# pipeline stage) have it.

# %%
POLICY = '''
import torch

from megatron_dwm.policies.base import Lesson, Needs, WeightPolicy


class ByLoss(WeightPolicy):
    """w = (1 + tanh(slope z)) / normaliser, z the standardised loss, the slope learned."""

    needs = Needs(losses=True, influence=True)

    def __init__(self, context):
        super().__init__(context)
        # mean and mean square of the losses, normaliser, slope, steps seen
        self.state = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
        self.state = self.state.to(context.device)
        self.losses = {}

    def begin(self, step):
        self.losses.clear()

    def standard(self, losses):
        mean, square = self.state[0], self.state[1]
        return (losses - mean) / (square - mean**2).clamp(min=1e-6).sqrt()

    def raw(self, losses):
        return 1 + torch.tanh(self.state[3] * self.standard(losses))

    def weights(self, view):
        tokens = view.mask.sum(1).clamp(min=1e-20)
        losses = (view.losses.double() * view.mask).sum(1) / tokens
        self.losses[view.index] = losses
        weights = self.raw(losses) / self.state[2]
        known = torch.isfinite(losses) & (self.state[4] > 0)
        return torch.where(known, weights, 1.0).float()

    def observe(self, step, influence):
        if not self.context.sees_losses or self.state[4] < 1:
            return Lesson()
        losses = self.context.topology.gather_samples(self.local())
        z, useful = self.standard(losses).nan_to_num(0.0), -influence.double()
        useful = (useful - useful.mean()) / useful.std().clamp(min=1e-12)
        self.state[3] += 0.1 * (2 * (z * useful).mean() - self.state[3])
        return Lesson(updated=True)

    def end(self, step):
        if self.context.sees_losses:
            losses = self.local()
            losses = losses[torch.isfinite(losses)]
            one = torch.ones_like(losses)
            sums = torch.stack([one, losses, losses**2, self.raw(losses)]).sum(1)
            sums = self.context.topology.sum_over_samples(sums)
            new = 1 / (self.state[4] + 1).clamp(max=20)
            self.state[:3] += new * (sums[1:] / sums[0].clamp(min=1) - self.state[:3])
            self.state[4] += 1
        return []

    def local(self):
        return torch.cat([self.losses[k] for k in sorted(self.losses)])

    def figures(self):
        return {"slope": self.state[3]}

    def description(self):
        return {"form": "by_loss"}

    def state_dict(self):
        return {"state": self.state.cpu()}

    def load_state_dict(self, saved):
        self.state = saved["state"].to(self.state.device)
'''
with open("own_policy.py", "w") as file:
    file.write(POLICY)

# %% [markdown]
# `figures` go to the log. `state_dict` goes into the trainer's checkpoint, and `description` must
# agree with that of a saved state, so that a resumed run with another policy is refused.
#
# ## 2. Train with it
#
# `--dwm-policy MODULE:CLASS`, with the file's folder on `PYTHONPATH`. The data are half good text,
# half noise: the same words in a random order. Noise keeps a high loss to the end, because there is
# little to learn in it.

# %%
import sys

from _toy import data_sets, log_of, print_weights, train

sys.path.insert(0, ".")  # as PYTHONPATH=. in a shell
good, noise, meta, _ = data_sets()  # those of the first tutorial
data = f"--train-data-path 0.5 {good} 0.5 {noise} --train-iters 100 --eval-iters 0"

policy = f"--dwm-policy own_policy:ByLoss --dwm-meta-data-path {meta} --dwm-meta-batch-size 32"
train("own", f"{data} --save own --dwm {policy}")
lines = log_of("own")
print_weights(lines, "slope")

# %% [markdown]
# The slope is negative: here, high loss harms. Before you trust your own policy, add it to `CASES`
# in `tests/contract/test_policy_contract.py`, as this one is. The tests there check that weights
# are finite, have mean one and do not depend on what else is in the micro-batch, and that a saved
# state is complete. `megatron_dwm/policies/` has the built-in policies, which are short; the API is
# in the [reference](../reference/api.md#megatron_dwm.policies.base.WeightPolicy).

# %%
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot([line["iteration"] for line in lines], [line["slope"] for line in lines])
left.axhline(0, color="gray", linewidth=0.5)
left.set(xlabel="step", ylabel="slope", title="what the policy has learned")
for domain in sorted(lines[-1]["domain_weight"]):
    seen = [line for line in lines if domain in line["domain_weight"]]
    steps = [line["iteration"] for line in seen]
    right.plot(steps, [line["domain_weight"][domain] for line in seen], label=domain)
right.set(xlabel="step", ylabel="mean weight", title="what that comes to")
right.legend()
figure.savefig("your_own_policy.png", dpi=110)
