"""# Learn small, apply large

A small run learns what the data are worth. A larger one draws the documents that the small run
preferred, at the cost of stock training. The guide [Learn small, apply
large](../learn_small_apply_large.md) has two more ways, frozen weights and a classifier, and says
which to use when.

The text is that of [A first weighted run](first_weighted_run.py): half good, half noise.
"""

# %% [markdown]
# ## 1. The small run learns
# One more flag than in a weighted run: `--dwm-document-weights` records the mean weight of every
# document that was read, in the `--save` folder.

# %%
from _toy import command, data_sets, log_of, train, validation_losses

good, noise, meta, valid = data_sets()  # those of the first tutorial

held_out = f"--valid-data-path {valid}"
data = f"--train-data-path 0.5 {good} 0.5 {noise} {held_out}"
weighted = f"--dwm --dwm-meta-data-path {meta} --dwm-meta-batch-size 32"
train("small", f"{data} --train-iters 120 --save small {weighted} --dwm-document-weights")
weights = log_of("small")[-1]["domain_weight"]
print("last mean weights:", {name: round(w, 2) for name, w in sorted(weights.items())})

# %% [markdown]
# ## 2. Its weights become weight files and a blend
#
# `weights from-run` writes `PREFIX.weights` beside each data set, with one number per document, and
# the shares of the data sets, in the form of `--data-path` or in a file for `--data-args-path`.

# %%
command("weights from-run small --blend blend.txt")
with open("blend.txt") as file:
    blend = file.read().strip()
print(blend)

# %% [markdown]
# ## 3. Two large runs
# One more layer, otherwise the same flags. The first one is stock training. The second one is stock
# training too, on documents drawn by weight.

# %%
large = f"--train-iters 60 --num-layers 3 {held_out}"
half = f"--train-data-path 0.5 {good} 0.5 {noise}"
train("large stock", f"{large} {half}")
drawn = f"--train-data-path {blend} --dwm --dwm-policy uniform --dwm-sampling weights"
train("large drawn", f"{large} {drawn}")
for name in ("large stock", "large drawn"):
    print(f"{name:12s} validation loss {validation_losses(name)[1][-1]:.3f}")

# %% [markdown]
# A noise document that is not drawn makes room for a good one, while one with a low weight is still
# read: drawing can gain more than weighting. With real text the difference between documents is
# smaller, and reading the same good documents more often has a cost; `--dwm-sampling-max-repeats`
# limits it.

# %%
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
lines = log_of("small")
for name in sorted(weights):
    seen = [line for line in lines if name in line["domain_weight"]]
    steps = [line["iteration"] for line in seen]
    left.plot(steps, [line["domain_weight"][name] for line in seen], label=name)
left.set(xlabel="step", ylabel="mean weight", title="the small run")
left.legend()
for name in ("large stock", "large drawn"):
    right.plot(*validation_losses(name), marker="o", label=name)
right.set(xlabel="step", ylabel="validation loss", title="the large runs")
right.legend()
figure.savefig("learn_small_apply_large.png", dpi=110)
