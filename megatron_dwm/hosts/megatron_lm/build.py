"""Megatron-LM's trainer as a host: builds the weighting model and meta data from its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_tokenizer, print_rank_0
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_dwm.config.schema import DWMConfig
from megatron_dwm.config.validation import head_dim_problems, raise_all
from megatron_dwm.conversion.dwm_classifier import read_classifier
from megatron_dwm.conversion.families.rope import LLAMA3_ROPE
from megatron_dwm.conversion.hf_folder import read_hf_config
from megatron_dwm.core.trainee import RunShape, StepOutcome
from megatron_dwm.core.trainer_state import refusal as step_refusal
from megatron_dwm.core.vocabulary import megatron_vocabulary_size, tokenizer_fingerprint
from megatron_dwm.data.meta_dataset import MetaData
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts import cpu
from megatron_dwm.hosts.megatron_lm.checks import blend_of, default_meta_batch
from megatron_dwm.weighting_model.scorer import Scorer, micro_batches_at_once
from megatron_dwm.weighting_model.transformer import (
    DataWeightingModel,
    EmbeddingShape,
    dwm_transformer_config,
)
from megatron_dwm.weighting_model.warm_start import copy_from_llm, load_hf_folder

_MOCK_META_SAMPLES = 4096


def outcome(result: tuple) -> StepOutcome:
    """Returns a step's outcome from what Megatron-LM's `train_step` returns."""
    losses, skipped, _, _, _, grad_norm, *_ = result
    return StepOutcome(losses, bool(skipped), grad_norm, result)


def resolve_shapes(config: DWMConfig, args: Any) -> DWMConfig:
    """Returns the settings with defaults set and the DWM's sizes taken from what it starts from.

    Args:
        config: settings as given.
        args: Megatron's arguments.

    Raises:
        DWMError: a size is not divisible as needed, or a folder does not fit.
    """
    changes: dict[str, Any] = {}
    if not config.has_model:
        pass
    elif config.init.startswith("llm:"):
        groups = args.num_query_groups if args.group_query_attention else None
        changes = {
            "num_layers": int(config.init[4:]),
            "hidden_size": args.hidden_size,
            "ffn_hidden_size": args.ffn_hidden_size,
            "num_attention_heads": args.num_attention_heads,
            "num_query_groups": groups or args.num_attention_heads,
        }
    elif config.init.startswith("hf:"):
        shape = read_hf_config(config.init[3:])
        changes = {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_query_groups": shape.num_query_groups,
        }
        source = read_classifier(config.init[3:])
        if source.labels == 1:
            # Its score head is used, which belongs to its pooling.
            changes["pooling"] = source.pooling
    if config.meta_batch_size is None:
        changes["meta_batch_size"] = default_meta_batch(args)
    config = dataclasses.replace(config, **changes)
    if config.has_model and config.init.startswith("hf:"):
        raise_all(head_dim_problems(config, args.tensor_model_parallel_size))
    return config


class MegatronLM:
    """Megatron-LM's trainer as a `TrainerHost`; its arguments and globals are read here.

    Args:
        args: Megatron's arguments.
        model: the LLM's DDP-wrapped chunks.
        optimizer: the LLM's optimizer.
        groups: the LLM's process groups.
    """

    def __init__(self, args: Any, model: list[Any], optimizer: Any, groups: Any) -> None:
        self.args, self.model, self.optimizer, self.groups = args, model, optimizer, groups
        self.transformer_config = get_model_config(model[0])
        self.steps = args.train_iters
        self.shape = RunShape(
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            decoder_seq_length=args.decoder_seq_length,
            per_token=args.calculate_per_token_loss,
            device=cpu.device(),
        )

    def check(self, config: DWMConfig) -> None:
        """See `TrainerHost.check`; the flags have been checked before."""
        if config.uses_meta_set and config.verify_meta_gradient:
            undoable = step_refusal(self.optimizer)
            if undoable is not None:
                raise DWMError(
                    f"--dwm-verify-meta-gradient takes steps and undoes them: {undoable}"
                )

    def meta_data(self, config: DWMConfig) -> MetaData:
        """See `TrainerHost.meta_data`: indexed data sets, read as the trainer reads its own."""
        return _build_meta_data(config, self.args)

    def scorer(self, config: DWMConfig) -> tuple[Scorer, dict[str, Any]]:
        """See `TrainerHost.scorer`."""
        scorer = _build_scorer(
            config, self.args, self.transformer_config, self.groups, self.shape.device
        )
        if config.init.startswith("hf:"):
            self.say(load_hf_folder(scorer.module, config.init[3:], self.groups))
            scorer.weights_changed()
        return scorer, _description(config, scorer)

    def warm_start(self, scorer: Scorer, config: DWMConfig) -> Callable[[], None] | None:
        """See `TrainerHost.warm_start`; the rotary frequencies are copied at once."""
        if not config.init.startswith("llm:"):
            return None
        chunks = [unwrap_model(chunk) for chunk in self.model]
        _take_over_positions(scorer.module, chunks[0])

        def copy() -> None:
            copy_from_llm(scorer.module, chunks, self.groups)
            scorer.weights_changed()

        return copy

    def say(self, text: str) -> None:
        """See `TrainerHost.say`."""
        print_rank_0(text)


def _take_over_positions(dwm: DataWeightingModel, llm: Any) -> None:
    """Uses the LLM's own rotary frequencies, whatever their scaling."""
    if dwm.rotary_pos_emb is not None:
        dwm.rotary_pos_emb.inv_freq = llm.rotary_pos_emb.inv_freq
        factor = llm.rotary_pos_emb.seq_len_interpolation_factor
        dwm.rotary_pos_emb.seq_len_interpolation_factor = factor


def _description(config: DWMConfig, scorer: Scorer) -> dict[str, Any]:
    """Returns what must agree between this DWM and one in a checkpoint, as plain values."""
    transformer, embedding = scorer.transformer_config, scorer.module.embedding_shape
    tokenizer = get_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    return {
        **config.shape(),
        "kv_channels": transformer.kv_channels,
        "normalization": transformer.normalization,
        "layernorm_epsilon": transformer.layernorm_epsilon,
        "gated_linear_unit": transformer.gated_linear_unit,
        "activation_func": transformer.activation_func.__name__,
        "add_bias_linear": transformer.add_bias_linear,
        "add_qkv_bias": transformer.add_qkv_bias,
        "qk_layernorm": transformer.qk_layernorm,
        "position_embedding_type": embedding.position_embedding_type,
        "rotary_base": float(embedding.rotary_base),
        "rotary_percent": float(embedding.rotary_percent),
        "rope_scaling": embedding.rope_scaling,
        "rope_scaling_factor": float(embedding.rope_scaling_factor),
        # Not the padded size, which depends on the tensor-parallel size.
        "vocab_size": min(megatron_vocabulary_size(tokenizer), embedding.vocab_size),
        **({} if fingerprint is None else {"the tokenizer's fingerprint": fingerprint}),
    }


def _build_scorer(
    config: DWMConfig, args: Any, llm_config: Any, groups: Any, device: torch.device
) -> Scorer:
    like_llm = config.init.startswith("llm:")
    shape: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.resolved_ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups or config.num_attention_heads,
    }
    embedding = EmbeddingShape(args.padded_vocab_size, args.max_position_embeddings)
    if like_llm:
        embedding = dataclasses.replace(
            embedding,
            position_embedding_type=args.position_embedding_type,
            rotary_base=args.rotary_base,
            rotary_percent=args.rotary_percent,
            rope_scaling=args.use_rope_scaling,
        )
    elif config.init.startswith("hf:"):
        source = read_hf_config(config.init[3:])
        shape["layernorm_epsilon"] = source.layernorm_epsilon
        shape["kv_channels"] = source.kv_channels
        scaling = source.rope_scaling
        _check_scaling(config.init, scaling)
        embedding = dataclasses.replace(
            embedding,
            rotary_base=source.rotary_base,
            rope_scaling=scaling is not None,
            rope_scaling_factor=float(scaling["factor"]) if scaling is not None else 8.0,
        )
    model = DataWeightingModel(
        config=dwm_transformer_config(llm_config, config.num_layers, like_llm, **shape),
        embedding=embedding,
        pooling=config.pooling,
        pg_collection=groups,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
    )
    together = micro_batches_at_once(llm_config, model.config)
    return Scorer(
        model,
        config,
        groups,
        args.micro_batch_size,
        args.seq_length,
        device,
        together,
        sharded=args.use_distributed_optimizer,
        gloo=args.use_gloo_process_groups,
    )


def _check_scaling(init: str, scaling: Any) -> None:
    """Refuses scaled RoPE that Megatron's rotary embedding does not compute."""
    if scaling is None:
        return
    fits = {"rope_type": "llama3", **LLAMA3_ROPE}
    different = [
        f"{name} is {scaling.get(name)!r}, needs {value!r}"
        for name, value in fits.items()
        if scaling.get(name) != value
    ]
    if different:
        raise DWMError(f"--dwm-init {init}: scaled RoPE of another kind: {'; '.join(different)}")


def _build_meta_data(config: DWMConfig, args: Any) -> MetaData:
    vp_size = args.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if vp_size is None else list(range(vp_size))

    def on_this_rank() -> bool:
        reads = any(is_first_or_last_pipeline_stage(stage) for stage in stages)
        return mpu.get_tensor_model_parallel_rank() == 0 and reads

    prefixes, weights = blend_of(config.meta_data_path, "--dwm-meta-data-path")
    build = partial(_build_dataset, args, on_this_rank, config.seed)
    wanted: list[str | None] = [*prefixes] or [None]
    datasets = [build(prefix) for prefix in wanted]
    assert config.meta_batch_size is not None
    return MetaData(
        datasets=[dataset for dataset in datasets if dataset is not None],
        weights=weights if len(prefixes) > 1 else None,
        batch_size=config.meta_batch_size,
        micro_batch_size=args.micro_batch_size,
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        seed=config.seed,
    )


def _build_dataset(
    args: Any, on_this_rank: Callable[[], bool], seed: int, prefix: str | None
) -> Any:
    """Builds one pass over a data set, or a mock one for `--mock-data`; None off data ranks."""
    config = GPTDatasetConfig(
        random_seed=seed + (args.seed if prefix is None else 0),
        sequence_length=args.seq_length,
        blend=None if prefix is None else ([prefix], None),
        split="1,0,0",
        tokenizer=get_tokenizer(),
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        allow_ambiguous_pad_tokens=getattr(args, "allow_ambiguous_pad_tokens", False),
        inter_document_masking=getattr(args, "dataloader_inter_document_masking", False),
    )
    kind = MockGPTDataset if prefix is None else GPTDataset
    sizes = [_MOCK_META_SAMPLES if prefix is None else None, None, None]
    return BlendedMegatronDatasetBuilder(kind, sizes, on_this_rank, config).build()[0]
