"""Pre-trains a language model with Megatron's own trainer and learned sample weights.

GPT and Llama style models, with experts and multi-token prediction, and hybrids with Mamba layers
(`--hybrid-layer-pattern`).

The wheel of megatron-core has the trainer (`megatron.training`) but no script that drives it; this
is one. It takes every flag of the trainer and adds `--dwm-*`. Without `--dwm` it is plain Megatron
pre-training. `pretrain_dwm.sh` launches it.

    torchrun --nproc-per-node 8 examples/pretrain_dwm.py --num-layers 24 ... --dwm ...

The trainer asks a script for three things, which are the three parts of this file:

    model     a config that its model builder understands       main()
    data      a function that builds three data sets            build_datasets()
    step      one forward pass and how to turn it into a loss   forward_step(), loss_func()

Shapes: b micro-batch size, s sequence length (s / cp on a context-parallel rank).
"""

# ruff: noqa: E402  (the host must be installed before the first import of Megatron)

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

import megatron_dwm
from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core import mpu
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

# The tensors of a packed sample. A pipeline stage that lacks one has None instead.
BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

# A loss is spiky when it exceeds the largest one seen by this factor (--check-for-spiky-loss).
SPIKY_LOSS_FACTOR = 10

# Trainer flags that need a different batch, model or loss than the ones in this file. They would be
# ignored or fail deep inside the trainer, so they are refused by name.
UNSUPPORTED = {
    "--sft": "it trains on conversations, with another data set",
    "--fim-data": "it trains on fill-in-the-middle data, with another data set",
    "--dataloader-inter-document-masking": "it merges the samples of a micro-batch into one",
    "--hybrid-context-parallel": "it merges the samples of a micro-batch into one",
    "--logits-load-dir": "distillation has a loss of its own",
    "--overlap-moe-expert-parallel-comm": "it needs a forward step that returns a schedule",
    "--inprocess-restart": "it needs a wrapped trainer",
}

stimer = StragglerDetector()


# ------------------------------------------------------------------------------------- data


class GPTDataset(gpt_dataset.GPTDataset):
    """Megatron's packed samples, with an error if an empty split would hang the run.

    The class keeps its name because cached indices are found by it.
    """

    def _get_num_tokens_per_epoch(self) -> int:
        num_tokens = super()._get_num_tokens_per_epoch()
        # Megatron adds epochs until there are enough tokens: without any tokens, forever.
        if num_tokens == 0:
            split = self.index_split.name
            raise ValueError(
                f"The {split} split of {self.dataset_path} has {len(self.indices)} documents and "
                f"no tokens (--split {self.config.split}). Give it a larger share with --split, "
                f"or data of its own with --train-data-path and --valid-data-path."
            )
        return num_tokens


def build_datasets(
    num_samples: tuple[int | None, int | None, int | None], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Builds the training, validation and test sets of packed samples.

    Args:
        num_samples: Number of samples of each; None is one epoch.
        vp_stage: Virtual pipeline stage that will read them.

    Returns:
        The three data sets; None on ranks that read none.
    """
    args = get_args()
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        partial(_reads_data, vp_stage),
        dataset_config(args),
    ).build()


# Every rank calls it: the builder synchronises the ranks itself while they share a cache.
build_datasets.is_distributed = True


def _reads_data(vp_stage: int | None) -> bool:
    # Within a tensor-parallel group rank 0 reads and broadcasts.
    return mpu.get_tensor_model_parallel_rank() == 0 and _needs_data(vp_stage)


def _needs_data(vp_stage: int | None) -> bool:
    # The first pipeline stage needs the tokens, the last one the labels, and layers that predict
    # further tokens (--mtp-num-layers) both.
    return is_first_or_last_pipeline_stage(vp_stage) or _predicts_further(vp_stage)


def _predicts_further(vp_stage: int | None) -> bool:
    args = get_args()
    layout = args.pipeline_model_parallel_layout
    if layout is not None:
        layout = _read_layout(layout, args.pipeline_model_parallel_size)
    return mtp_on_this_rank(
        layout=layout,
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


_read_layout = cache(PipelineParallelLayerLayout.from_str)


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Translates the trainer's data flags (`--data-path`, `--train-data-path`, `--split`, ...)."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as f:
            sequences_per_dataset = json.load(f)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        tokenizer=get_tokenizer(),
        # Which documents.
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        sequences_per_dataset=sequences_per_dataset,
        # How a sample is cut from them and masked.
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        # How files are read and indices are cached.
        path_to_cache=args.data_cache_path,
        object_storage_cache_path=args.object_storage_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        # Parallel sizes.
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def get_batch(data_iterator: Iterator | None, vp_stage: int | None) -> dict[str, Any]:
    """Returns this rank's part of the next micro-batch, with a value for each of `BATCH_KEYS`.

    Returns:
        `tokens`, `labels`, `loss_mask`, `position_ids`: [b, s]; `attention_mask`: [b, 1, s, s], or
        None if the attention kernel is causal by itself. The first pipeline stage has no labels,
        the last has no tokens unless it predicts further ones, and the stages in between have
        nothing.
    """
    if not _needs_data(vp_stage):
        return dict.fromkeys(BATCH_KEYS)

    args = get_args()
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        for key in BATCH_KEYS:
            value = sample.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)

    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_further(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return {key: batch[key] for key in BATCH_KEYS}


# ------------------------------------------------------------------------------------- step


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sums the per-token losses of a micro-batch, leaving the normalisation to the trainer.

    The sum is linear in `output_tensor`, which is all that sample weights require: scaling the
    losses of sample i by w_i scales its share of the gradient by w_i.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output_tensor: [b, s], the loss of each token.

    Returns:
        The loss sum; the number of tokens that count; and for the log both in one tensor [2],
        which the trainer sums over data-parallel ranks before it divides.
    """
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    _check_loss(loss)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def _check_loss(loss: torch.Tensor) -> None:
    """Stops the run, or reports, when this rank's loss is NaN, infinite or spiky."""
    args = get_args()
    machine = get_rerun_state_machine()
    # The machine re-runs the step to tell a broken device from a broken model; the forward
    # pass is deterministic, so the tolerance is zero.
    check = partial(machine.validate_result, result=loss, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        for name, test in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            message = f"found {name} in local forward loss calculation"
            check(rejection_func=test, message=message, fatal=True)
    if args.check_for_spiky_loss:
        is_spiky = partial(
            machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
        )
        check(rejection_func=is_spiky, message="Spiky loss", fatal=False)


def forward_step(data_iterator: Iterator | None, model: GPTModel) -> tuple[torch.Tensor, partial]:
    """Runs one micro-batch through this rank's part of the model.

    Returns:
        The per-token losses [b, s] on the last pipeline stage, hidden states [s, b, h] on the
        others; and the loss function that the last stage applies to its output.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()

    with stimer:
        output_tensor = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output_tensor, partial(loss_func, batch["loss_mask"])


# ------------------------------------------------------------------------------------- main


def refuse_unsupported(argv: list[str]) -> None:
    """Exits with one line if a flag asks for something that this script does not support."""
    for word in argv:
        flag = word.split("=")[0]
        if flag in UNSUPPORTED:
            raise SystemExit(
                f"{flag} is not supported by pretrain_dwm.py: {UNSUPPORTED[flag]}. Leave it out."
            )


def refuse_lost_masks(args: Namespace) -> None:
    """Exits where pipeline stages would not be given the mask that keeps documents apart.

    Only the first and the last stage read data. In the others tokens would see the documents
    before their own, and nothing would tell.
    """
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    if args.reset_attention_mask and stages > 2:
        raise SystemExit(
            f"--reset-attention-mask is not supported by pretrain_dwm.py with {stages} pipeline "
            "stages (virtual ones counted): only the first and the last are given the mask. Use "
            "at most 2, or leave it out."
        )


def main() -> None:
    """Parses the flags, builds the config and passes the three parts to the trainer."""
    refuse_unsupported(sys.argv[1:])
    args = parse_and_validate_args(extra_args_provider=megatron_dwm.add_dwm_args)
    refuse_lost_masks(args)
    # The trainer's builder turns this config into a model for each (virtual) pipeline stage,
    # with the layer spec that --transformer-impl, --spec and the model's flags ask for.
    hybrid = args.hybrid_layer_pattern is not None
    of_model = hybrid_config_from_args(args) if hybrid else gpt_config_from_args(args)
    config = pretrain_cfg_container_from_args(args, of_model)
    with megatron_dwm.attach():
        pretrain(config, build_datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
