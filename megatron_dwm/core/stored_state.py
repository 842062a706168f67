"""Reads a checkpoint's common state and its weighting model, whatever layers wrote it."""

from __future__ import annotations

import os
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dwm.errors import DWMError, in_short

# What Megatron's layers store beside their weights; which layers do so depends on whether they are
# Transformer Engine's. It is empty without FP8.
EXTRA_STATE = "_extra_state"


def common_state(folder: str) -> dict[str, Any]:
    """Returns a checkpoint's common state; empty for `--ckpt-format torch`.

    Only the `torch_dist` format holds a weighting model.
    """
    legacy = os.path.isdir(folder) and any(n.startswith("mp_rank_") for n in os.listdir(folder))
    if legacy and not dist_checkpointing.check_is_distributed_checkpoint(folder):
        return {}
    return dist_checkpointing.load_common_state_dict(folder)


def load_sharded(request: dict[str, Any], folder: str) -> dict[str, Any]:
    """Loads a sharded state, except extra states that the checkpoint lacks.

    Megatron's own load asks for all of them, so Transformer Engine's layers could not load what
    local layers saved.

    Args:
        request: the sharded state to load.
        folder: a `torch_dist` checkpoint.

    Raises:
        DWMError: the checkpoint lacks something else, or cannot be read.
    """
    try:
        state, _, unknown = dist_checkpointing.load(
            request, folder, strict=StrictHandling.RETURN_UNEXPECTED
        )
    except CheckpointException as error:  # not an Exception, and raised on all ranks
        causes = [failure[0] for failure in error.failures.values()]
        reason = in_short(causes[0]) if causes else "unknown"
        raise DWMError(f"{folder} cannot be loaded ({reason})") from error
    lost = sorted(name for name in unknown if not name.endswith(EXTRA_STATE))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise DWMError(f"{folder} has no {', '.join(lost[:3])}{more}", this_rank_only=True)
    return state


def load_weights(module: Any, weights: dict[str, Any], folder: str) -> None:
    """Loads a state dict that may lack extra states but nothing else.

    Args:
        module: receives the state.
        weights: name -> tensor or extra state.
        folder: the checkpoint that they come from.

    Raises:
        DWMError: a weight is missing or unknown.
    """
    found = module.load_state_dict(weights, strict=False)
    wrong = [n for n in (*found.missing_keys, *found.unexpected_keys) if EXTRA_STATE not in n]
    if wrong:
        raise DWMError(
            f"{folder} does not fit: {', '.join(sorted(wrong)[:3])}", this_rank_only=True
        )
