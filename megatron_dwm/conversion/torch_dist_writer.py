"""Writes a model as one of Megatron's `torch_dist` checkpoints, tensor by tensor.

It runs in one process, without a process group or GPU. Tensors are requested one at a time, so that
only one layer is in memory, never the model. It writes what the trainer's own save writes for the
model: layers (and experts) stacked under one name, in chunks of one; the objects that layers keep
beside their weights, empty; and the arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_dwm.conversion.llama_layers import FUSED_NORM_NAMES
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.tensor_rules import Rule

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.experts\.)(\d+)\.(.+)")
_FUSED = {local: fused for fused, local in FUSED_NORM_NAMES.items()}

# Modules that keep extra state beside the weights (usually FP8 scales), in either of Megatron's
# layer implementations, which look for it when they load. Without FP8 it is empty.
_STATEFUL = (
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One piece of a stored tensor.

    Attributes:
        key: Name in the checkpoint.
        shape: Shape of the whole tensor.
        offsets: Where the piece begins.
        sizes: Its size, 1 along the dimensions that stack layers and experts.
        rule: What it holds.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    rule: Rule


def chunks(rule: Rule, shape: ModelShape) -> Iterator[Chunk]:
    """Yields the places where the trainer looks for the tensor of a rule.

    In a mixture of experts, the norm before the MLP has two names: Megatron's own layers use that
    of fused norms, Transformer Engine's use its own. It is written under both.
    """
    match = _LAYER.fullmatch(rule.megatron)
    if match is None:
        zeros = (0,) * len(rule.shape)
        yield Chunk(rule.megatron, rule.shape, zeros, rule.shape, rule)
        return
    stack: tuple[int, ...] = (shape.num_layers,)
    index: tuple[int, ...] = (int(match[1]),)
    name = match[2]
    expert = _EXPERT.fullmatch(name)
    if expert is not None:
        stack, index = (*stack, shape.num_experts), (*index, int(expert[2]))
        name = expert[1] + expert[3]
    names = [_FUSED.get(name, name)]
    if shape.num_experts and name.startswith("pre_mlp_layernorm."):
        names.append(name)
    rest = rule.shape
    for stored in names:
        yield Chunk(
            f"decoder.layers.{stored}",
            (*stack, *rest),
            (*index, *(0,) * len(rest)),
            (*(1,) * len(stack), *rest),
            rule,
        )


def empty_objects(shape: ModelShape, rules: list[Rule]) -> list[str]:
    """Returns the names of the objects that layers keep beside their weights."""
    layers = shape.num_layers
    names = ["decoder.final_layernorm._extra_state/shard_0_1"]
    inner = [_LAYER.fullmatch(rule.megatron) for rule in rules]
    local = {match[2].rpartition(".")[0] for match in inner if match}
    experts = {name for name in local if name.startswith("mlp.experts.")}
    dense = set(_STATEFUL) if not experts else {n for n in _STATEFUL if not n.startswith("mlp.")}
    dense |= {name for name in local if name.endswith("layernorm")}
    for layer in range(layers):
        names += [f"decoder.layers.{n}._extra_state/shard_{layer}_{layers}" for n in sorted(dense)]
        for name in sorted(experts):
            _, number, part = _EXPERT.fullmatch(name).groups()  # type: ignore[union-attr]
            place = f"shard_{layer}.{number}_{layers}.{shape.num_experts}"
            names.append(f"decoder.layers.mlp.experts.experts.{part}._extra_state/{place}")
    return names


def write_checkpoint(
    folder: Path,
    shape: ModelShape,
    rules: list[Rule],
    args: argparse.Namespace,
    dtype: torch.dtype,
    load: Callable[[Rule], torch.Tensor],
) -> None:
    """Writes a checkpoint that the trainer loads without an optimizer.

    Args:
        folder: Folder of the checkpoint, created if needed (`OUT/release`).
        shape: The model's shape, with the padded vocabulary.
        rules: The model's rules for that shape.
        args: The arguments to store in the checkpoint.
        dtype: Dtype of all tensors.
        load: Called once for each stored piece, just before it is written; returns a tensor of
            the rule's shape with its own storage.

    Raises:
        ConversionError: What `load` raises.
    """
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    objects: dict[str, Any] = {"common_state/shard_0_1": [common]}
    objects |= {name: [None] for name in empty_objects(shape, rules)}
    pieces = [chunk for rule in rules for chunk in chunks(rule, shape)]
    plan = _Planner(pieces, objects, dtype, load)
    folder.mkdir(parents=True, exist_ok=True)
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    # Same as `torch.distributed.checkpoint.save`, but without wrapping errors.
    plan.set_up_planner({}, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    local = writer.prepare_local_plan(plan.create_local_plan())
    plans, metadata = plan.create_global_plan([local])
    final = plan.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(final, plan).wait()])
    settings = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(settings), encoding="utf-8")


class _Planner(DefaultSavePlanner):
    """Plans all pieces from their shapes, and fetches each when it is written."""

    def __init__(
        self,
        pieces: list[Chunk],
        objects: dict[str, Any],
        dtype: torch.dtype,
        load: Callable[[Rule], torch.Tensor],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = {(p.key, torch.Size(p.offsets)): p for p in pieces}
        self._objects = objects
        self._dtype = dtype
        self._load = load

    def create_local_plan(self) -> planner.SavePlan:
        properties = dcp.TensorProperties(dtype=self._dtype)
        items = [
            planner.WriteItem(dcp.MetadataIndex(name), planner.WriteItemType.BYTE_IO)
            for name in self._objects
        ]
        for piece in self._pieces.values():
            offsets = torch.Size(piece.offsets)
            data = planner.TensorWriteData(
                chunk=dcp.ChunkStorageMetadata(offsets, torch.Size(piece.sizes)),
                properties=properties,
                size=torch.Size(piece.shape),
            )
            index = dcp.MetadataIndex(piece.key, offsets)
            items.append(planner.WriteItem(index, planner.WriteItemType.SHARD, tensor_data=data))
        self.plan = planner.SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: planner.WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == planner.WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[index.fqn], buffer)
            return buffer
        assert index.offset is not None, "every piece is planned with its offsets"
        piece = self._pieces[index.fqn, index.offset]
        return self._load(piece.rule).view(piece.sizes)
