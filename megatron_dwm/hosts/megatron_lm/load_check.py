"""Checks, before the trainer loads a checkpoint, that it is whole and fits the run."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.training.global_vars import get_tokenizer

from megatron_dwm.checkpoint.health import (
    INDEX,
    common_state,
    last_whole,
    problems_of,
    tracked,
)
from megatron_dwm.checkpoint.state import optimizer_is_sharded
from megatron_dwm.errors import ConversionError, DWMError

_SHOWN = 3
# With these values, Megatron refuses a checkpoint that lacks something it asks for.
_STRICT = ("assume_ok_unexpected", "raise_unexpected", "raise_all")


def check_checkpoint(run: Any) -> None:
    """Checks, on one rank, the checkpoint that the trainer is about to load.

    No tensor is read; see `problems_of` for what is checked.

    Args:
        run: Megatron's arguments.

    Raises:
        DWMError: It is damaged; names the files and the latest earlier iteration that is whole.
    """
    if not run.load or run.ckpt_format != "torch_dist":
        return  # Other formats are left to the trainer.
    if not os.path.isdir(run.load):
        return
    try:
        name = f"iter_{run.ckpt_step:07d}" if run.ckpt_step else tracked(run.load)
    except ConversionError as error:
        raise DWMError(f"--load {run.load}: {error} {_way_out(run, None)}") from error
    if name is None:
        return  # Nothing was saved there: the trainer starts at iteration 0.
    # A start with --finetune ignores the iteration stored inside.
    problems = problems_of(os.path.join(run.load, name), any_iteration=run.finetune)
    if not problems:
        folder = os.path.join(run.load, name)
        if os.path.exists(os.path.join(folder, INDEX)):
            check_vocabulary(run, folder, _tokenizer_size())
            check_conversion(run, folder)
            check_extra_states(run, folder)
            check_optimizer(run, folder)
            check_order(run, folder)
        return
    shown = "; ".join(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown += f"; and {len(problems) - _SHOWN} more"
    before = int(name[5:]) if name.startswith("iter_") else None
    raise DWMError(
        f"--load {run.load}: the checkpoint {name} is damaged: {shown}. {_way_out(run, before)}"
    )


def check_vocabulary(run: Any, folder: str, tokenizer_size: int | None) -> None:
    """Refuses to load a vocabulary if the trainer would silently drop some of its rows.

    The trainer loads an embedding into one with another number of rows, because the padding depends
    on the tensor-parallel size. Rows that are not padding must not get lost that way.

    Args:
        run: Megatron's arguments.
        folder: A whole checkpoint.
        tokenizer_size: Size of the run's tokenizer; None if unknown.

    Raises:
        DWMError: The run's model has fewer rows than the checkpoint's has without padding.
    """
    saved = common_state(folder).get("args")
    stored, built = (getattr(a, "padded_vocab_size", None) for a in (saved, run))
    if not stored or not built or built >= stored:
        return
    # An import states the number of real rows; otherwise it is what the padding rule leaves.
    needed = getattr(saved, "hf_vocab_size", None)
    if needed is None:
        padded = stored
        names = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
        factors = {name: getattr(saved, name, None) for name in names}
        if tokenizer_size is not None and all(factors.values()):
            rule = argparse.Namespace(**factors, rank=-1)
            padded = vocab_size_with_padding(tokenizer_size, rule, logging_enabled=False)
        needed = built if padded == stored else stored
    if built < needed:
        raise DWMError(
            f"--load {run.load}: the checkpoint has {stored} rows of vocabulary, and this run's "
            f"model {built}, so rows would be dropped; give --padded-vocab-size {stored}"
        )


def check_conversion(run: Any, folder: str) -> None:
    """Refuses a conversion that would leave out the weighting model, before the trainer does it.

    Args:
        run: Megatron's arguments.
        folder: A whole checkpoint.

    Raises:
        DWMError: `--ckpt-convert-format` is given, and the checkpoint holds a weighting model.
    """
    if run.ckpt_convert_format and (common_state(folder).get("dwm") or {}).get("shape"):
        raise DWMError(
            f"--ckpt-convert-format {run.ckpt_convert_format}: the converted checkpoint would lack "
            f"the weighting model that {folder} holds. Resume from it as it is, which any parallel "
            "layout can; without --dwm, the language model alone is converted"
        )


def check_extra_states(run: Any, folder: str) -> None:
    """Refuses to load with Transformer Engine a model saved without it, as Megatron cannot.

    Its layers ask for extra states beside their weights, of which the local layers have fewer, and
    Megatron loads all or nothing unless it is told to skip what is missing. (The other way round
    works: stored states that are not asked for are ignored.)

    Args:
        run: Megatron's arguments.
        folder: A whole checkpoint.

    Raises:
        DWMError: The run's strictness does not allow for what the checkpoint lacks.
    """
    if run.transformer_impl != "transformer_engine" or run.dist_ckpt_strictness not in _STRICT:
        return
    # Linear layers have an extra state in either implementation, norms only in Transformer
    # Engine's.
    names = [re.sub(r"layers\.\d+\.", "layers.", n) for n in load_sharded_metadata(folder)]
    names = [n for n in names if n.startswith("decoder.")]
    stateful = {n.split("._extra_state")[0] for n in names if "._extra_state" in n}
    norms = {n.removesuffix(".weight") for n in names if n.endswith("norm.weight")}
    # Mamba's own norm has no extra state, whoever implements the rest.
    norms = {n for n in norms if ".mixer." not in n}
    if norms - stateful:
        raise DWMError(
            f"--load {run.load}: the checkpoint was saved without Transformer Engine, whose layers "
            "ask for more; give --dist-ckpt-strictness log_unexpected to load it into them, or "
            "--transformer-impl local"
        )


def check_optimizer(run: Any, folder: str) -> None:
    """Refuses sharded optimizer state if this run's optimizers are not sharded.

    Megatron cannot load it either, and fails on a missing name.

    Args:
        run: Megatron's arguments.
        folder: A whole checkpoint.

    Raises:
        DWMError: The weighting model's optimizer is stored sharded.
    """
    if run.use_distributed_optimizer or run.no_load_optim or run.finetune:
        return
    if optimizer_is_sharded(common_state(folder).get("dwm") or {}):
        raise DWMError(
            f"--load {run.load}: the optimizers were sharded over data parallelism when {folder} "
            "was saved; give --use-distributed-optimizer, or --no-load-optim to start with fresh "
            "ones"
        )


def check_order(run: Any, folder: str) -> None:
    """Refuses sharded optimizer state in the parameter order of another layer implementation.

    Unless told to make them reshardable, Megatron stores and loads a distributed optimizer's
    buffers as they are, including the weights. Transformer Engine's fused layers, and grouped
    experts, hold their parameters in another order than the local ones, so weights would silently
    be loaded into other parameters.

    Args:
        run: Megatron's arguments.
        folder: A whole checkpoint.

    Raises:
        DWMError: The run's layers are implemented differently from the checkpoint's.
    """
    saved = common_state(folder).get("args")
    sharded = [getattr(a, "use_distributed_optimizer", False) for a in (saved, run)]
    reshardable = getattr(saved, "dist_ckpt_optim_fully_reshardable", False)
    if not all(sharded) or reshardable or run.no_load_optim or run.finetune:
        return
    for name in ("transformer_impl", "moe_grouped_gemm"):
        stored, built = (getattr(a, name, None) for a in (saved, run))
        if stored != built:
            raise DWMError(
                f"--load {run.load}: the optimizer's state is stored in the order of the layers' "
                f"parameters, which depends on --{name.replace('_', '-')} ({stored} in the "
                f"checkpoint, {built} in this run), and weights would be mixed up; give "
                "--no-load-optim to start with a fresh optimizer, or load a checkpoint that was "
                "saved with --dist-ckpt-optim-fully-reshardable"
            )


def _tokenizer_size() -> int | None:
    try:
        return get_tokenizer().vocab_size
    except (AssertionError, AttributeError, NotImplementedError):
        return None  # There is no tokenizer, or its size is unknown (Megatron raises these three).


def _way_out(run: Any, before: int | None) -> str:
    whole = last_whole(run.load, before)
    if whole is None:
        return (
            "No earlier iteration is whole: restore the files from a copy, or start over with "
            "another --save and --load"
        )
    return f"Iteration {whole} is whole: resume from it with --ckpt-step {whole}"
