"""Reads Megatron's `torch_dist` checkpoints in one process, without a process group.

The parallel layout that wrote the checkpoint does not matter: the format stores global tensors in
chunks, and a tensor, or one layer of a stack, is assembled from the chunks that it needs.

Checkpoints are partly pickles, and may come from anywhere. Nothing in them is imported or called:
anything that is not a plain container, an `argparse.Namespace`, a tensor or a record of
`torch.distributed.checkpoint` becomes an inert stand-in.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dwm.errors import ConversionError

TRACKER = "latest_checkpointed_iteration.txt"

# Tensors that do not belong to the model: the optimizer's state and the random states. The
# weighting model is under `dwm`.
_NOT_MODEL = re.compile(r"^(?:chained_\d+\.)?optimizer\.|^dwm[._]|^rng_state|^rerun_state|^common_")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def find_checkpoint(
    path: str | os.PathLike, iteration: int | None = None, *, legacy: bool = False
) -> Path:
    """Finds the folder of one checkpoint.

    Args:
        path: A run folder (with `latest_checkpointed_iteration.txt`) or the folder of one
            iteration (`iter_0000100`).
        iteration: The iteration to use from a run folder; None: the latest.
        legacy: Accept `mp_rank_*` folders too (`--ckpt-format torch`).

    Returns:
        The folder that holds `.metadata`, or the `mp_rank_*` folders.

    Raises:
        ConversionError: There is no such checkpoint, or it is not in `torch_dist` format.
    """
    root = Path(path)
    if not root.is_dir():
        raise ConversionError(
            f"--megatron-path {root} is not a folder; give a run or an iter_ folder."
        )
    if re.fullmatch(r"iter_\d{7,}|release", root.name) or (root / ".metadata").exists():
        if iteration is not None and root.name != f"iter_{iteration:07d}":
            raise ConversionError(
                f"--iteration is {iteration}, and --megatron-path {root} is one checkpoint "
                "already; leave out --iteration or give the run folder."
            )
        folder = root
    else:
        folder = root / _iteration_folder(root, iteration)
    if not folder.is_dir():
        present = sorted(p.name for p in root.glob("iter_*") if p.is_dir())
        listing = f"it has {', '.join(present[-5:])}" if present else "it has no iter_ folder"
        raise ConversionError(f"{root} has no checkpoint {folder.name}; {listing}.")
    if legacy and any(folder.glob("mp_rank_*")):
        return folder
    if not (folder / ".metadata").is_file():
        raise ConversionError(
            f"{folder} has no .metadata file, so it is not a finished torch_dist checkpoint. "
            "Save it with --ckpt-format torch_dist (Megatron's default), or load it in "
            "Megatron and save it again with --ckpt-convert-format torch_dist."
        )
    return folder


def _iteration_folder(root: Path, iteration: int | None) -> str:
    if iteration is not None:
        return f"iter_{iteration:07d}"
    tracker = root / TRACKER
    if not tracker.is_file():
        raise ConversionError(
            f"{root} has no {TRACKER}; give a run folder, an iter_ folder, or --iteration."
        )
    text = tracker.read_text().strip()
    if text == "release":
        return text
    if not text.isdigit():
        raise ConversionError(f"{tracker} holds {text!r}; it must hold a number or 'release'.")
    return f"iter_{int(text):07d}"


class TorchDistCheckpoint:
    """One checkpoint: the run's arguments, the model's tensors, and a way to load them.

    Attributes:
        folder: The folder of the iteration.
        args: The arguments that the run was started with (`argparse.Namespace`).
        iteration: The iteration that was saved.
        tensors: Name -> `TensorInfo` of every model tensor, without optimizer, random and
            weighting-model state.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """Opens a checkpoint folder, as `find_checkpoint` returns it.

        Raises:
            ConversionError: The files are damaged, or the arguments are missing.
        """
        self.folder = Path(folder)
        self._reader = FileSystemReader(self.folder)
        self._metadata = _read_metadata(self.folder / ".metadata")
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        common = self._common_state()
        self.args = common.get("args")
        if not isinstance(self.args, argparse.Namespace):
            raise ConversionError(
                f"{self.folder} carries no training arguments, which say what the model is."
            )
        self.iteration = int(common.get("iteration", 0))
        self.tensors = {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
            and not _NOT_MODEL.search(name)
            and "._extra_state" not in name
        }

    def load(self, name: str, index: int | tuple[int, ...] | None = None) -> torch.Tensor:
        """Loads one tensor, or one entry along its first dimension or dimensions.

        Args:
            name: A key of `tensors`.
            index: Entry of a stack `[layers, ...]` or `[layers, experts, ...]` to load; None
                loads the whole tensor.

        Returns:
            The tensor, `[...]` without the dimensions that `index` counts in.

        Raises:
            ConversionError: Chunks are missing or damaged.
        """
        entry = self._metadata.state_dict_metadata[name]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        entry_of = (index,) if isinstance(index, int) else index or ()
        for dim, number in enumerate(entry_of):
            offsets[dim], sizes[dim] = number, 1
        out = torch.empty(sizes, dtype=entry.properties.dtype)
        part = dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, entry, [part])
        # A chunk that is on several ranks is stored once, so the reads must cover it exactly.
        if sum(item.lengths.numel() for item in items) != out.numel():
            raise ConversionError(f"{self.folder} does not hold all chunks of {name}.")
        try:
            self._reader.read_data(planner.LoadPlan(items), _IntoTensor(out))
        except Exception as error:
            raise ConversionError(f"{self.folder}: reading {name} failed: {error}") from error
        return out[(0,) * len(entry_of)]

    def _common_state(self) -> dict[str, Any]:
        """Reads the common state: from `common.pt`, or from inside the checkpoint (>= 0.18)."""
        legacy = self.folder / "common.pt"
        if legacy.is_file():
            return load_restricted(legacy.read_bytes(), legacy)
        key = dcp.MetadataIndex("common_state/shard_0_1")
        info = self._metadata.storage_data.get(key)
        if info is None:
            raise ConversionError(f"{self.folder} has neither common.pt nor a common state.")
        path = self.folder / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            common = load_restricted(file.read(info.length), path)
        return common[0] if isinstance(common, list) else common


class _IntoTensor(planner.LoadPlanner):
    """Load planner that fills one tensor, which is all that `FileSystemReader` asks for."""

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out

    def resolve_tensor(self, read_item: planner.ReadItem) -> torch.Tensor:
        view = self._out
        # A read item counts destination offsets from the requested part's own corner.
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: planner.ReadItem, tensor: torch.Tensor) -> None:
        pass

    # Not unfinished: abstract in the base class, and called by planning only, which `load` does by
    # itself.
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("plans are made by TorchDistCheckpoint.load")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner


# --------------------------------------------------------------------------- unpickling


class _Inert:
    """Stands in for a class that is not imported: keeps its arguments, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self, 'args', ())}>"


def _inert(name: str) -> type:
    return type(name, (_Inert,), {})


def load_restricted(data: bytes | Path, source: str | os.PathLike) -> Any:
    """Unpickles a file from `torch.save` without importing or calling anything that it names.

    Args:
        data: The bytes of the file, or a path, whose tensors are then memory-mapped, not read.
        source: The file's name, for messages.

    Returns:
        The object; classes other than `argparse.Namespace` and torch's own are stand-ins.

    Raises:
        ConversionError: The data is damaged or asks for something that no checkpoint needs.
    """
    mapped = isinstance(data, Path)

    def opened() -> Any:
        return data if isinstance(data, Path) else io.BytesIO(data)

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(opened())
        allowed: list[Any] = [argparse.Namespace]
        allowed += [(_inert(name), name) for name in names if name != "argparse.Namespace"]
        with torch.serialization.safe_globals(allowed):
            return torch.load(opened(), map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"{source} cannot be read as a checkpoint: {reason}") from error


class _MetadataUnpickler(pickle.Unpickler):
    """Loads the records of `torch.distributed.checkpoint`; everything else becomes `_Inert`."""

    _EXACT = {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("collections", "OrderedDict"): collections.OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._EXACT:
            return self._EXACT[module, name]
        found = None
        if module == "torch":
            found = vars(torch).get(name)
        elif module in (dcp.__name__, planner.__name__, filesystem.__name__):
            found = vars(__import__(module, fromlist=[name])).get(name)
        if isinstance(found, torch.dtype):
            return found
        if isinstance(found, type) and (
            dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)
        ):
            return found
        return _inert(f"{module}.{name}")


def _read_metadata(path: Path) -> dcp.Metadata:
    def load(file: BinaryIO) -> Any:
        return _MetadataUnpickler(file).load()

    with path.open("rb") as file:
        try:
            metadata = load(file)
        except Exception as error:
            raise ConversionError(f"{path} is damaged: {error}") from error
    if not isinstance(metadata, dcp.Metadata) or metadata.storage_data is None:
        raise ConversionError(f"{path} is not the index of a torch_dist checkpoint.")
    return metadata
