"""Reads a checkpoint's common state and the weighting model in it, whatever layers wrote it."""

from __future__ import annotations

import os
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dwm.errors import DWMError, in_short

# What Megatron's layers store beside their weights; which layers do depends on whether they are
# Transformer Engine's. Without FP8 it is empty.
EXTRA_STATE = "_extra_state"


def common_state(folder: str) -> dict[str, Any]:
    """Returns what a checkpoint stores once; nothing for one of `--ckpt-format torch`.

    Only the `torch_dist` format holds a weighting model.
    """
    legacy = os.path.isdir(folder) and any(n.startswith("mp_rank_") for n in os.listdir(folder))
    if legacy and not dist_checkpointing.check_is_distributed_checkpoint(folder):
        return {}
    return dist_checkpointing.load_common_state_dict(folder)


def load_sharded(request: dict[str, Any], folder: str) -> dict[str, Any]:
    """Loads a sharded state, without the extra states that the checkpoint does not have.

    Megatron's own load asks for all, so that layers of Transformer Engine could not take what the
    local ones have saved.

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
    except CheckpointException as error:  # which is no Exception, and is raised on all ranks
        causes = [failure[0] for failure in error.failures.values()]
        reason = in_short(causes[0]) if causes else "unknown"
        raise DWMError(f"{folder} cannot be loaded ({reason})") from error
    lost = sorted(name for name in unknown if not name.endswith(EXTRA_STATE))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise DWMError(f"{folder} has no {', '.join(lost[:3])}{more}", this_rank_only=True)
    return state


def load_weights(module: Any, weights: dict[str, Any], folder: str) -> None:
    """Loads a state dict that may lack extra states, and nothing else.

    Args:
        module: receives it.
        weights: name -> tensor or extra state.
        folder: the checkpoint that they are from.

    Raises:
        DWMError: a weight is missing or unknown.
    """
    found = module.load_state_dict(weights, strict=False)
    wrong = [n for n in (*found.missing_keys, *found.unexpected_keys) if EXTRA_STATE not in n]
    if wrong:
        raise DWMError(
            f"{folder} does not fit: {', '.join(sorted(wrong)[:3])}", this_rank_only=True
        )
