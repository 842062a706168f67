"""Megatron's modules that run their layers as one fused operation of Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch


def is_fused_mlp(module: torch.nn.Module) -> bool:
    """Returns whether a module is Megatron's `TEFusedMLP` (`--use-transformer-engine-op-fuser`).

    Checked by name, because Transformer Engine is optional; by exact type, because a subclass
    quantises.
    """
    return _is_of_megatron(module, "TEFusedMLP")


def is_quantising_mlp(module: torch.nn.Module) -> bool:
    """Returns whether a module is the fused MLP that quantises, whatever the run's settings."""
    return _is_of_megatron(module, "TEFusedMLPWithGroupedLinear")


def run_layers(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs the layers of a fused MLP one by one.

    Args:
        mlp: a `TEFusedMLP`.
        x: its input `[s, b, h]`.

    Returns:
        `[s, b, h]`, without the bias that the transformer layer adds.
    """
    # The norm is part of the first layer. The fused operation's activation may differ from the
    # MLP's for unfused layers: for GELU it uses the tanh approximation.
    y, bias = mlp.linear_fc1(x)
    if bias is not None:
        y = y + bias
    config = mlp.config
    activation = mlp._make_activation_op(
        mlp.activation_func, config.gated_linear_unit, config.activation_func_fp8_input_store
    )
    return mlp.linear_fc2(activation(y))[0]


def _is_of_megatron(module: torch.nn.Module, name: str) -> bool:
    kind = type(module)
    return kind.__name__ == name and kind.__module__.split(".")[0] == "megatron"
