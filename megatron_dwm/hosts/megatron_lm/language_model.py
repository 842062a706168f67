"""Builds a checkpoint's language model in a single process, from its flags or arguments."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import sys
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.extensions import transformer_engine
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.models.gpt import GPTModelBuilder

from megatron_dwm.conversion.dist_checkpoint import TorchDistCheckpoint
from megatron_dwm.core.ranks import start_ranks
from megatron_dwm.core.stored_state import load_sharded, load_weights
from megatron_dwm.errors import ConversionError, in_short
from megatron_dwm.hosts import cpu

# One process, and float32 arithmetic whatever the run used.
_HERE: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "overlap_p2p_comm": False,
    "overlap_moe_expert_parallel_comm": False,
    "bf16": False,
    "fp16": False,
    "fp8": None,
    "fp4": None,
    "fp8_param_gather": False,
    "fp4_param_gather": False,
    "params_dtype": torch.float32,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "cpu_offloading": False,
    "cpu_offloading_num_layers": 0,
    "cuda_graph_impl": "none",
    "fp16_lm_cross_entropy": False,
    "perform_initialization": False,
    "spec": None,
}
# How to compute: this machine's defaults, not the run's. (`bias_gelu_fusion` is not among them: the
# fused function is a different one, the tanh approximation.)
_MACHINE = (
    "transformer_impl",
    "attention_backend",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_swiglu_fusion",
    "bias_dropout_fusion",
    "no_persist_layer_norm",
    "apply_rope_fusion",
    "cross_entropy_loss_fusion",
    "use_cpu_initialization",
    "distributed_backend",
    "yaml_cfg",
    "config_logger_dir",
    "te_precision_config_file",
    "rank",
    "world_size",
)
_PLAIN = (bool, int, float, str, type(None))


def load_language_model(
    folder: str | os.PathLike, flags: list[str] | None = None
) -> tuple[Any, argparse.Namespace]:
    """Loads a `torch_dist` checkpoint's language model, in float32, on this process's device.

    Call `cpu.install()` before importing this module. Joins a process group of one.

    Args:
        folder: The checkpoint, `.../iter_0000100` or `release`.
        flags: The trainer's flags to build the model from; None uses the arguments stored in the
            checkpoint.

    Returns:
        The `GPTModel` in evaluation mode, and the checkpoint's arguments.

    Raises:
        ConversionError: The checkpoint is damaged, or Megatron cannot build or load its model.
    """
    checkpoint = TorchDistCheckpoint(folder)
    saved = checkpoint.args
    assert saved is not None, "the checkpoint was opened, so it has arguments"
    args = _here(saved) if flags is None else _from_flags(folder, flags)
    if not torch.distributed.is_initialized():
        start_ranks()
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        config = gpt_config_from_args(args)
        model = GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
        model = model.to(device=cpu.device(), dtype=torch.float32).eval()
    except Exception as error:  # Megatron may raise anything for arguments that it cannot build
        raise ConversionError(
            f"{folder}: Megatron cannot build, in one process, the model that its arguments "
            f"describe ({in_short(error)})"
        ) from error
    _check_rows(folder, model, checkpoint)
    try:
        metadata = dist_checkpointing.load_content_metadata(str(folder)) or {}
        wanted = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": groups.dp_cp})
        loaded = load_sharded({"model": wanted}, str(folder))["model"]
        load_weights(model, loaded, str(folder))
    except Exception as error:  # a damaged or foreign checkpoint may raise anything
        raise ConversionError(
            f"{folder}: its language model cannot be loaded ({in_short(error)}); "
            "`megatron-dwm convert inspect --deep` says whether the checkpoint is whole"
        ) from error
    return model, saved


def _here(saved: argparse.Namespace) -> argparse.Namespace:
    """Returns the checkpoint's arguments for one process on this machine."""
    given, sys.argv = sys.argv, ["verify", *cpu.default_flags()]
    try:
        args = parse_args()
    finally:
        sys.argv = given
    for name, value in vars(saved).items():
        if name not in _MACHINE and _is_plain(value):
            setattr(args, name, value)
    for name, value in _HERE.items():
        setattr(args, name, value)
    if not transformer_engine.HAVE_TE:
        args.transformer_impl = "local"
        args.no_persist_layer_norm = True
        args.moe_grouped_gemm = False
    # There is no gradient to accumulate.
    args.gradient_accumulation_fusion = False
    return args


def _from_flags(folder: str | os.PathLike, flags: list[str]) -> argparse.Namespace:
    """Returns the arguments that the trainer derives from its flags, for one process here.

    Megatron's own functions parse, derive and pad; only values that a run adds are made up.
    """
    values = dict(itertools.pairwise(flags))
    words = [*flags, "--micro-batch-size", "1", "--seq-length"]
    words.append(values.get("--max-position-embeddings", "1"))
    # The fused GELU is a different function, the tanh approximation: the model's flags say which.
    words += [flag for flag in cpu.default_flags() if flag != "--no-bias-gelu-fusion"]
    if not transformer_engine.HAVE_TE:
        words += ["--transformer-impl", "local", "--no-persist-layer-norm"]
    words.append("--no-gradient-accumulation-fusion")
    given, sys.argv = sys.argv, ["verify", *words]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            args = parse_args()
            validate_args(args)
            # As the trainer does, if the tokenizer has not been moved since.
            if args.tokenizer_model is None or os.path.exists(args.tokenizer_model):
                build_tokenizer(args)
    except (
        Exception,
        SystemExit,
    ) as error:  # Megatron may raise anything for unknown flags
        said = printed.getvalue().strip().splitlines()
        reason = said[-1] if isinstance(error, SystemExit) and said else in_short(error)
        raise ConversionError(
            f"{folder}: Megatron does not take the flags that were printed for it ({reason}); "
            "import the model again"
        ) from error
    finally:
        sys.argv = given
    for name, value in _HERE.items():
        setattr(args, name, value)
    return args


def _check_rows(folder: str | os.PathLike, model: Any, checkpoint: TorchDistCheckpoint) -> None:
    """Refuses a model whose number of rows differs from the checkpoint's."""
    name = "embedding.word_embeddings.weight"
    built, stored = model.embedding.word_embeddings.weight.size(0), checkpoint.tensors.get(name)
    if stored is not None and stored.shape[0] != built:
        raise ConversionError(
            f"{folder} has {stored.shape[0]} rows of vocabulary, and its flags build {built}; "
            f"train with --padded-vocab-size {stored.shape[0]}, or import the model again"
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Runs the model on whole sequences.

    Args:
        model: What `load_language_model` returned.
        tokens: `[b, s]` int64.

    Returns:
        `[b, s, V]` float32 on the CPU, V padded.
    """
    tokens = tokens.to(cpu.device())
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None).float().cpu()
