"""Cases of Megatron-Bridge's `pretrain` for `bridge_worker.py`: trained stock, and weighted.

The model is a GPT of two small layers without Transformer Engine, on mock data. Imported where
Megatron-Bridge can be.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
from megatron.bridge.training import callbacks, checkpointing, train
from megatron.bridge.training import config as settings
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dwm import DWMConfig, DWMError
from megatron_dwm.hosts import cpu, megatron_bridge
from megatron_dwm.hosts.megatron_bridge import weighted

OUT = Path(os.environ["OUT"])
STEPS = 6
SEQUENCE = 16


class Watch(callbacks.Callback):
    """What a run did, and what it left."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"steps": []}

    def on_train_step_end(self, context: Any) -> None:
        losses = {name: float(value) for name, value in context.loss_dict.items()}
        self.found["steps"].append([losses, float(context.grad_norm)])

    def on_train_end(self, context: Any) -> None:
        digest = hashlib.sha256()
        for chunk in context.model:
            for parameter in chunk.parameters():
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
        self.found["digest"] = digest.hexdigest()


def run_config(**changes: Any) -> Any:
    """Returns a run's settings.

    Args:
        changes: `sharded`, `tp`, `pp`, `loader`, `data` (a prefix; default: mock data), and fields
            of the checkpoint's settings.
    """
    data = changes.pop("data", None)
    indexed = {"blend": ([data], None), "split": "1,0,0"} if data else {}
    kind = settings.GPTDatasetConfig if data else settings.MockGPTDatasetConfig
    sharded = changes.pop("sharded", False)
    tp, pp = changes.pop("tp", 1), changes.pop("pp", 1)
    model = GPTModelProvider(
        transformer_layer_spec=local_layer_spec,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        seq_length=SEQUENCE,
        position_embedding_type="learned_absolute",
        make_vocab_size_divisible_by=8,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        **{
            name: False
            for name in (
                "bias_activation_fusion",
                "masked_softmax_fusion",
                "persist_layer_norm",
                "bias_dropout_fusion",
                "apply_rope_fusion",
                "gradient_accumulation_fusion",
                "cross_entropy_loss_fusion",
            )
        },
    )
    return settings.ConfigContainer(
        model=model,
        train=settings.TrainingConfig(train_iters=STEPS, global_batch_size=8, micro_batch_size=2),
        validation=settings.ValidationConfig(eval_interval=100, eval_iters=0),
        optimizer=settings.OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            min_lr=1e-3,
            clip_grad=1.0,
            params_dtype=torch.float32,
            use_distributed_optimizer=sharded,
        ),
        scheduler=settings.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_decay_iters=STEPS,
            start_weight_decay=0.01,
            end_weight_decay=0.01,
            weight_decay_incr_style="constant",
        ),
        ddp=settings.DistributedDataParallelConfig(
            use_distributed_optimizer=sharded,
            check_for_nan_in_grad=False,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        dataset=kind(
            **indexed,
            random_seed=1,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            seq_length=SEQUENCE,
            num_dataset_builder_threads=1,
            dataloader_type=changes.pop("loader", "single"),
            num_workers=0,
        ),
        logger=settings.LoggerConfig(log_interval=1),
        tokenizer=settings.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=64),
        checkpoint=settings.CheckpointConfig(**changes),
        rng=settings.RNGConfig(seed=7),
        dist=settings.DistributedInitConfig(
            distributed_backend="gloo" if cpu.is_cpu() else "nccl", use_gloo_process_groups=True
        ),
    )


def stock(**changes: Any) -> dict[str, Any]:
    """Trains as Megatron-Bridge does."""
    watch = Watch()
    pretrain(run_config(**changes), forward_step, callbacks=[watch])
    return watch.found


def weighted_run(dwm: dict[str, Any], hand_over: bool = True, **changes: Any) -> dict[str, Any]:
    """Trains with the adapter; says whether the trainer's functions were put back."""
    watch, before = Watch(), (train.train_step, checkpointing.generate_state_dict)
    try:
        with weighted(DWMConfig(enabled=True, **dwm)) as weighting:
            watch.found["rebound"] = before[0] is not train.train_step
            given = [weighting, watch] if hand_over else [watch]
            pretrain(run_config(**changes), forward_step, callbacks=given)
    except DWMError as error:
        watch.found["error"] = str(error)
    after = (train.train_step, checkpointing.generate_state_dict)
    watch.found["restored"] = before == after
    log = Path(changes.get("save") or "nowhere", "dwm_log.jsonl")
    if log.exists():
        watch.found["log"] = [json.loads(line) for line in log.read_text().splitlines()]
    return watch.found


def signatures() -> dict[str, Any]:
    """Returns what is relied upon of Megatron-Bridge."""
    train_step = inspect.signature(train.train_step).parameters
    state_dict = inspect.signature(checkpointing.generate_state_dict).parameters
    fields = callbacks.CallbackContext.__dataclass_fields__
    return {
        "train_step": list(train_step),
        "state_dict": list(state_dict),
        "events": sorted(callbacks.VALID_EVENTS),
        "context": sorted(fields),
        "called_by_its_global": "train_step" in train.train.__code__.co_names,
    }


def another_signature() -> dict[str, Any]:
    """Returns what is said where `train_step` takes something else."""
    before = train.train_step
    with mock.patch.object(train, "train_step", lambda model: None):
        try:
            with weighted(DWMConfig(enabled=True)):
                return {}
        except DWMError as error:
            return {"error": str(error), "restored": before is not train.train_step}


def another_version() -> dict[str, Any]:
    """Returns what is said of a version that is not supported."""
    with mock.patch.object(megatron_bridge, "SUPPORTED", ((9, 0), (9, 1))):
        try:
            with weighted(DWMConfig(enabled=True)):
                return {}
        except DWMError as error:
            return {"error": str(error)}


HEAD = {"meta_interval": 1, "gate": "off"}
SAVED = {"save_interval": 4, "fully_parallel_save": True}


def saved(name: str) -> str:
    return str(OUT / name)


def indexed(name: str, first: int) -> str:
    """Writes a data set of 40 documents of 20 tokens; returns its prefix."""
    prefix = saved(name)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for k in range(40):
        builder.add_document(torch.arange(first + k, first + k + 20, dtype=torch.int32) % 60, [20])
    builder.finalize(f"{prefix}.idx")
    return prefix


def on_indexed_data() -> dict[str, Any]:
    """Trains on indexed data, with a meta set of indexed data."""
    given = {**HEAD, "meta_data_path": [indexed("meta", 7)]}
    return weighted_run(given, data=indexed("training", 0), save=saved("indexed"), **SAVED)


def stock_from_it() -> dict[str, Any]:
    """Resumes a weighted run as Megatron-Bridge does, which has read the folder itself already."""
    shutil.copytree(saved("head"), saved("copy"))
    return stock(load=saved("copy"), ckpt_step=4)


def one_rank() -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "signatures": signatures,
        "another signature": another_signature,
        "another version": another_version,
        "stock": stock,
        "uniform": lambda: weighted_run({"policy": "uniform"}),
        "gated": lambda: weighted_run({"meta_interval": 1}),
        "head": lambda: weighted_run(HEAD, save=saved("head"), **SAVED),
        "resumed": lambda: weighted_run(
            HEAD, load=saved("head"), ckpt_step=4, save=saved("resumed"), **SAVED
        ),
        "stock from it": stock_from_it,
        "indexed": on_indexed_data,
        "no such data": lambda: weighted_run(
            {**HEAD, "meta_data_path": ["nowhere"]}, data=saved("training")
        ),
        "no meta set": lambda: weighted_run(HEAD, data=saved("training")),
        "no callback": lambda: weighted_run({"policy": "uniform"}, hand_over=False),
        "form model": lambda: weighted_run({"form": "model"}),
        "whole batches": lambda: weighted_run({"policy": "uniform"}, loader="batch"),
    }


def two_ranks() -> dict[str, Callable[[], dict[str, Any]]]:
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    layouts = {"dp2": {}, "dp2 sharded": {"sharded": True}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}
    for name, layout in layouts.items():
        cases[f"{name} stock"] = lambda layout=layout: stock(**layout)
        cases[f"{name} uniform"] = lambda layout=layout: weighted_run(
            {"policy": "uniform"}, **layout
        )
        folder = saved(name.replace(" ", "_"))
        cases[f"{name} head"] = lambda layout=layout, folder=folder: weighted_run(
            HEAD, save=folder, **SAVED, **layout
        )
    return cases
