"""Before the trainer loads a checkpoint: is it whole?"""

from __future__ import annotations

import argparse
import os
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.training.global_vars import get_tokenizer

from megatron_dwm.conversion.checkpoint_health import (
    common_state,
    last_whole,
    problems_of,
    tracked,
)
from megatron_dwm.conversion.errors import ConversionError
from megatron_dwm.errors import DWMError

_SHOWN = 3


def check_checkpoint(run: Any) -> None:
    """Checks, on one rank, the checkpoint that the trainer is about to load.

    No tensor is read; see `problems_of` for what is noticed.

    Args:
        run: Megatron's arguments.

    Raises:
        DWMError: It is damaged; names the files and the latest earlier iteration that is whole.
    """
    if not run.load or run.ckpt_format != "torch_dist":
        return  # Other formats are the trainer's own affair.
    if not os.path.isdir(run.load):
        return
    try:
        name = f"iter_{run.ckpt_step:07d}" if run.ckpt_step else tracked(run.load)
    except ConversionError as error:
        raise DWMError(f"--load {run.load}: {error} {_way_out(run, None)}") from error
    if name is None:
        return  # Nothing was saved there: the trainer starts at iteration 0.
    # A start with --finetune does not look at the iteration that is written inside.
    problems = problems_of(os.path.join(run.load, name), any_iteration=run.finetune)
    if not problems:
        check_vocabulary(run, os.path.join(run.load, name), _tokenizer_size())
        return
    shown = "; ".join(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown += f"; and {len(problems) - _SHOWN} more"
    before = int(name[5:]) if name.startswith("iter_") else None
    raise DWMError(
        f"--load {run.load}: the checkpoint {name} is damaged: {shown}. {_way_out(run, before)}"
    )


def check_vocabulary(run: Any, folder: str, tokenizer_size: int | None) -> None:
    """Refuses to load a vocabulary of which the trainer would silently drop rows.

    The trainer loads an embedding into one of other rows, as the padding depends on the
    tensor-parallel size. Rows that are no padding must not get lost that way.

    Args:
        run: Megatron's arguments.
        folder: A whole checkpoint.
        tokenizer_size: Size of the run's tokenizer; None where it is not known.

    Raises:
        DWMError: The run's model has fewer rows than the checkpoint's has without padding.
    """
    saved = common_state(folder).get("args")
    stored, built = (getattr(a, "padded_vocab_size", None) for a in (saved, run))
    if not stored or not built or built >= stored:
        return
    # An import says how many there are; elsewhere they are what the padding rule does not explain.
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


def _tokenizer_size() -> int | None:
    try:
        return get_tokenizer().vocab_size
    except (AssertionError, AttributeError, NotImplementedError):
        return None  # There is none, or one that does not say.


def _way_out(run: Any, before: int | None) -> str:
    whole = last_whole(run.load, before)
    if whole is None:
        return (
            "No earlier iteration is whole: restore the files from a copy, or start anew with "
            "another --save and --load"
        )
    return f"Iteration {whole} is whole: go on from there with --ckpt-step {whole}"
