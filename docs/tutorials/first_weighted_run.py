"""# A first weighted run

From text to a weighted run of Megatron's own trainer, in four commands. Half of the text is spoiled
on purpose, so that there is something to find.

The script runs on a laptop in well under a minute: `python docs/tutorials/first_weighted_run.py`.
It calls the commands from Python, with `command(...)` for `megatron-dwm ...`; in a shell you type
them. Only the text is made up here; everything else is what you would do with your own.
"""

# %% [markdown]
# ## 1. Text and tokenizer
#
# `good.jsonl` is in a made-up language in which each word is followed by one of two others. Below,
# the noise is such text with the words of each document shuffled: to a language model that is
# misinformation about what follows what.

# %%
from _toy import command, data_set, log_of, print_weights, text, train, validation_losses, write

write("good.jsonl", text(200, seed=1))
command("tokenizer --input good.jsonl --out tokenizer --vocab-size 300")

# %% [markdown]
# ## 2. Megatron data sets
#
# `megatron-dwm preprocess` makes `NAME_text_document.bin` and `.idx`, the files that every Megatron
# script reads. Two things are held out from the training data: the **meta set**, which the weights
# should serve, and the **validation set**, which tells whether they did. They must be different
# documents: data that the weights are tuned on cannot evaluate them, and the same data in both is
# refused.

# %%
good = data_set("good", text(200, seed=1))
noise = data_set("noise", text(200, seed=2, shuffled=True))
meta = data_set("meta", text(100, seed=3))
valid = data_set("valid", text(60, seed=4))

# %% [markdown]
# ## 3. Two runs
#
# `train(NAME, FLAGS)` is `megatron-dwm train examples/pretrain_dwm.py MODEL FLAGS`. The model is a
# tiny Llama, and both runs read the same samples in the same order. The second one saves its log,
# and has three more flags: `--dwm`, the meta set, and how much of it a meta step reads.

# %%
data = f"--train-data-path 0.5 {good} 0.5 {noise} --valid-data-path {valid}"
train("stock", f"{data} --train-iters 100")
weighted = f"--save weighted --dwm --dwm-meta-data-path {meta} --dwm-meta-batch-size 32"
train("weighted", f"{data} --train-iters 100 {weighted}")

# %% [markdown]
# ## 4. The result
#
# The step log `dwm_log.jsonl` has one line per step. Weights start at 1: the **gate** opens only
# once the head's scores have proved that they predict which samples help, and weights also wait
# until the scores of all samples no longer move together (`steadiness`). Then the noise loses its
# weight, and the loss on good text falls faster. See [Read the log](../reading_the_log.md) for all
# metrics.

# %%
lines = log_of("weighted")
print_weights(lines, "gate")
for name in ("stock", "weighted"):
    print(f"{name:8s} validation loss {validation_losses(name)[1][-1]:.3f}")

# %% [markdown]
# On the left the loss on held-out good text; on the right the mean weight of each data set's
# samples. One run of a toy model shows how the parts fit together. How much there is to gain on
# text that nobody has spoiled is another question: see [Results](../results.md).

# %%
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name in ("stock", "weighted"):
    left.plot(*validation_losses(name), marker="o", label=name)
left.set(xlabel="step", ylabel="validation loss")
left.legend()
for name in sorted(lines[-1]["domain_weight"]):
    seen = [line for line in lines if name in line["domain_weight"]]
    steps = [line["iteration"] for line in seen]
    right.plot(steps, [line["domain_weight"][name] for line in seen], label=name)
right.plot([line["iteration"] for line in lines], [line["gate"] for line in lines], "k:")
right.set(xlabel="step", ylabel="mean weight (dotted: gate)")
right.legend()
figure.savefig("first_weighted_run.png", dpi=110)
