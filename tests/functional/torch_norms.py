"""Sequence parallelism without Transformer Engine: torch's norms in place of fused ones."""

import contextlib

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm


def _build(cls, config, hidden_size, eps=1e-5, **kwargs):
    """Builds torch's norm where Megatron's wrapper refuses, marked as fused norms are."""
    kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    norm = kinds[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = True
    return norm


@contextlib.contextmanager
def torch_norms():
    """Lets the local layers be built with `--sequence-parallel` within it."""
    kept = WrappedTorchNorm.__new__
    WrappedTorchNorm.__new__ = _build
    try:
        yield
    finally:
        WrappedTorchNorm.__new__ = kept
