"""Keeps the scores of finished chunks on disk, so that a killed run can resume.

Every scoring process appends to its own file and ends each chunk with a checksum, so any number of
processes can write at once, and a chunk that a kill cut short is noticed and scored again. A
record: uint64 number of the chunk, uint64 documents m, uint32 CRC-32 of these two and of the
scores, float32 `[m]` scores (little-endian). Shapes: D documents, C chunks, m documents in a chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_dwm.errors import DWMError

_COUNTS = struct.Struct("<QQ")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _COUNTS.size + _CRC.size
_KEY_CHARACTERS = 16


def work_key(**settings: Any) -> str:
    """Returns the name under which scores are kept, from everything that they depend on."""
    encoded = json.dumps(settings, sort_keys=True).encode()
    return hashlib.sha256(encoded).hexdigest()[:_KEY_CHARACTERS]


class WorkFolder:
    """The scores of one corpus under one key.

    Args:
        root: the corpus' work folder; `root/key` holds the scores.
        key: returned by `work_key`.
        bounds: `[C + 1]` first document of each chunk, then D.
    """

    def __init__(self, root: str, key: str, bounds: np.ndarray) -> None:
        self.root, self.path, self.bounds = Path(root), Path(root) / key, bounds
        self.done = np.zeros(len(bounds) - 1, bool)
        self._found: dict[int, tuple[Path, int]] = {}
        self._read: dict[Path, int] = {}
        self._own: BinaryIO | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DWMError(
                f"{self.path}: the folder for scores cannot be made ({error.strerror}); check the "
                "path of --output and its permissions"
            ) from error

    def scan(self) -> list[int]:
        """Finds chunks that were finished since the last call, by any process.

        Returns:
            Their numbers.
        """
        new: list[int] = []
        for path in sorted(self.path.glob("*.part")):
            with open(path, "rb") as file:
                offset = self._read.get(path, 0)
                file.seek(offset)
                while (record := self._next(file)) is not None:
                    chunk, scores = record
                    if not self.done[chunk]:
                        self.done[chunk] = True
                        self._found[chunk] = path, offset
                        new.append(chunk)
                    offset += _HEADER_BYTES + scores.nbytes
                # The rest is not complete yet, or never will be.
                self._read[path] = offset
        return new

    def append(self, chunk: int, scores: np.ndarray) -> None:
        """Keeps the scores of a finished chunk.

        Args:
            chunk: its number.
            scores: `[m]` float32.
        """
        assert len(scores) == self.bounds[chunk + 1] - self.bounds[chunk]
        counts, payload = _COUNTS.pack(chunk, len(scores)), scores.astype("<f4").tobytes()
        try:
            if self._own is None:
                self._own = open(self.path / f"{uuid.uuid4().hex}.part", "xb")
            self._own.write(counts + _CRC.pack(zlib.crc32(payload, zlib.crc32(counts))) + payload)
            self._own.flush()
            os.fsync(self._own.fileno())
        except OSError as error:
            raise DWMError(
                f"{self.path}: scores cannot be written ({error.strerror}); make room or repair "
                "the folder and start again: finished chunks are kept",
                this_rank_only=True,
            ) from error

    def scores(self) -> np.ndarray:
        """Returns all scores.

        Returns:
            `[D]` float32.

        Raises:
            DWMError: a chunk is missing.
        """
        self.scan()
        if not self.done.all():
            raise DWMError(
                f"{self.path}: the scores of {np.count_nonzero(~self.done)} of {len(self.done)} "
                "chunks are not there, though all ranks have finished; the folder must be on a "
                "file system that all nodes share, and must not be deleted"
            )
        scores = np.empty(int(self.bounds[-1]), np.float32)
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for chunk, (path, offset) in self._found.items():
            by_file.setdefault(path, []).append((offset, chunk))
        for path, records in by_file.items():
            with open(path, "rb") as file:
                for offset, chunk in sorted(records):
                    file.seek(offset)
                    record = self._next(file)
                    assert record is not None and record[0] == chunk
                    scores[self.bounds[chunk] : self.bounds[chunk + 1]] = record[1]
        return scores

    def others(self) -> list[str]:
        """Returns the names of folders beside this one: scores of other models or settings."""
        return sorted(p.name for p in self.root.iterdir() if p.is_dir() and p != self.path)

    def close(self) -> None:
        """Closes this process' file."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def remove(self) -> None:
        """Deletes the scores, and the parent folder if it is then empty."""
        self.close()
        shutil.rmtree(self.path)
        if not any(self.root.iterdir()):
            self.root.rmdir()

    def _next(self, file: BinaryIO) -> tuple[int, np.ndarray] | None:
        """Reads the record at the file's position; None if it is incomplete or damaged."""
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            return None
        chunk, count = _COUNTS.unpack_from(header)
        if chunk >= len(self.done) or count != self.bounds[chunk + 1] - self.bounds[chunk]:
            return None
        payload = file.read(4 * count)
        crc = zlib.crc32(payload, zlib.crc32(header[: _COUNTS.size]))
        if crc != _CRC.unpack_from(header, _COUNTS.size)[0]:
            return None
        return chunk, np.frombuffer(payload, "<f4")
