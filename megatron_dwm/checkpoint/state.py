"""The weighting model's state inside Megatron's own `torch_dist` checkpoint, and its snapshots.

Everything is under the key `dwm` of the trainer's state dict: tensors of a separate weighting model
(`dwm.*`), its optimizer, the policy's own state (`dwm_policy`, an object that is the same on all
ranks of the last pipeline stage), the position in the meta data, the counts of meta steps and of
bad steps, and the account of the overhead budget. The schedule is a function of the iteration, so
the iteration is its state; its settings are stored to notice a change. The stock trainer can load
such a checkpoint: it does not ask for the extra keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_dwm.checkpoint import optimizer_state
from megatron_dwm.config import flag
from megatron_dwm.core.agreement import on_each_rank
from megatron_dwm.core.optimizers import leaf_optimizers
from megatron_dwm.core.stored_state import common_state, load_sharded, load_weights
from megatron_dwm.errors import DWMError
from megatron_dwm.step.train_step import DWMTrainStep
from megatron_dwm.weighting_model.scorer import set_hyperparameters

KEY = "dwm"
_PREFIX = "dwm."
_POLICY = "dwm_policy"


def state_for_saving(
    step: DWMTrainStep,
    metadata: dict | None,
    with_optimizer: bool = True,
    run: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the DWM's sharded state.

    Args:
        step: holds the state that lasts from step to step.
        metadata: the trainer's sharding metadata (its `dp_cp_group` numbers the replicas).
        with_optimizer: whether the DWM's optimizer is saved too (not `--no-save-optim`).
        run: plain values about the run (its command); they need not agree on resume.
        sampling: the weights by which documents were drawn; None: they were not.
    """
    with_optimizer = with_optimizer and _optimizer_has_state(step)
    state = sharded_state(step, metadata, with_optimizer, loading=False)
    return {**state, "run": run, "sampling": sampling}


def saved_sampling(folder: str) -> dict[str, Any] | None:
    """Returns the weights by which the documents of a checkpoint's run were drawn, or None.

    Args:
        folder: the checkpoint's folder, `.../iter_0000100`.
    """
    return (common_state(folder).get(KEY) or {}).get("sampling")


def saved_run(folder: str) -> dict[str, Any] | None:
    """Returns a checkpoint's description of its run; None if it has no DWM.

    Args:
        folder: the checkpoint's folder, `.../iter_0000100`.

    Returns:
        The saved values; empty for a checkpoint of an older version.
    """
    found = common_state(folder).get(KEY)
    if found is None or found["shape"] is None:
        return None
    return found.get("run") or {}


def _optimizer_has_state(step: DWMTrainStep) -> bool:
    """Returns, the same on every rank, whether the DWM's optimizer has taken any step."""
    if step.scorer is None:
        return False
    found = any(len(leaf.optimizer.state) for leaf in leaf_optimizers(step.scorer.optimizer))
    has_state = torch.tensor([float(found)], device=step.shape.device)
    torch.distributed.all_reduce(has_state, op=torch.distributed.ReduceOp.MAX)
    return bool(has_state.item())


def sharded_state(
    step: DWMTrainStep, metadata: dict | None, with_optimizer: bool, loading: bool
) -> dict[str, Any]:
    """Returns the sharded state of the weighting model, its optimizer and the policy."""
    state: dict[str, Any] = {
        "shape": step.policy.description(),
        "stages": step.schedule.description(),
        "meta_steps_taken": step.meta_steps_taken,
        "warm_started": step.warm_started,
        "has_optimizer": with_optimizer,
        "meta_data": None if step.meta_data is None else step.meta_data.state_dict(),
        "overhead_budget": None if step.budget is None else step.budget.state_dict(),
        "bad_steps": step.bad_steps.state_dict(),
        "ranks": _layout(step),
        "policy_common": step.policy.common_state(),
    }
    state.update(_policy_state(step, loading))
    if step.scorer is not None:
        metadata = {"dp_cp_group": step.groups.dp_cp, **(metadata or {})}
        state["model"] = step.scorer.module.sharded_state_dict(prefix=_PREFIX, metadata=metadata)
        if with_optimizer:
            state["optimizer"] = optimizer_state.sharded_state(
                step.scorer, state, metadata, loading
            )
            if step.scorer.sharded:
                state["optimizer_sharded"] = True
    return state


def _policy_state(step: DWMTrainStep, loading: bool) -> dict[str, Any]:
    """Returns the policy's own state, and this rank's part of it, as sharded objects."""
    if step.policy.description() is None:
        return {}
    found: dict[str, Any] = {}
    groups, rank = step.groups, torch.distributed.get_rank()
    # Waits for pending sums, so it must run on every rank that takes part in them.
    state = step.policy.state_dict() if step.sees_losses else {}
    if step.sees_losses:
        replica = (0, groups.tp.rank(), groups.dp_cp.rank())
        found["policy"] = ShardedObject(
            _POLICY, None if loading else state, (1,), (0,), replica_id=replica
        )
    local = step.policy.local_state_dict()
    if local:
        size = torch.distributed.get_world_size()
        data = None if loading else local
        found["policy_of_rank"] = ShardedObject(f"{_POLICY}_of_rank", data, (size,), (rank,))
    return found


def load(step: DWMTrainStep, folder: str, with_optimizer: bool = True) -> str:
    """Loads the DWM's state from one of the trainer's checkpoints.

    Args:
        step: receives the state.
        folder: the checkpoint's folder, `.../iter_0000100`.
        with_optimizer: whether to load the DWM's optimizer (not `--no-load-optim`).

    Returns:
        A line for the log: what was loaded, or that the DWM starts fresh.

    Raises:
        DWMError: the checkpoint's DWM has another shape.
    """
    found = on_each_rank(partial(common_state, folder)).get(KEY)
    if step.policy.description() is None:
        return f"DWM: policy {step.config.policy}, nothing to load"
    if found is None or found["shape"] is None:
        return f"DWM: {folder} holds no weighting model; a fresh one starts"
    check_shape(step, found["shape"], folder)
    with_optimizer = with_optimizer and found["has_optimizer"]
    same_ranks = found.get("ranks") == _layout(step)
    if found.get("policy_common"):
        step.policy.load_common_state(found["policy_common"])
    as_it_is = with_optimizer and not _other_optimizer(step, found)
    state = load_sharded_state(step, folder, as_it_is, has_policy(found), same_ranks)
    if with_optimizer and step.scorer is not None:
        if not as_it_is:
            # On every rank, because loading is a collective: a pipeline stage may hold nothing of
            # it.
            wanted = sharded_state(step, None, True, loading=True).get("optimizer", {})
            state["optimizer"] = optimizer_state.load_whole_as_sharded(
                wanted, found["optimizer"], KEY, _PREFIX, folder
            )
        if leaf_optimizers(step.scorer.optimizer):
            step.scorer.optimizer.load_state_dict(state["optimizer"])
            set_hyperparameters(step.scorer.optimizer, step.config)
    step.meta_steps_taken = int(found["meta_steps_taken"])
    step.warm_started = step.warm_start is None or bool(found["warm_started"])
    if step.meta_data is not None and found["meta_data"] is not None:
        step.meta_data.load_state_dict(found["meta_data"])
    # Missing in a checkpoint of a run without one, or of an older version.
    account = found.get("overhead_budget")
    if step.budget is not None and account is not None:
        step.budget.load_state_dict(account)
    # Missing in a checkpoint of an older version.
    if found.get("bad_steps") is not None:
        step.bad_steps.load_state_dict(found["bad_steps"])
    line = f"DWM: loaded from {folder} after {step.meta_steps_taken} meta steps"
    planned, plans = found.get("stages"), step.schedule.description()
    if planned is not None and planned != plans:
        line += f"; NOTE: the schedule was {planned} when it was saved and is now {plans}"
    return line


def _other_optimizer(step: DWMTrainStep, found: dict[str, Any]) -> bool:
    """Returns whether the DWM's optimizer is sharded and the checkpoint's was not."""
    if step.scorer is None:
        return False
    was_sharded = optimizer_is_sharded(found)
    assert step.scorer.sharded or not was_sharded, "refused before the trainer loads"
    return was_sharded != step.scorer.sharded


def optimizer_is_sharded(found: dict[str, Any]) -> bool:
    """Returns whether a checkpoint holds the state of a sharded optimizer of the DWM.

    Checkpoints of older versions do not.
    """
    return bool(found.get("optimizer_sharded"))


def _layout(step: DWMTrainStep) -> dict[str, int]:
    """Returns what must be the same for a rank to continue with its own part of the state."""
    names = ("tp", "pp", "cp", "dp")
    sizes = {name: getattr(step.groups, name).size() for name in names}
    return {**sizes, "micro_batch_size": step.shape.micro_batch_size}


def has_policy(found: dict[str, Any]) -> bool:
    """Returns whether a checkpoint holds a policy's own state; older versions did not."""
    return "ranks" in found


def load_sharded_state(
    step: DWMTrainStep,
    folder: str,
    with_optimizer: bool,
    with_policy: bool = False,
    with_ranks_own: bool = False,
) -> dict[str, Any]:
    """Loads the requested tensors of a checkpoint: weights, optimizer and policy."""
    wanted = sharded_state(step, None, with_optimizer, loading=True)
    names = ["model", "optimizer"]
    names += ["policy"] if with_policy else []
    names += ["policy_of_rank"] if with_policy and with_ranks_own else []
    request = {KEY: {name: wanted[name] for name in names if name in wanted}}
    # A pipeline stage may lack what others do not ask for.
    state = on_each_rank(partial(_load_requested, step, request, folder))
    if step.scorer is not None and not with_optimizer:
        # With the optimizer, its own, more precise copies come from the checkpoint.
        step.scorer.weights_changed()
    return state


def _load_requested(step: DWMTrainStep, request: dict[str, Any], folder: str) -> dict[str, Any]:
    """Loads the request into policy and weighting model; returns it."""
    state = load_sharded(request, folder)[KEY]
    if "policy" in state:
        step.policy.load_state_dict(state["policy"])
    if "policy_of_rank" in state:
        step.policy.load_local_state_dict(state["policy_of_rank"])
    if step.scorer is not None:
        # A pipeline stage that holds nothing of the DWM asked for nothing and got nothing.
        loaded = state.get("model", {})
        weights = {name.removeprefix(_PREFIX): value for name, value in loaded.items()}
        load_weights(step.scorer.module, weights, folder)
    return state


def check_shape(step: DWMTrainStep, found: dict[str, Any], folder: str) -> None:
    """Refuses a checkpoint whose weighting model has another form or shape."""
    wanted, flags = step.policy.description() or {}, step.config.shape()
    if found.get("form", "model") != wanted.get("form", "model"):
        raise DWMError(
            f"the weighting in {folder} is of the form {found.get('form', 'model')}, but this "
            f"run's is {wanted.get('form', 'model')}; use --dwm-policy and --dwm-form as before, "
            "or start over (--finetune, or another --load)"
        )
    different = [
        f"{flag(name) if name in flags else name} is {value}, the checkpoint's is {found[name]}"
        for name, value in wanted.items()
        if name in found and value != found[name]
    ]
    if different:
        way_out = "the --dwm-init, sizes and tokenizer"
        if wanted.get("form") == "head":
            way_out = "the settings"
        raise DWMError(
            f"the weighting model in {folder} has another shape: {'; '.join(different)}. Use "
            f"{way_out} that it was made with, or start with a fresh DWM (another --save)"
        )
