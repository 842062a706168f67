"""Settings that the weighting does not support under any trainer: why, and what to do."""

from __future__ import annotations

from typing import Any

from megatron_dwm.config import DWMConfig

# Flags under which weighted steps are wrong, or were never shown to be right: why, what to do.
REFUSED = {
    "sft": ("packed (thd) sequences have no per-sample loss", "train without it"),
    "dataloader_inter_document_masking": (
        "packed (thd) sequences have no per-sample loss",
        "use --reset-attention-mask, or train without it",
    ),
    "fp16": ("dynamic loss scaling is not carried through the meta-gradient", "use --bf16"),
    "use_megatron_fsdp": (
        "its parameters cannot be perturbed in place",
        "use --use-distributed-optimizer",
    ),
    "use_torch_fsdp2": (
        "its parameters cannot be perturbed in place",
        "use --use-distributed-optimizer",
    ),
    "perform_rl_step": (
        "reinforcement learning has no per-sample language-model loss",
        "use --dwm for pre-training",
    ),
    "hybrid_context_parallel": ("samples are split over ranks", "train without it"),
    "fp8_param_gather": (
        "quantised parameters cannot be perturbed in place",
        "leave it out; --bf16 parameters are gathered as they are",
    ),
    "reuse_grad_buf_for_mxfp8_param_ag": ("parameters share the gradient buffer", "leave it out"),
    "overlap_moe_expert_parallel_comm": (
        "its schedule was not shown to work with extra passes",
        "leave it out",
    ),
    "optimizer_cuda_graph": ("the optimizer's state is read between steps", "leave it out"),
    "overlap_param_gather_with_optimizer_step": (
        "parameters must be whole between the passes",
        "use --overlap-param-gather alone",
    ),
    "moe_expert_rank_capacity_factor": (
        "it wraps the schedule that the extra passes use",
        "use --moe-expert-capacity-factor",
    ),
    "te_rng_tracker": ("its random states cannot be restored between the passes", "leave it out"),
}
# The same, for runs that use a meta set.
WITHOUT_META = "leave it out, or weigh by a policy without a meta set (linupper, truncation)"
REFUSED_WITH_META_SET = {
    "fp8": ("a perturbation is far below its precision", WITHOUT_META),
    "fp4": ("a perturbation is far below its precision", WITHOUT_META),
    "mtp_detach_heads": ("gradients of the extra layers are clipped separately", WITHOUT_META),
}
# Parallel sizes that must be 1.
ONE = (
    "context_parallel_size",
    "gtp_weight_remat_size",
    "expert_gtp_weight_remat_size",
    "num_distributed_optimizer_instances",
)


def refusals() -> list[tuple[str, str, str]]:
    """Returns every flag that is refused by name, why, and what to do; docs/limits.md lists them.

    Returns:
        Flag, reason, and what to do; flags that are refused only with a meta set say so.
    """
    rows = [(_flag(name), *words) for name, words in REFUSED.items()]
    rows += [
        (f"{_flag(name)} (with a meta set)", *words)
        for name, words in REFUSED_WITH_META_SET.items()
    ]
    rows += [(f"{_flag(name)} above 1", "not supported yet", "use 1") for name in ONE]
    rows.append((_flag("non_persistent_ckpt_type"), *_NON_PERSISTENT))
    rows.append((_flag("cuda_graph_impl"), *_CUDA_GRAPH))
    return rows


_NON_PERSISTENT = (
    "the language model and the weighting would resume from different checkpoints",
    "use a shorter --save-interval, with --save-retain-interval to keep fewer",
)
_CUDA_GRAPH = ("weights change between steps, and extra passes run outside graphs", "use none")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def unsupported(config: DWMConfig, settings: Any) -> list[str]:
    """Returns one line for each setting of a run that does not work with weighted steps.

    Args:
        config: the weighting's settings.
        settings: the run's settings, as attributes named like Megatron-LM's arguments; missing ones
            are off.
    """
    found = [
        f"{_flag(name)} is not supported with --dwm: {why}; {way_out}"
        for name, (why, way_out) in REFUSED.items()
        if getattr(settings, name, None)
    ]
    if config.uses_meta_set:
        found += [
            f"{_flag(name)} is not supported with a meta set: {why}; {way_out}"
            for name, (why, way_out) in REFUSED_WITH_META_SET.items()
            if getattr(settings, name, None)
        ]
    found += [
        f"{_flag(name)} {getattr(settings, name)} is not supported with --dwm yet; use 1"
        for name in ONE
        if (getattr(settings, name, 1) or 1) > 1
    ]
    for name, none, (why, way_out) in (
        ("non_persistent_ckpt_type", (None,), _NON_PERSISTENT),
        ("cuda_graph_impl", (None, "none"), _CUDA_GRAPH),
    ):
        value = getattr(settings, name, None)
        if value not in none:
            found.append(f"{_flag(name)} {value} is not supported with --dwm: {why}; {way_out}")
    return found
