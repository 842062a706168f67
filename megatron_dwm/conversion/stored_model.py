"""Finds a model's tensors in a checkpoint, whichever way the trainer stored them.

Layers are stacked under one name, or have separate names; the same holds for experts. With
`singleton_local_shards`, Megatron also stores gate and up projection separately.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from megatron_dwm.conversion.dist_checkpoint import TensorInfo
from megatron_dwm.conversion.families import FAMILIES
from megatron_dwm.conversion.llama_layers import FUSED_NORM_NAMES
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.tensor_rules import Rule, joined
from megatron_dwm.errors import ConversionError

_LAYERS = "decoder.layers."
_EXPERTS = "mlp.experts.experts."
# Endings of gate and up if they are stored separately.
_HALVES = ("_w", "_v")


class Checkpoint(Protocol):
    """What is needed from an opened checkpoint."""

    folder: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> shape and dtype of every model tensor."""

    def load(self, name: str, index: int | tuple[int, ...] | None = None) -> torch.Tensor:
        """Loads a tensor, or an entry along its first dimensions."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """One stored tensor, or an entry of a stack: key, indices in the stack, shape of the entry."""

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


class StoredModel:
    """The tensors of one model in a checkpoint, under the names of its family's rules."""

    def __init__(self, checkpoint: Checkpoint, shape: ModelShape) -> None:
        """Finds every tensor.

        Args:
            checkpoint: The opened checkpoint.
            shape: The model's shape, with the padded vocabulary.
        """
        self.checkpoint = checkpoint
        self.shape = shape
        self.family = FAMILIES[shape.family]
        self.rules = self.family.rules(shape)
        # Name of the rule -> places; several places hold copies of one tensor.
        self._places: dict[str, list[_Place]] = {}
        for key, info in checkpoint.tensors.items():
            for name, place in self._entries(key, info.shape):
                self._places.setdefault(name, []).append(place)

    def _entries(self, key: str, size: tuple[int, ...]) -> list[tuple[str, _Place]]:
        """Returns the contents of a stored tensor: rule names and places."""
        if not key.startswith(_LAYERS):
            return [(key, _Place(key, (), size))]
        rest = key.removeprefix(_LAYERS)
        layers: list[tuple[tuple[int, ...], int]]
        single = re.fullmatch(r"(\d+)\.(.+)", rest)
        if single:
            layers = [((), int(single[1]))]
            rest = single[2]
        elif size[:1] == (self.shape.num_layers,):
            layers = [((number,), number) for number in range(self.shape.num_layers)]
            size = size[1:]
        else:
            return [(key, _Place(key, (), size))]
        found = []
        for index, number in layers:
            for more, name, inner in self._experts(rest, size):
                local = FUSED_NORM_NAMES.get(name, name)
                place = _Place(key, (*index, *more), inner)
                found.append((f"{_LAYERS}{number}.{local}", place))
        return found

    def _experts(
        self, name: str, size: tuple[int, ...]
    ) -> list[tuple[tuple[int, ...], str, tuple[int, ...]]]:
        """Splits a stack of experts: index in the stack, name in the layer, shape."""
        inner = name.removeprefix(_EXPERTS)
        stacked = name.startswith(_EXPERTS) and not re.match(r"\d+\.", inner)
        if not stacked or size[:1] != (self.shape.num_experts,):
            return [((), name, size)]
        return [((i,), f"{_EXPERTS}{i}.{inner}", size[1:]) for i in range(size[0])]

    def check(self) -> None:
        """Compares every name and shape with what the model needs.

        Raises:
            ConversionError: Names what is unknown, missing, of the wrong shape or contradictory.
        """
        issues = []
        needed: dict[str, tuple[int, ...]] = {}
        for rule in self.rules:
            halves = [rule.megatron + half for half in _HALVES]
            if any(name in self._places for name in halves):
                rows, *rest = rule.shape
                needed |= {name: (rows // 2, *rest) for name in halves}
            else:
                needed[rule.megatron] = rule.shape
        for name in needed.keys() - self._places.keys():
            issues.append(f"{name} is missing")
        for name, places in self._places.items():
            for place in places:
                if name not in needed:
                    issues.append(f"{place.key} {place.shape} is unknown")
                elif place.shape != needed[name]:
                    issues.append(f"{place.key} is {place.shape}, needs {needed[name]}")
        if self.shape.tied and "output_layer.weight" in self._places:
            issues.insert(0, "output_layer.weight is there though the embeddings are tied")
        issues = issues or self._contradictions()
        if issues:
            raise ConversionError(
                f"{self.checkpoint.folder} does not hold the {self.family.label} that its "
                f"arguments describe: {joined(sorted(issues))}."
            )

    def _contradictions(self) -> list[str]:
        """Returns the names that several tensors hold with different contents."""
        issues = []
        for name, places in self._places.items():
            first, *others = places
            for other in others:
                if not torch.equal(self._load(first), self._load(other)):
                    issues.append(f"{first.key} and {other.key} are both {name} and differ")
        return issues

    def load(self, rule: Rule) -> torch.Tensor:
        """Loads the tensor of a rule, in Megatron's layout.

        Raises:
            ConversionError: Chunks are missing or damaged.
        """
        places = self._places.get(rule.megatron)
        if places is None:
            halves = [self._load(self._places[rule.megatron + half][0]) for half in _HALVES]
            return torch.cat(halves)
        return self._load(places[0])

    def dtype(self) -> torch.dtype:
        """Returns the dtype of the embedding, which is that of the model."""
        return self.checkpoint.tensors["embedding.word_embeddings.weight"].dtype

    def _load(self, place: _Place) -> torch.Tensor:
        return self.checkpoint.load(place.key, place.index or None)
