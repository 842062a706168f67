"""What a file is by its first bytes, and its decompressed content up to the very end.

The decompressors of gzip, bz2, lzma and zstandard say when a stream is complete; a file whose last
stream is not, or where something else follows, is refused and never taken for a shorter one.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

# Bytes at the beginning and the end that tell a format.
HEAD_BYTES = 512
TAIL_BYTES = 4
# Handed to a decompressor at once. The formats shrink a byte by up to 40,000 times.
_SLICE_BYTES = 1 << 10
_HEADER_BYTES = 18


class FileFormatError(OSError):
    """A format that cannot be read, and the way out; the text does not name the file."""


class DamagedFileError(OSError):
    """How a compressed file is damaged or cut; the text does not name the file."""


@dataclass(frozen=True)
class Codec:
    """A compression.

    Attributes:
        name: What messages call it.
        suffix: Ending of a file's name that promises it.
        new: Returns a decompressor of one stream, with `decompress`, `eof` and `unused_data`.
        padded: Whether zero bytes may follow a stream, as on tapes.
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
# Beginnings that no text has: what it is, and the way out.
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
        # A frame to be skipped, as some writers put before the first one.
        head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50
    ):
        return _ZSTD
    return None


def refuse_foreign(head: bytes, tail: bytes = b"") -> None:
    """Refuses formats that neither the decompressors nor the readers of text can read.

    Args:
        head: The first bytes of a content.
        tail: Its last bytes, where they are at hand.

    Raises:
        FileFormatError: Names the format and the way out.
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
    """Returns a file's content and its compression, which its first bytes tell.

    Args:
        raw: The file, open at its beginning.
        suffix: The last ending of its name, in lower case.

    Raises:
        FileFormatError: The name promises a compression that the content is not, or the content
            is of a format that cannot be read.
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
            f"compress it again, or take {promised.suffix} off its name if it is not compressed"
        )
    return raw, None


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, stream after stream."""

    def __init__(self, raw: BinaryIO, codec: Codec):
        self._raw = raw
        self._codec = codec
        self._stream: Any = None
        self._streams = 0
        # First bytes of the present stream, bytes behind the last one, and decompressed bytes.
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
        """Decompresses a slice; returns False behind the last stream."""
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
        except Exception as error:  # each library has a class of its own
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
