"""Checks a run's arguments and data before the weighting model is attached."""

from __future__ import annotations

import math
import os
from typing import Any

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_dwm.config.choices import flag
from megatron_dwm.config.schema import DWMConfig
from megatron_dwm.config.validation import head_dim_problems, raise_all
from megatron_dwm.data.index import DatasetError, read_index
from megatron_dwm.data.meta_dataset import default_meta_batch_size, meta_batch_unit
from megatron_dwm.data.weight_file import read_weights, weights_path
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts.blend import blend_of
from megatron_dwm.hosts.megatron_lm.document_numbers import check_documents
from megatron_dwm.hosts.unsupported import REFUSED, refusals, unsupported

__all__ = [
    "REFUSED",
    "argument_problems",
    "blend_of",
    "check_arguments",
    "check_data",
    "default_meta_batch",
    "final_batch",
    "refusals",
    "training_prefixes",
]


def check_arguments(config: DWMConfig, args: Any) -> None:
    """Refuses settings that cannot work, listing all problems in one line.

    Args:
        config: the settings, before the DWM's sizes are taken from the LLM.
        args: Megatron's parsed and validated arguments.

    Raises:
        DWMError: lists every problem with its flag.
    """
    raise_all(argument_problems(config, args))


def argument_problems(config: DWMConfig, args: Any) -> list[str]:
    """Returns one line for each problem of the arguments, with its flag.

    Args:
        config: the settings, before the DWM's sizes are taken from the LLM.
        args: Megatron's parsed and validated arguments.
    """
    problems = [*config.problems(), *_share_problems(args)]
    if args.sft and not config.scores:
        problems.append(f"--sft is not supported with --dwm: {REFUSED['sft'][0]}")
    if config.scores:
        problems += unsupported(config, args)
    asking = [*config.needs.documents, *(["document_weights"] if config.document_weights else [])]
    if asking and args.mock_data:
        names = " and ".join(flag(name) for name in asking)
        problems.append(f"--mock-data has no documents, which {names} is about; give data")
    if config.document_weights and not args.save:
        problems.append("--dwm-document-weights keeps them in the folder of --save; give one")
    if config.document_weights and args.ckpt_format != "torch_dist":
        problems.append(
            f"--dwm-document-weights is kept with --ckpt-format torch_dist, not {args.ckpt_format}"
        )
    if config.has_model:
        if config.init == "random":
            problems += head_dim_problems(config, args.tensor_model_parallel_size)
        problems += _init_problems(config, args)
    if config.uses_meta_set:
        problems += _meta_problems(config, args)
    if args.save and args.ckpt_format != "torch_dist" and config.scores:
        problems.append(
            f"--ckpt-format {args.ckpt_format} cannot hold the weighting model; use torch_dist"
        )
    if config.sampling == "weights":
        problems += _sampling_problems(args)
    return problems


def _sampling_problems(args: Any) -> list[str]:
    refused = {
        "mock_data": "mock data has no documents",
        "dataloader_fast_cache_load": "it expects Megatron's own index cache",
        "dataloader_defer_npy_index_mmap": "it expects Megatron's own index cache",
        "phase_transition_iterations": "it restarts the data in the middle of the run",
    }
    found = [
        f"--{name.replace('_', '-')} is not supported with --dwm-sampling weights: {why}"
        for name, why in refused.items()
        if getattr(args, name, None)
    ]
    if args.dataloader_type != "single":
        found.append(
            f"--dataloader-type {args.dataloader_type} has an order of its own; "
            "--dwm-sampling weights needs single"
        )
    blend, per_split = get_blend_and_blend_per_split(args)
    training = blend if blend is not None else (per_split or [None])[0]
    if training is not None and training[1] is None and len(training[0]) > 1:
        found.append(
            "--dwm-sampling weights needs a share before each of several training data sets (as in "
            "--data-path 0.7 A 0.3 B): without shares, Megatron blends them by their numbers of "
            "samples, which depend on the weights"
        )
    if args.save and args.ckpt_format != "torch_dist":
        found.append(
            f"--ckpt-format {args.ckpt_format} cannot hold which documents were drawn; use "
            "torch_dist"
        )
    return found


def _share_problems(args: Any) -> list[str]:
    """Returns one line for each invalid share of a blend, and for an empty part of a split."""
    found = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = getattr(args, name, None)
        if not words or len(words) == 1 or len(words) % 2:
            continue
        for word, prefix in zip(words[::2], words[1::2], strict=True):
            share = _number(word)
            if share is not None and not (share > 0 and math.isfinite(share)):
                found.append(
                    f"--{name.replace('_', '-')}: the share of {prefix} is {word}; it must be "
                    "above 0 and finite: give one, or leave the data set out"
                )
    split, evaluates = getattr(args, "split", None), args.eval_iters and args.eval_iters > 0
    shares = [_number(word) for word in split.split(",")] if split else []
    if evaluates and getattr(args, "data_path", None) and len(shares) > 1 and shares[1] == 0:
        found.append(
            f"--split {split} leaves nothing to validate on, but --eval-iters is "
            f"{args.eval_iters}; give the second number a share, or --eval-iters 0"
        )
    return found


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _init_problems(config: DWMConfig, args: Any) -> list[str]:
    if config.init.startswith("llm:"):
        layers = int(config.init[4:])
        found = []
        if layers > args.num_layers:
            found.append(
                f"--dwm-init {config.init} asks for {layers} layers, but the LLM has "
                f"--num-layers {args.num_layers}"
            )
        if args.num_experts:
            found.append(
                f"--dwm-init {config.init} copies dense layers, but the LLM has --num-experts "
                f"{args.num_experts}; use random or hf:DIR"
            )
        if args.position_embedding_type not in ("rope", "learned_absolute", "none"):
            found.append(
                f"--dwm-init {config.init} does not support --position-embedding-type "
                f"{args.position_embedding_type}; use random or hf:DIR"
            )
        for name in ("no_rope_freq", "spec", "heterogeneous_layers_config_path"):
            if getattr(args, name, None):
                found.append(
                    f"--dwm-init {config.init} does not support --{name.replace('_', '-')}; use "
                    "random or hf:DIR"
                )
        if args.multi_latent_attention:
            found.append(f"--dwm-init {config.init} does not support --multi-latent-attention")
        return found
    if config.init.startswith("hf:") and not os.path.isdir(config.init[3:]):
        return [f"--dwm-init {config.init}: folder '{config.init[3:]}' does not exist"]
    return []


def _meta_problems(config: DWMConfig, args: Any) -> list[str]:
    found = []
    if config.verify_meta_gradient and getattr(args, "moe_routing_trace_path", None):
        found.append(
            "--dwm-verify-meta-gradient takes steps and undoes them, which "
            "--moe-routing-trace-path would record; leave one of them out"
        )
    if not config.meta_data_path and not args.mock_data:
        found.append(
            "--dwm-meta-data-path is missing: name the meta set's data set prefix(es), or use "
            "--dwm-policy uniform or --dwm-schedule frozen"
        )
    unit = _meta_batch_unit(args)
    if config.meta_batch_size is not None and config.meta_batch_size % unit:
        factors = "micro-batch-size x data-parallel size"
        if args.virtual_pipeline_model_parallel_size is not None:
            factors += " x pipeline stages (virtual pipeline)"
        found.append(
            f"--dwm-meta-batch-size {config.meta_batch_size} is not a multiple of {unit} "
            f"({factors})"
        )
    return found


def _meta_batch_unit(args: Any) -> int:
    """Returns the number that the meta batch must be a multiple of, for the trainer's schedule."""
    sizes = args.micro_batch_size, args.data_parallel_size
    if args.virtual_pipeline_model_parallel_size is None:
        return meta_batch_unit(*sizes)
    stages = args.pipeline_model_parallel_size
    return meta_batch_unit(*sizes, stages, args.microbatch_group_size_per_vp_stage)


def default_meta_batch(args: Any) -> int:
    """Returns the default size of the meta batch."""
    return default_meta_batch_size(final_batch(args), _meta_batch_unit(args))


def final_batch(args: Any) -> int:
    """Returns the samples per step (with `--step-batch-size-schedule`, at the end of the run)."""
    schedule = getattr(args, "step_batch_size_schedule", None)
    if not schedule:
        return int(args.global_batch_size)
    # The trainer's own size is then that of one micro-batch; "0:768 250B:1536" ends at 1536.
    sizes = args.micro_batch_size, args.data_parallel_size
    return StepBatchsizeNumMicroBatchesCalculator(*sizes, False, 1, schedule).global_batch_size


def training_prefixes(args: Any) -> list[str]:
    """Returns the prefixes of the training blend, in the order of the loader's `dataset_id`."""
    blend, per_split = get_blend_and_blend_per_split(args)
    if blend is None and per_split is not None:
        blend = per_split[0]
    return [] if blend is None else list(blend[0])


def validation_prefixes(args: Any) -> list[str]:
    """Returns the prefixes from which the reported validation loss comes."""
    blend, per_split = get_blend_and_blend_per_split(args)
    if args.eval_iters == 0 and not args.full_validation:
        return []
    if per_split is not None:
        return [] if per_split[1] is None else list(per_split[1][0])
    if blend is None:
        return []
    shares = [float(share) for share in (args.split or "969,30,1").split(",")]
    return list(blend[0]) if len(shares) > 1 and shares[1] > 0 else []


def check_data(config: DWMConfig, args: Any) -> None:
    """Opens every index of the run, and refuses a meta set that is the validation set.

    Raises:
        DWMError: names the file, or the data set that is in both.
    """
    meta = (
        blend_of(config.meta_data_path, "--dwm-meta-data-path")[0] if config.uses_meta_set else []
    )
    validation = validation_prefixes(args)
    summaries = {}
    for prefix in dict.fromkeys([*training_prefixes(args), *validation, *meta]):
        try:
            summaries[prefix] = read_index(prefix)
        except DatasetError as error:
            raise DWMError(str(error)) from None
    if config.sampling == "weights":
        check_weights(training_prefixes(args), summaries)
    check_documents(config, training_prefixes(args), summaries)
    for prefix in meta:
        if summaries[prefix].tokens < args.seq_length + 1:
            raise DWMError(
                f"--dwm-meta-data-path {prefix} holds {summaries[prefix].tokens} tokens, fewer "
                f"than one sample of --seq-length {args.seq_length} + 1; give a larger meta set",
            )
        for other in validation:
            if _same_data(prefix, other):
                raise DWMError(
                    f"--dwm-meta-data-path {prefix} is also the reported validation data "
                    f"({other}); data that the weights are tuned on cannot evaluate them. Split "
                    "the held-out documents into two data sets",
                )


def check_weights(prefixes: list[str], indices: dict[str, Any]) -> None:
    """Opens the weight file of every training data set.

    Args:
        prefixes: prefixes of the training data sets.
        indices: what `read_index` returned for each.

    Raises:
        DWMError: a data set has no weight file, or it is damaged or belongs to another data set.
    """
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise DWMError(
                f"--dwm-sampling weights: the training data names {prefix} more than once; name "
                "it once, with the sum of its shares"
            )
        if not os.path.exists(weights_path(prefix)):
            raise DWMError(
                f"--dwm-sampling weights: {weights_path(prefix)}: no such file; make it with "
                f"megatron-dwm weights make {prefix} ..., or with megatron-dwm score"
            )
        try:
            read_weights(weights_path(prefix), indices[prefix])
        except DatasetError as error:
            raise DWMError(str(error)) from None


def _same_data(a: str, b: str) -> bool:
    """Returns whether two prefixes name the same tokens, including copies and links."""
    files = [f"{prefix}.bin" for prefix in (a, b)]
    if os.path.samefile(*files):
        return True
    if os.path.getsize(files[0]) != os.path.getsize(files[1]):
        return False
    with open(files[0], "rb") as first, open(files[1], "rb") as second:
        while True:
            block, other = first.read(1 << 22), second.read(1 << 22)
            if block != other:
                return False
            if not block:
                return True
