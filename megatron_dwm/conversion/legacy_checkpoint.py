"""Reads Megatron's `mp_rank_*` checkpoints (`--ckpt-format torch`) in one process.

Every tensor-parallel and pipeline rank wrote its own file. The files are memory-mapped, not read,
and a tensor is assembled from its shards on request; the optimizer's state in the same files is
never touched. Unpickling is as restricted as elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.conversion.dist_checkpoint import TensorInfo, load_restricted
from megatron_dwm.errors import ConversionError

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")

# Inside a layer: weights whose input is sharded (dimension 1); all others, except norms and their
# biases, are sharded by output (dimension 0).
_ROW_PARALLEL = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_COLUMN_PARALLEL = (
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
    "linear_fc1.bias",
)


def is_legacy(folder: str | os.PathLike) -> bool:
    """Returns whether a folder is one iteration of a legacy checkpoint."""
    return any(path.is_dir() for path in Path(folder).glob("mp_rank_*"))


class LegacyCheckpoint:
    """One checkpoint of `mp_rank_*` folders, with the tensors of all ranks assembled.

    Attributes:
        folder: The folder of the iteration.
        args: The arguments that the run was started with (`argparse.Namespace`).
        iteration: The iteration that was saved.
        tensors: Name -> `TensorInfo` of every model tensor, layers counted over all stages.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """Opens a checkpoint folder, as `find_checkpoint` returns it.

        Raises:
            ConversionError: Files are missing or damaged, or the model is a mixture of experts.
        """
        self.folder = Path(folder)
        files = self._files()
        states = {rank: self._open(path) for rank, path in files.items()}
        first = states[0, 0]
        self.args: Any = first.get("args")
        if not isinstance(self.args, argparse.Namespace):
            raise ConversionError(
                f"{self.folder} carries no training arguments, which say what the model is."
            )
        version = first.get("checkpoint_version", 0)
        if version < 2:
            raise ConversionError(
                f"{self.folder} has checkpoint_version {version}, whose attention has another "
                "order of heads; load it in Megatron and save it again."
            )
        if getattr(self.args, "num_experts", None):
            raise ConversionError(
                f"{self.folder} is a legacy checkpoint with --num-experts "
                f"{self.args.num_experts}; only dense ones are read. Load it in Megatron and save "
                "it again with --ckpt-convert-format torch_dist."
            )
        self.iteration = int(first.get("iteration") or 0)
        tp, pp = (1 + max(rank[i] for rank in files) for i in (0, 1))
        # Name -> the shards of all tensor-parallel ranks.
        self._shards: dict[str, list[torch.Tensor]] = {}
        for number in range(tp):
            for name, tensor in self._rank_tensors([states[number, stage] for stage in range(pp)]):
                self._shards.setdefault(name, []).append(tensor)
        short = [name for name, shards in self._shards.items() if len(shards) != tp]
        if short:
            raise ConversionError(
                f"{self.folder} has {short[0]} on {len(self._shards[short[0]])} of {tp} "
                "tensor-parallel ranks."
            )
        self.tensors = {
            name: TensorInfo(self._merged_shape(name, shards), shards[0].dtype)
            for name, shards in self._shards.items()
        }

    def _files(self) -> dict[tuple[int, int], Path]:
        """Returns (tensor rank, pipeline rank) -> file, and checks that none is missing."""
        found = {}
        for path in self.folder.glob("mp_rank_*"):
            match = _RANK.fullmatch(path.name)
            if match is None:
                raise ConversionError(
                    f"{path} is the folder of an expert-parallel rank; only dense models are read "
                    "from mp_rank_ folders."
                )
            found[int(match[1]), int(match[2] or 0)] = path / FILE
        tp, pp = (1 + max(rank[i] for rank in found) for i in (0, 1))
        for rank in ((t, p) for t in range(tp) for p in range(pp)):
            if rank not in found or not found[rank].is_file():
                raise ConversionError(
                    f"{self.folder} lacks {FILE} of tensor rank {rank[0]}, pipeline rank "
                    f"{rank[1]} ({tp} x {pp} ranks wrote it); copy all mp_rank_ folders."
                )
        return found

    def _open(self, path: Path) -> dict[str, Any]:
        state = load_restricted(path, path)
        if not isinstance(state, dict) or not ({"model", "model0"} & state.keys()):
            raise ConversionError(f"{path} holds no model.")
        return state

    def _rank_tensors(self, stages: list[dict[str, Any]]) -> list[tuple[str, torch.Tensor]]:
        """Returns the tensors of one tensor-parallel rank, layers counted over all stages.

        Virtual stages follow the order of the layers: the first chunk of every stage, then the
        second of every stage.
        """
        chunks = sum(re.fullmatch(r"model\d*", key) is not None for key in stages[0])
        keys = ["model"] if chunks == 1 and "model" in stages[0] else []
        keys = keys or [f"model{number}" for number in range(chunks)]
        found: dict[str, torch.Tensor] = {}
        offset = 0
        for key in keys:
            for stage in stages:
                layers = 0
                for name, tensor in stage.get(key, {}).items():
                    if not isinstance(tensor, torch.Tensor) or name.endswith("_extra_state"):
                        continue
                    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
                    if match:
                        layers = max(layers, int(match[1]) + 1)
                        name = f"decoder.layers.{offset + int(match[1])}.{match[2]}"
                    # The last stage of a tied model has its own copy of the embedding.
                    found.setdefault(name, tensor)
                offset += layers
        if not self.args.untie_embeddings_and_output_weights:
            found.pop("output_layer.weight", None)
        return list(found.items())

    def _merged_shape(self, name: str, shards: list[torch.Tensor]) -> tuple[int, ...]:
        shape = list(shards[0].shape)
        dim = _sharded_dim(name)
        if dim is not None:
            shape[dim] = sum(shard.shape[dim] for shard in shards)
        return tuple(shape)

    def load(self, name: str, index: int | tuple[int, ...] | None = None) -> torch.Tensor:
        """Loads one tensor, assembled from the shards of all tensor-parallel ranks.

        Args:
            name: A key of `tensors`.
            index: Entry along the first dimensions; None loads the whole tensor.

        Returns:
            The tensor, unsharded.

        Raises:
            ConversionError: A tensor that every rank holds differs between them.
        """
        shards = self._shards[name]
        dim = _sharded_dim(name)
        if dim is None:
            if any(not torch.equal(shards[0], shard) for shard in shards[1:]):
                raise ConversionError(
                    f"{self.folder}: {name} differs between tensor-parallel ranks, which all have "
                    "the whole of it."
                )
            whole = shards[0]
        elif getattr(self.args, "swiglu", False) and "linear_fc1." in name:
            # Every rank has its part of the gate followed by its part of the up projection.
            halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
            whole = torch.cat([part for half in halves for part in half])
        else:
            whole = torch.cat(shards, dim=dim)
        return whole if index is None else whole[index]


def _sharded_dim(name: str) -> int | None:
    if name.endswith(_ROW_PARALLEL):
        return 1
    return 0 if name.endswith(_COLUMN_PARALLEL) else None
