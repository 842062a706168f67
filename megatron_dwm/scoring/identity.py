"""Identifies models and corpora, so that scores of one are never used for another."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch

from megatron_dwm.data.index import IndexSummary


def digest_of(model: torch.nn.Module, described: dict[str, Any]) -> str:
    """Returns a digest of a model's parameters and of everything else its scores depend on.

    It covers the numbers, not the files: the same model saved in another layout, or in another
    place, has the same digest.

    Args:
        model: the model.
        described: shape and settings, as plain values.
    """
    digest = hashlib.sha256(repr(sorted(described.items())).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        value = parameter.detach().cpu().contiguous()
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def corpus_digest(index: IndexSummary) -> str:
    """Returns a digest of a corpus: its index, and the size and time of its `.bin`."""
    digest = hashlib.sha256()
    for array in (index.sequence_lengths, index.sequence_pointers, index.document_indices):
        digest.update(array)
    data = os.stat(f"{index.prefix}.bin")
    digest.update(f"{index.dtype} {data.st_size} {data.st_mtime_ns}".encode())
    return digest.hexdigest()
