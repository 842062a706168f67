"""Detects a file's format from its first bytes, and decompresses it to the very end.

The decompressors of gzip, bz2, lzma and zstandard report when a stream is complete. A file whose
last stream is incomplete, or is followed by something else, is refused and never treated as a
shorter file.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

# Bytes at the beginning and the end that identify a format.
HEAD_BYTES = 512
TAIL_BYTES = 4
# Bytes passed to a decompressor at once. The formats compress by a factor of up to 40,000.
_SLICE_BYTES = 1 << 10
_HEADER_BYTES = 18


class FileFormatError(OSError):
    """A format that cannot be read, and what to do; the text does not name the file."""


class DamagedFileError(OSError):
    """How a compressed file is damaged or truncated; the text does not name the file."""


@dataclass(frozen=True)
class Codec:
    """A compression.

    Attributes:
        name: Its name in messages.
        suffix: File name ending that indicates it.
        new: Returns a decompressor of one stream, with `decompress`, `eof` and `unused_data`.
        padded: Whether zero bytes may follow a stream, as on tape.
    """

    name: str
    suffix: str
    new: Callable[[], Any]
    padded: bool = True


def _zstd_decompressor() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise FileFormatError(
            "reading .zst needs the package zstandard. Install it (pip install zstandard) or "
            "decompress the file first"
        ) from error
    return zstandard.ZstdDecompressor().decompressobj()


_GZIP = Codec("gzip", ".gz", lambda: zlib.decompressobj(wbits=31))
_BZIP2 = Codec("bzip2", ".bz2", bz2.BZ2Decompressor)
_XZ = Codec("xz", ".xz", lzma.LZMADecompressor)
_ZSTD = Codec("zstd", ".zst", _zstd_decompressor, padded=False)
_BY_SUFFIX = {codec.suffix: codec for codec in (_GZIP, _BZIP2, _XZ, _ZSTD)}

_UNPACK = "unpack it and give the files in it"
_DECOMPRESS = "decompress it first, or compress it with gzip, bzip2, xz or zstd"
_CONVERT = "write its rows as JSON Lines"
# First bytes that no text has: what the format is, and what to do.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "lz4", _DECOMPRESS),
    (b"\x02\x21\x4c\x18", "lz4 of an old version", _DECOMPRESS),
    (b"\xff\x06\x00\x00sNaPpY", "snappy", _DECOMPRESS),
    (b"LZIP\x01", "lzip", _DECOMPRESS),
    (b"\x89LZO\x00", "lzop", _DECOMPRESS),
    (b"\x1f\x9d", "compressed by `compress` (.Z)", _DECOMPRESS),
    *((bytes([n]) + b"\xb5\x2f\xfd", "zstd of a version before 0.8", _DECOMPRESS)
      for n in range(0x22, 0x28)),
    (b"ARROW1\x00\x00", "an Arrow file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
)  # fmt: skip


def codec_of(head: bytes) -> Codec | None:
    """Returns the compression that a file's first bytes show, or None."""
    if head.startswith(b"\x1f\x8b"):
        return _GZIP
    # "BZh1" alone could begin a text.
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return _BZIP2
    if head.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        return _XZ
    if head.startswith(b"\x28\xb5\x2f\xfd") or (
        # A skippable frame, which some writers put before the first one.
        head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50
    ):
        return _ZSTD
    return None


def refuse_foreign(head: bytes, tail: bytes = b"") -> None:
    """Refuses formats that neither the decompressors nor the text readers can read.

    Args:
        head: The first bytes of a content.
        tail: Its last bytes, if available.

    Raises:
        FileFormatError: Names the format and what to do.
    """
    found = [(what, remedy) for magic, what, remedy in _FOREIGN if head.startswith(magic)]
    # These begin with letters, as a text might.
    if head.startswith(b"PAR1") and tail == b"PAR1":
        found.append(("a Parquet file", _CONVERT))
    if head.startswith(b"ORC") and tail[:3] == b"ORC":
        found.append(("an ORC file", _CONVERT))
    if head[257:262] == b"ustar":
        found.append(("a tar archive", _UNPACK))
    if found:
        what, remedy = found[0]
        raise FileFormatError(f"this is {what}, which cannot be read here; {remedy}")


def decompressed(raw: BinaryIO, suffix: str) -> tuple[BinaryIO, Codec | None]:
    """Returns a file's content and its compression, detected from its first bytes.

    Args:
        raw: The file, open at its beginning.
        suffix: The last ending of its name, in lower case.

    Raises:
        FileFormatError: The name indicates a compression that the content does not have, or the
            content has a format that cannot be read.
    """
    head = raw.read(HEAD_BYTES)
    raw.seek(max(0, raw.seek(0, io.SEEK_END) - TAIL_BYTES))
    tail = raw.read()
    raw.seek(0)
    codec = codec_of(head)
    if codec is not None:
        return io.BufferedReader(_Decompressed(raw, codec), 1 << 16), codec
    refuse_foreign(head, tail)
    promised = _BY_SUFFIX.get(suffix)
    if promised is not None:
        found = "begins otherwise" if head else "is empty"
        raise FileFormatError(
            f"damaged or truncated: by its name it is {promised.name}, but it {found}. Fetch or "
            f"compress it again, or remove {promised.suffix} from its name if it is not compressed"
        )
    return raw, None


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, stream after stream."""

    def __init__(self, raw: BinaryIO, codec: Codec):
        self._raw = raw
        self._codec = codec
        self._stream: Any = None
        self._streams = 0
        # First bytes of the current stream, bytes after the last one, and decompressed bytes.
        self._header = b""
        self._behind = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._step():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _step(self) -> bool:
        """Decompresses a slice; returns False after the last stream."""
        data = self._behind or self._raw.read(_SLICE_BYTES)
        self._behind = b""
        if self._stream is None:
            if not data:
                return False
            if self._codec.padded and self._streams:
                data = data.lstrip(b"\0")
                if not data:
                    return True
            self._stream, self._header = self._codec.new(), b""
        if not data:
            raise DamagedFileError(f"it ends in the middle of a {self._codec.name} stream")
        self._header += data[: _HEADER_BYTES - len(self._header)]
        try:
            self._ready = memoryview(self._stream.decompress(data))
        except MemoryError:
            raise
        except Exception as error:  # each library has its own class
            raise self._fault(error) from error
        if self._stream.eof:
            self._behind, self._stream = self._stream.unused_data, None
            self._streams += 1
        return True

    def _fault(self, error: Exception) -> OSError:
        name = self._codec.name
        if self._streams and codec_of(self._header) is not self._codec:
            return DamagedFileError(f"behind its {name} stream {self._streams} is something else")
        text = str(error) or type(error).__name__
        if self._codec is not _ZSTD:
            return DamagedFileError(text)
        import zstandard

        try:
            frame = zstandard.get_frame_parameters(self._header)
        except zstandard.ZstdError:
            return DamagedFileError(text)
        if "too much memory" in text:
            bits = (frame.window_size - 1).bit_length()
            return FileFormatError(
                f"compressed with a window of {frame.window_size >> 20} MiB, of which 128 are the "
                f"most that is read; decompress it first: zstd -d --long={bits}"
            )
        if frame.dict_id:
            return FileFormatError(
                f"compressed with a dictionary (number {frame.dict_id}); decompress it first: "
                f"zstd -d -D DICTIONARY"
            )
        return DamagedFileError(text)
