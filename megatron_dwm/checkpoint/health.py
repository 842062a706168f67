"""Checks whether a checkpoint folder is whole, without loading it and without a process group.

What is checked by default (one pass over the index, no tensor is read):

- `metadata.json`, which Megatron writes last: without it a save was not finished;
- `.metadata`, the index: it can be read, every chunk of every tensor is stored exactly once, and
  the chunks fill their tensor;
- every `.distcp` file: it exists, and its items fill it exactly, with lengths that fit their
  tensors;
- the common state (arguments, iteration, shape of the weighting model): CRC-32 and contents;
- `integrity.json` (from `--verify-integrity`), if there is one: SHA-256 of the small files.

`deep=True` reads everything: CRC-32 of every record, shape and dtype of every tensor, and all of
`integrity.json`.

`.metadata` has no checksum, but it holds names, places and sizes twice: of 3000 changed bytes, none
that made a difference went unnoticed. Without `integrity.json` no check can see two changes that
fit each other, or whole files of the same size from an earlier save.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import resource
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_dwm.conversion.dist_checkpoint import TRACKER, _read_metadata, load_restricted
from megatron_dwm.errors import ConversionError
from megatron_dwm.files.json_files import JsonError, json_type, read_object, shown

MARKER = "metadata.json"
INDEX = ".metadata"
MANIFEST = "integrity.json"
LEGACY_COMMON = "common.pt"
COMMON = "common_state/shard_0_1"
ITERATION = re.compile(r"iter_(\d{7,})")

# What Megatron writes into `metadata.json`; the last two by versions before 0.18.
_MARKER_VALUES = {
    "sharded_backend": ("torch_dist",),
    "sharded_backend_version": (1,),
    "common_backend": ("torch",),
    "common_backend_version": (1,),
}
# Each tensor is stored as its own zip file: records, their directory, alignment.
_LARGEST_ENVELOPE = 8192
_SHOWN = 4
# The (MS-DOS) attribute of a folder in a zip file.
_FOLDER = 0x10
# The objects of the unpickled index take more memory than its bytes.
_BYTES_OF_INDEX = 64


def problems_of(
    folder: str | os.PathLike, deep: bool = False, any_iteration: bool = False
) -> list[str]:
    """Lists what is wrong with one checkpoint or stage snapshot.

    Args:
        folder: `iter_*`, `release` or `dwm_stage_*`.
        deep: Read every tensor and every file.
        any_iteration: Accept a folder whose state is of another iteration than its name says.

    Returns:
        One line for each problem, which names the file; empty for a whole checkpoint. A folder in
        another format than `torch_dist` (`mp_rank_*` files) has its zip directories checked.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder.name} is not there"]
    try:
        legacy = sorted(folder.glob("mp_rank_*/*.pt"))
        if legacy and not (folder / INDEX).exists():
            return [line for path in legacy for line in _zip_problems(path, deep)]
        if not (folder / MARKER).is_file():
            return [f"{MARKER} is missing: the save was not finished"]
        marker = _marker_problems(folder / MARKER)
        if not (folder / INDEX).is_file():
            return [*marker, f"{INDEX}, the index of the tensors, is missing"]
        manifest = _manifest_problems(folder, deep)
        try:
            metadata = _read_index(folder / INDEX)
            index = [*_index_problems(metadata), *_file_problems(folder, metadata)]
        except OSError:
            raise
        except Exception as error:  # a damaged index may raise anything
            return [*marker, *manifest, f"{INDEX} is damaged ({_short(error)})"]
        found = [*marker, *manifest, *index]
        try:
            found = found or list(_common_problems(folder, metadata, any_iteration))
        except OSError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            return [f"the common state is damaged ({_short(error)})"]
        if deep and not found:
            found = list(_content_problems(folder, metadata))
    except OSError as error:
        return [f"{error.filename or folder.name} cannot be read ({error.strerror or error})"]
    return found


def iterations_of(run: str | os.PathLike) -> list[int]:
    """Returns the iterations that have folders in a run folder, in order, whole or not."""
    names = (ITERATION.fullmatch(path.name) for path in Path(run).iterdir() if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def tracked(run: str | os.PathLike) -> str | None:
    """Returns the name of the folder that a run's tracker names; None without a tracker.

    Raises:
        ConversionError: The tracker holds neither a number nor `release`.
    """
    path = Path(run) / TRACKER
    if not path.is_file():
        return None
    text = path.read_bytes()[:64].decode("utf-8", "replace").strip()
    if text == "release":
        return text
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise ConversionError(f"{path} holds {text!r}; it must hold an iteration or 'release'.")
    return f"iter_{int(text):07d}"


def last_whole(run: str | os.PathLike, before: int | None = None) -> int | None:
    """Returns the latest iteration of a run whose checkpoint is whole (by the cheap checks).

    Args:
        run: Run folder.
        before: Only iterations below it; None: all.
    """
    for iteration in reversed(iterations_of(run)):
        if before is not None and iteration >= before:
            continue
        if not problems_of(Path(run) / f"iter_{iteration:07d}"):
            return iteration
    return None


def common_state(folder: str | os.PathLike, metadata: dcp.Metadata | None = None) -> dict[str, Any]:
    """Reads a checkpoint's common state: arguments, iteration, the weighting model's shape.

    Args:
        folder: A `torch_dist` checkpoint or snapshot.
        metadata: Its index, if it was read already.

    Raises:
        ConversionError: It is missing or damaged; a wrong CRC-32 is noticed.
        OSError: A file cannot be read.
    """
    folder = Path(folder)
    legacy = folder / LEGACY_COMMON
    if legacy.is_file():
        data, path = legacy.read_bytes(), legacy
    else:
        metadata = metadata or _read_index(folder / INDEX)
        info = metadata.storage_data.get(dcp.MetadataIndex(COMMON))
        if info is None:
            raise ConversionError(f"{folder} has neither {LEGACY_COMMON} nor a common state.")
        path = folder / info.relative_path
        data = _slice(path, info.offset, info.length)
    broken = _broken_record(data)
    if broken:
        raise ConversionError(f"the common state in {path.name} is damaged ({broken})")
    common = load_restricted(data, path)
    common = common[0] if isinstance(common, list) and common else common
    if not isinstance(common, dict):
        raise ConversionError(f"the common state in {path.name} is not a dictionary")
    return common


# ------------------------------------------------------------------------------ the small files


def _marker_problems(path: Path) -> list[str]:
    try:
        value = read_object(path)
        for name in ("sharded_backend", "sharded_backend_version"):
            if name not in value:
                raise ValueError(f"{name} is missing")
        # Further entries of a later version do not matter here.
        for name, found in value.items():
            if found not in _MARKER_VALUES.get(name, (found,)):
                raise ValueError(f"{name!r} is {shown(found)}")
    except ValueError as error:
        return [f"{path.name} is damaged, or not of a torch_dist checkpoint ({_short(error)})"]
    return []


def _manifest_problems(folder: Path, deep: bool) -> list[str]:
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        value = read_object(path)
        digests = value.get("files")
        if not isinstance(digests, dict):
            raise JsonError(f"files is a JSON {json_type(digests)}, not an object")
        if str(value.get("algorithm", "sha256")).lower() != "sha256":
            return [f"{MANIFEST} names the unknown algorithm {shown(value['algorithm'])}"]
    except JsonError as error:
        return [f"{MANIFEST} is damaged ({_short(error)})"]
    found = []
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing, and {MANIFEST} names it")
        elif deep or not name.endswith(".distcp"):
            with file.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                    found.append(f"{name} is not what {MANIFEST} says (SHA-256 differs)")
    return found


def _common_problems(folder: Path, metadata: dcp.Metadata, any_iteration: bool) -> Iterator[str]:
    try:
        common = common_state(folder, metadata)
    except ConversionError as error:
        yield str(error)
        return
    numbered = ITERATION.fullmatch(folder.name)
    if numbered and not any_iteration and common.get("iteration") != int(numbered[1]):
        yield f"the common state is of iteration {common.get('iteration')!r}, not {folder.name}"


# ------------------------------------------------------------------------------------ the index


def _read_index(path: Path) -> dcp.Metadata:
    """Reads `.metadata`; one changed byte of a pickle can ask for any amount of memory."""
    with _memory_bounded(_BYTES_OF_INDEX * path.stat().st_size + (1 << 30)):
        return _read_metadata(path)


@contextlib.contextmanager
def _memory_bounded(more: int) -> Iterator[None]:
    """Makes allocations fail beyond the process's current memory plus `more` bytes (Linux only)."""
    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = now + more
    if soft != resource.RLIM_INFINITY and soft <= bound:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _index_problems(metadata: dcp.Metadata) -> Iterator[str]:
    """Compares the index with itself: tensors, chunks and the places where they are stored."""
    wanted: dict[dcp.MetadataIndex, int | None] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, dcp.BytesStorageMetadata):
            wanted[dcp.MetadataIndex(name)] = None
            continue
        if not isinstance(entry, dcp.TensorStorageMetadata):
            yield f"{INDEX} is damaged: {name!r} is neither a tensor nor an object"
            continue
        kept = entry.properties
        item = kept.dtype.itemsize
        if kept.layout != torch.strided or kept.memory_format != torch.contiguous_format:
            yield f"{INDEX} is damaged: {name} has the layout {kept.layout}, {kept.memory_format}"
        filled = 0
        for chunk in entry.chunks:
            wanted[dcp.MetadataIndex(name, chunk.offsets)] = math.prod(chunk.sizes) * item
            filled += math.prod(chunk.sizes)
            ends = [a + b for a, b in zip(chunk.offsets, chunk.sizes, strict=True)]
            inside = all(end <= size for end, size in zip(ends, entry.size, strict=True))
            if not inside or any(value < 0 for value in (*chunk.offsets, *chunk.sizes)):
                yield f"{INDEX} is damaged: a chunk of {name} lies outside of {list(entry.size)}"
        if filled != math.prod(entry.size):
            yield (
                f"{INDEX} is damaged: the chunks of {name} have {filled} values, "
                f"{math.prod(entry.size)} are needed"
            )
    stored = metadata.storage_data
    yield from _few(
        f"{INDEX} is damaged: it has no place for {index.fqn} at {index.offset}"
        for index in wanted.keys() - stored.keys()
    )
    yield from _few(
        f"{INDEX} is damaged: it has a place for {index.fqn!r} at {index.offset}, which is "
        "not one of its tensors"
        for index in stored.keys() - wanted.keys()
    )
    for index, needed in wanted.items():
        info = stored.get(index)
        if info is None or needed is None:
            continue
        if not needed <= info.length <= needed + _LARGEST_ENVELOPE:
            yield (
                f"{INDEX} is damaged: {index.fqn} takes {info.length} bytes in "
                f"{info.relative_path}, its {needed} bytes of values do not fit that"
            )


def _file_problems(folder: Path, metadata: dcp.Metadata) -> Iterator[str]:
    """Compares files with the index's account of their contents."""
    items: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for info in metadata.storage_data.values():
        items[info.relative_path].append((info.offset, info.length))
    for name, parts in sorted(items.items()):
        path = folder / name
        if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
            yield f"{INDEX} is damaged: it names the file {name!r}"
            continue
        if not path.is_file():
            yield f"{name} is missing"
            continue
        end = 0
        for offset, length in sorted(parts):
            if offset != end or length <= 0:
                yield f"{INDEX} is damaged: the items of {name} leave a gap or overlap at {end}"
                break
            end = offset + length
        else:
            size = path.stat().st_size
            if size != end:
                kind = "truncated" if size < end else "longer than when it was written"
                yield f"{name} is {kind}: {size} bytes, {end} were written"


# ---------------------------------------------------------------------------------- the contents


def _content_problems(folder: Path, metadata: dcp.Metadata) -> Iterator[str]:
    """Reads every item: CRC-32 of its records, and shape and dtype of a tensor."""
    sizes = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, dcp.TensorStorageMetadata):
            for chunk in entry.chunks:
                key = dcp.MetadataIndex(name, chunk.offsets)
                sizes[key] = (tuple(chunk.sizes), entry.properties.dtype)
    places = sorted(
        metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset)
    )
    for key, info in places:
        data = _slice(folder / info.relative_path, info.offset, info.length)
        broken = _broken_record(data)
        if broken:
            yield f"{info.relative_path}: {key.fqn} is damaged ({broken})"
            continue
        try:
            tensor = load_restricted(data, folder / info.relative_path)
        except ConversionError as error:
            yield f"{info.relative_path}: {key.fqn} is damaged ({_short(error)})"
            continue
        if key not in sizes:
            continue
        shape, dtype = sizes[key]
        found = (tuple(getattr(tensor, "shape", ())), getattr(tensor, "dtype", None))
        if not isinstance(tensor, torch.Tensor) or found != (shape, dtype):
            yield (
                f"{info.relative_path} holds {found[0]} {found[1]} where {INDEX} has {key.fqn}, "
                f"{shape} {dtype}"
            )


def _slice(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _broken_record(data: bytes) -> str | None:
    """Returns what is wrong with a zip file from `torch.save`; None if every CRC-32 fits."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            return _bad_record(file)
    except Exception as error:  # a damaged file may raise anything
        return _short(error)


def _bad_record(file: zipfile.ZipFile) -> str | None:
    for info in file.infolist():
        # torch takes such a record for a folder, and arbitrary memory for its contents.
        if info.is_dir() or info.external_attr & _FOLDER:
            return f"its record {info.filename} is marked as a folder"
    bad = file.testzip()
    return None if bad is None else f"CRC-32 of its record {bad} is wrong"


def _zip_problems(path: Path, deep: bool) -> list[str]:
    name = f"{path.parent.name}/{path.name}"
    try:
        with zipfile.ZipFile(path) as file:
            bad = _bad_record(file) if deep else None
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise anything
        return [f"{name} is damaged ({_short(error)})"]
    return [] if bad is None else [f"{name} is damaged ({bad})"]


def _few(lines: Iterator[str]) -> Iterator[str]:
    """Yields the first lines, and how many more there were."""
    count = 0
    for line in lines:
        count += 1
        if count <= _SHOWN:
            yield line
    if count > _SHOWN:
        yield f"... and {count - _SHOWN} more of this kind"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
