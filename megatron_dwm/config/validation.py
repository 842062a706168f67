"""Finds settings that cannot work: for each, one line that names the flag and what to do."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from megatron_dwm.config.choices import (
    DRAWS,
    ESTIMATORS,
    FORMS,
    GATES,
    JACOBIANS,
    LOOKAHEADS,
    MAPS,
    MTPS,
    OF_POLICY,
    ORDERS,
    PACINGS,
    POOLINGS,
    READ_BY,
    RULES,
    SAMPLINGS,
    SCHEDULES,
    TEACHERS,
    flag,
)
from megatron_dwm.config.policy_table import policy_needs
from megatron_dwm.errors import DWMError

if TYPE_CHECKING:
    from megatron_dwm.config.schema import DWMConfig

_INIT = re.compile(r"random|llm:[1-9]\d*|hf:.+")


def problems(config: DWMConfig) -> list[str]:
    """Returns one line for each setting that cannot work, independent of the LLM."""
    config = config.with_defaults()
    if config.form not in FORMS:
        return [_not_allowed("form", config.form, FORMS)]
    try:
        policy_needs(config.policies)
    except DWMError as error:
        # The other settings are still checked.
        return [str(error), *_problems(dataclasses.replace(config, policy="learned"))]
    return _problems(config)


def _problems(config: DWMConfig) -> list[str]:
    found = _form_problems(config)
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{flag(spec.name)} is {value}; it must be a finite number")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            found.append(f"{flag(name)} is {getattr(config, name)}; it must lie in [0, 1)")
    for name, allowed in (
        ("rule", RULES),
        ("map", MAPS),
        ("gate", GATES),
        ("teacher", TEACHERS),
        ("schedule", SCHEDULES),
        ("estimator", ESTIMATORS),
        ("lookahead", LOOKAHEADS),
        ("jacobian", JACOBIANS),
        ("mtp", MTPS),
        ("pooling", POOLINGS),
        ("sampling", SAMPLINGS),
        ("sampling_draws", DRAWS),
        ("curriculum_pacing", PACINGS),
        ("curriculum_order", ORDERS),
    ):
        value = getattr(config, name)
        if value not in allowed:
            found.append(_not_allowed(name, value, allowed))
    if not _INIT.fullmatch(config.init):
        found.append(f"{flag('init')} is '{config.init}'; allowed are random, llm:K and hf:DIR")
    positive = ("stages", "meta_interval", "num_layers", "hidden_size", "num_attention_heads")
    above = ("temperature", "slope", "head_lr", "max_bad_steps", "loss_temperature")
    for name in (*positive, *above):
        value = getattr(config, name)
        if value is not None and value <= 0:
            found.append(f"{flag(name)} is {value}; it must be above 0")
    if config.meta_dense_steps is not None and config.meta_dense_steps < 0:
        found.append(
            f"{flag('meta_dense_steps')} is {config.meta_dense_steps}; it must not be negative"
        )
    not_negative = ("warmup_steps", "backbone_lr", "weight_decay", "clip_grad", "seed")
    for name in (*not_negative, "ridge", "replay", "replay_steps", "log_expert_load"):
        if (getattr(config, name) or 0) < 0:
            found.append(f"{flag(name)} is {getattr(config, name)}; it must not be negative")
    for name in (
        "stage_meta_steps",
        "meta_batch_size",
        "ffn_hidden_size",
        "num_query_groups",
        "overhead_budget",
        "verify_meta_gradient",
        "sampling_max_repeats",
    ):
        value = getattr(config, name)
        if value is not None and value <= 0:
            found.append(f"{flag(name)} is {value}; it must be above 0")
    if config.fd_relative_step is not None and not 0 < config.fd_relative_step < 1:
        found.append(f"{flag('fd_relative_step')} is {config.fd_relative_step}; use (0, 1)")
    if config.verify_samples < 3:
        found.append(
            f"{flag('verify_samples')} is {config.verify_samples}; a correlation needs 3 or more"
        )
    for name in ("verify_meta_gradient", "overhead_budget"):
        if getattr(config, name) is not None and not config.trains:
            found.append(
                f"{flag(name)} is about meta steps, but --dwm-policy {config.policy} with "
                f"--dwm-schedule {config.schedule} takes no meta steps; leave it out"
            )
    if not 0 <= config.verify_correlation < 1:
        found.append(f"{flag('verify_correlation')} is {config.verify_correlation}; use [0, 1)")
    if config.lookahead == "current" and config.estimator == "finite_difference":
        found.append(
            "--dwm-lookahead current needs --dwm-estimator ghost: its gain is to get the influence "
            "from the training pass, which finite_difference cannot do"
        )
    if not 0 < config.forgetting <= 1:
        found.append(f"{flag('forgetting')} is {config.forgetting}; use (0, 1]")
    for name in ("curriculum_start", "curriculum_share"):
        if not 0 < getattr(config, name) <= 1:
            found.append(f"{flag(name)} is {getattr(config, name)}; use (0, 1]")
    found += _sampling_problems(config)
    found += _guard_problems(config)
    if config.schedule == "frozen" and config.learned and not config.load:
        found.append("--dwm-schedule frozen needs --dwm-load DIR, the weights to be used")
    if config.schedule == "frozen" and config.needs.influence and not config.learned:
        found.append(
            f"--dwm-schedule frozen: --dwm-policy {config.policy} uses nothing that another run "
            "has learned, and would learn nothing; leave it out"
        )
    if config.load and config.learned and "domains" in config.parts:
        found.append(
            f"--dwm-load {config.load}: what --dwm-policy domains learns holds only for its own "
            "run's data sets; load the learned policy alone"
        )
    return found


def _form_problems(config: DWMConfig) -> list[str]:
    """Returns one line for each setting that another form, rule or map would need."""
    default, found = type(config)(), _unread_problems(config)
    if config.form == "head" and config.learned:
        if config.rule == "chain":
            found.append(
                "--dwm-rule chain is the rule of a separate model, but --dwm-form is head; "
                "add --dwm-form model, or leave it out"
            )
    for part in config.policies.split("+") if config.map == "softmax" else []:
        needs = policy_needs(config.form if part == "shuffled" else part)
        if needs.map and not needs.whole_batch:
            what = f"--dwm-policy {part}"
            if config.learned and part in (config.form, "shuffled"):
                what = f"--dwm-form {config.form}"
            found.append(
                "--dwm-map softmax needs the scores of the whole batch before the step, but "
                f"{what} computes them inside it; use sigmoid, or --dwm-form model"
            )
    others = {"slope": "sigmoid", "temperature": "softmax"}
    for name, wanted in others.items():
        given = getattr(config, name) != getattr(default, name)
        if given and config.needs.map and config.map != wanted:
            found.append(
                f"{flag(name)} is about --dwm-map {wanted}, but the map is {config.map}; leave "
                f"it out, or add --dwm-map {wanted}"
            )
    for part in config.parts:
        if part in FORMS and config.form != part:
            found.append(f"--dwm-policy {part} contradicts --dwm-form {config.form}")
    return found + _combination_problems(config)


def _combination_problems(config: DWMConfig) -> list[str]:
    """Returns one line for each reason why policies cannot work together."""
    parts, found = config.parts, []
    if len(parts) == 1:
        return []
    for part in dict.fromkeys(parts):
        if parts.count(part) > 1:
            found.append(f"--dwm-policy {config.policy} names {part} twice; leave one out")
        if part in ("uniform", "shuffled"):
            found.append(f"--dwm-policy {config.policy}: {part} is a control and works alone")
    if sum(part in ("learned", *FORMS) for part in parts) > 1:
        found.append(f"--dwm-policy {config.policy} names two learned policies; leave one out")
    if config.rule == "chain" and config.learned:
        found.append(
            f"--dwm-policy {config.policy}: --dwm-rule chain differentiates through the learned "
            "policy's weights alone; take --dwm-rule regression, or that policy alone"
        )
    return found


def _learns(config: DWMConfig) -> bool:
    """Whether anything reads settings about learning: the learned policy, or a user's own."""
    own = any(":" in part for part in config.parts)
    return config.learned or (own and config.needs.influence)


def _unread_problems(config: DWMConfig) -> list[str]:
    """Returns one line for each kind of setting that was given but that nothing reads."""
    # If map and gate are not given, they follow from form and rule.
    usual = vars(type(config)(form=config.form, rule=config.rule).with_defaults())
    usual = {**usual, "form": "head", "rule": "regression"}
    needs, found = config.needs, []
    for need, (about, way_out, names) in READ_BY.items():
        given = [name for name in names if getattr(config, name) != usual[name]]
        if not given or (_learns(config) if need == "learned" else getattr(needs, need)):
            continue
        which = f"--dwm-policy is {config.policy}"
        if config.learned:
            which, way_out = f"--dwm-form is {config.form}", "add --dwm-form model"
        flags = ", ".join(f"{flag(name)} {getattr(config, name)}" for name in given)
        found.append(f"{flags}: about {about}, but {which}; {way_out}, or leave it out")
    for policy, names in OF_POLICY.items():
        given = [name for name in names if getattr(config, name) != usual[name]]
        if given and policy not in config.parts:
            flags = ", ".join(f"{flag(name)} {getattr(config, name)}" for name in given)
            found.append(
                f"{flags}: about --dwm-policy {policy}, but it is {config.policy}; add it, as in "
                f"{config.policy}+{policy}, or leave it out"
            )
    return found


def _sampling_problems(config: DWMConfig) -> list[str]:
    found = []
    for name in ("sampling_draws", "sampling_max_repeats"):
        given = getattr(config, name) != getattr(type(config)(), name)
        if given and config.sampling != "weights":
            found.append(
                f"{flag(name)} is about drawn documents; add --dwm-sampling weights, or leave "
                "it out"
            )
    for name in config.needs.documents:
        if config.sampling == "weights" and getattr(config, name) == "weights":
            found.append(
                f"{flag(name)} is weights, by which --dwm-sampling weights draws already; name "
                "another file, or take one of them"
            )
    return found


def _guard_problems(config: DWMConfig) -> list[str]:
    found = []
    if not 0 <= config.uniform_mix < 1:
        found.append(f"{flag('uniform_mix')} is {config.uniform_mix}; use [0, 1)")
    if config.max_weight is not None and not config.max_weight > 1:
        found.append(
            f"{flag('max_weight')} is {config.max_weight}; it must be above 1, the mean weight"
        )
    floor = config.min_effective_samples
    if floor is not None and not 0 < floor < 1:
        found.append(f"{flag('min_effective_samples')} is {floor}; use (0, 1)")
    return found


def head_dim_problems(config: DWMConfig, tensor_parallel_size: int) -> list[str]:
    """Returns one line for each size of the DWM that is not divisible as needed.

    Args:
        config: all settings.
        tensor_parallel_size: the LLM's tensor-parallel size, which the DWM shares.
    """
    found: list[str] = []
    heads = config.num_attention_heads
    groups = config.num_query_groups or heads
    if min(heads, groups, config.hidden_size, config.resolved_ffn_hidden_size) <= 0:
        return found  # already among problems()
    if config.hidden_size % heads:
        found.append(
            f"--dwm-hidden-size {config.hidden_size} is not divisible by "
            f"--dwm-num-attention-heads {heads}"
        )
    elif (config.hidden_size // heads) % 2:
        found.append(
            f"--dwm-hidden-size {config.hidden_size} / --dwm-num-attention-heads {heads} is "
            f"odd; rotary embeddings need an even head size"
        )
    if heads % groups:
        found.append(
            f"--dwm-num-attention-heads {heads} is not divisible by --dwm-num-query-groups {groups}"
        )
    for name, value in (
        ("hidden-size", config.hidden_size),
        ("num-attention-heads", heads),
        ("num-query-groups", groups),
        ("ffn-hidden-size", config.resolved_ffn_hidden_size),
    ):
        if value % tensor_parallel_size:
            found.append(
                f"--dwm-{name} {value} is not divisible by "
                f"--tensor-model-parallel-size {tensor_parallel_size}"
            )
    return found


def _not_allowed(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    return f"{flag(name)} is '{value}'; allowed are {', '.join(allowed)}"


def raise_all(problems: list[str]) -> None:
    """Raises one `DWMError` that lists every problem, if there is any."""
    if problems:
        raise DWMError("; ".join(problems))
