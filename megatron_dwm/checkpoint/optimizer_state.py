"""The state of the weighting model's optimizer in a checkpoint, replicated or sharded.

If it is sharded over data-parallel ranks (`--use-distributed-optimizer`), it is stored in
Megatron's format `fully_reshardable`, whatever the LLM's format, under the keys

    optimizer.state.{param,exp_avg,exp_avg_sq}.dwm.*    tensors of each weight's shape, float32

so that it can be loaded in any layout, like a state that was not sharded. (`dp_reshardable` could
not, uses the same tensor names as the LLM's optimizer, and does not support ranks without a shard.)
A state that was not sharded differs only in the weights' fp32 copies,
`optimizer.state.fp32_param.dwm.*` or, if trained in fp32, the weights themselves, so a sharded
optimizer can load it too.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

from megatron_dwm.core.stored_state import load_sharded

_FORMAT = "fully_reshardable"


def sharded_state(
    scorer: Any, model_state: dict[str, Any], metadata: dict[str, Any], loading: bool
) -> dict[str, Any]:
    """Returns the sharded state of the DWM's optimizer.

    Args:
        scorer: holds the optimizer.
        model_state: holds the sharded state of the weights.
        metadata: Megatron's sharding metadata.
        loading: whether it is a request for loading.

    Returns:
        The state; empty on a pipeline stage that holds nothing of the DWM.
    """
    if scorer.sharded:
        metadata = {**metadata, "distrib_optim_sharding_type": _FORMAT}
        if next(scorer.module.parameters(), None) is None:
            return {}
    return scorer.optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)


def load_whole_as_sharded(
    wanted: dict[str, Any], stored: dict[str, Any], key: str, prefix: str, folder: str
) -> dict[str, Any]:
    """Loads the state of an optimizer that was not sharded into one that is.

    Args:
        wanted: the request of the sharded one.
        stored: the optimizer's common state in the checkpoint.
        key: key of the DWM's state.
        prefix: prefix of the names of the DWM's weights.
        folder: the checkpoint.

    Returns:
        The input of the sharded optimizer's `load_state_dict`.
    """
    # If trained in bf16, with fp32 copies of the weights, the inner state is nested one level
    # deeper.
    has_copies = "optimizer" in stored
    inner = stored["optimizer"] if has_copies else stored
    copies = f"optimizer.state.fp32_param.{prefix}" if has_copies else prefix
    apply_prefix_mapping(wanted, {f"optimizer.state.param.{prefix}": copies})
    request = {key: {"optimizer": {"param_state": wanted.get("param_state", {})}}}
    state = load_sharded(request, folder)[key]["optimizer"].get("param_state", {})
    groups = [{k: v for k, v in g.items() if k != "params"} for g in inner["param_groups"]]
    # torch counts steps per parameter, Transformer Engine and Apex per group; a group without
    # parameters on the saving rank has not counted.
    steps = [inner.get("state", {}).get("common_step", 0), *(g.get("step", 0) for g in groups)]
    step = max(int(number) for number in steps)
    return {
        "optimizer": {"param_groups": [{**g, "step": step} for g in groups]},
        "param_state": state,
        "param_state_sharding_type": _FORMAT,
    }
