"""Part of the CPU stand-in: Megatron's distributed optimizer on top of torch's AdamW."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch


def mend_distributed_optimizer(module: types.ModuleType) -> None:
    """Lets the distributed optimizer load its checkpoints with torch's AdamW.

    Without Apex and Transformer Engine, Megatron 0.19 keeps the step in each parameter's state.
    Three things then fail. Its template for loading finds no step in a new optimizer and stops at
    an assertion. The parameters' states are written, including the step, in place into views of
    parameters. After loading, all parameters share one step tensor, which every step increments
    once per parameter. The step itself is saved with the parameter groups.

    A rank whose shard is only padding (few weights, many ranks) has no state with a step, and stops
    there too; the step of the other ranks is saved.
    """
    cls = module.DistributedOptimizer  # type: ignore[attr-defined]
    sharded_state_dict, load_state_dict = cls.sharded_state_dict, cls.load_state_dict
    state_dict = cls.state_dict
    get_states = cls._get_main_param_and_optimizer_states
    set_states = cls._set_main_param_and_optimizer_states

    @functools.wraps(get_states)
    def without_step(self: Any, model_param: Any) -> dict:
        states = get_states(self, model_param)
        states.pop("step", None)
        return states

    @functools.wraps(set_states)
    @torch.no_grad()
    def leaving_step(self: Any, model_param: Any, tensors: dict) -> None:
        set_states(self, model_param, {**tensors, "step": None})

    @functools.wraps(state_dict)
    def with_any_step(self: Any) -> dict:
        inner = self.optimizer
        if any(group["params"] for group in inner.param_groups):
            return state_dict(self)
        inner.state["nothing"] = {"step": torch.zeros(())}
        try:
            return state_dict(self)
        finally:
            del inner.state["nothing"]

    cls.state_dict = with_any_step
    cls._get_main_param_and_optimizer_states = without_step
    cls._set_main_param_and_optimizer_states = leaving_step

    @functools.wraps(sharded_state_dict)
    def with_template(self: Any, model_state: Any, is_loading: bool = False, *a: Any, **k: Any):
        inner = self.optimizer
        if is_loading and isinstance(inner, torch.optim.Adam) and not inner.state:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return sharded_state_dict(self, model_state, is_loading, *a, **k)

    @functools.wraps(load_state_dict)
    def with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in getattr(self.optimizer, "state", {}).values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    cls.sharded_state_dict, cls.load_state_dict = with_template, with_own_steps
