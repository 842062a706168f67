"""Allowed values of settings, what each setting belongs to, and the name of its flag."""

from __future__ import annotations

FORMS = ("head", "model")
RULES = ("regression", "chain")
MAPS = ("sigmoid", "softmax")
GATES = ("on", "off")
TEACHERS = ("head", "none")
# Settings that only the form `model` has.
MODEL_ONLY = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "pooling",
    "init",
    "head_lr",
    "backbone_lr",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "clip_grad",
    "replay",
    "replay_steps",
    "teacher",
)
# Settings that only some policies read. For each field of `Needs` that such a policy sets: what the
# settings are about, and what to do instead of leaving them out. `learned`: the learned policy, or
# a control derived from it.
READ_BY: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "model": ("the separate model", "take --dwm-policy model", MODEL_ONLY),
    "map": (
        "the map from scores to weights",
        "take a policy that has one",
        ("map", "slope", "temperature", "min_effective_samples", "uniform_mix", "max_weight"),
    ),
    "influence": (
        "what is learned from influence",
        "take --dwm-policy learned",
        ("gate", "forgetting"),
    ),
    "learned": (
        "the learned policy",
        "take --dwm-policy learned",
        ("form", "rule", "ridge", "load"),
    ),
    "loss_shape": (
        "the shape of a sample's loss",
        "take --dwm-policy linupper, quadratic or extremes",
        ("loss_temperature",),
    ),
}
# Settings of one policy.
OF_POLICY = {
    "static": ("static_weights",),
    "curriculum": (
        "curriculum_by",
        "curriculum_order",
        "curriculum_pacing",
        "curriculum_start",
        "curriculum_share",
    ),
    "rho": ("reference_losses",),
}
# Settings that name a number of each document, of which only the rank among all documents is used.
RANKED = ("curriculum_by",)
PACINGS = ("linear", "root", "step")
ORDERS = ("ascending", "descending")
SCHEDULES = ("staged", "joint", "frozen")
ESTIMATORS = ("auto", "ghost", "finite_difference")
LOOKAHEADS = ("auto", "next", "current")
JACOBIANS = ("exact", "identity")
MTPS = ("weighted", "plain")
POOLINGS = ("last", "mean")
SAMPLINGS = ("stock", "weights")
DRAWS = ("systematic", "independent")


def flag(name: str) -> str:
    """Returns the command-line flag of a field: `meta_batch_size` -> `--dwm-meta-batch-size`."""
    return "--dwm" if name == "enabled" else "--dwm-" + name.replace("_", "-")


def attribute_name(name: str) -> str:
    """Returns the attribute of the parsed arguments that holds a field."""
    return "dwm" if name == "enabled" else "dwm_" + name
