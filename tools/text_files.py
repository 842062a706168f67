"""Text inputs of the data tools: JSON Lines or plain text, compressed or not."""

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

# What the decompressors raise on a damaged or truncated file.
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


class InputError(ValueError):
    """A fault in the user's input. Its text is the whole message: what, where, way out."""


def expand_inputs(patterns: Sequence[str], flag: str = "--input") -> list[Path]:
    """Expands file names and glob patterns.

    Args:
        patterns: File names or glob patterns, taken in the order given.
        flag: Name of the command line flag, for messages.

    Returns:
        The files, each once: pattern by pattern, sorted by name within a pattern.

    Raises:
        InputError: A pattern matches no file, or names a directory.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        # A file may carry glob characters in its name, so try the name itself first.
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise InputError(f"{flag} {pattern}: no such file. Check the path or the pattern.")
        for name in names:
            if not os.path.isfile(name):
                raise InputError(f"{flag} {name}: not a file. For a directory give '{name}/*'.")
            files[Path(name)] = None
    return list(files)


def input_format(path: Path, override: str = "auto") -> str:
    """Tells JSON Lines from plain text by the file's name.

    Args:
        path: File name; a compression suffix is looked through.
        override: `jsonl` or `text` to set the format, `auto` to go by the name.

    Returns:
        `jsonl` or `text`.

    Raises:
        InputError: The name does not tell.
    """
    if override != "auto":
        return override
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in JSON_SUFFIXES:
        return "jsonl"
    if last in TEXT_SUFFIXES:
        return "text"
    raise InputError(
        f"{path}: cannot tell JSON Lines ({' '.join(JSON_SUFFIXES)}) from plain text "
        f"({' '.join(TEXT_SUFFIXES)}) by its name. Set --input-format jsonl or text."
    )


class TextFile:
    """A possibly compressed file, read as bytes.

    Attributes:
        stream: Decompressed content.
        size: Bytes of the file on disk.
    """

    def __init__(self, path: Path):
        """Opens `path`; the suffix (.gz .bz2 .xz .zst) names the compression.

        Raises:
            InputError: The file cannot be opened, or `zstandard` is needed and missing.
        """
        self.path = path
        try:
            self._raw = open(path, "rb")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
        self.size = os.fstat(self._raw.fileno()).st_size
        self.stream = _decompressed(self._raw, path)

    def __enter__(self) -> "TextFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self._raw.close()

    def tell(self) -> int:
        """Bytes of the file on disk that were read so far, for progress bars."""
        return self._raw.tell()


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise InputError(
                f"{path}: reading .zst needs the package zstandard. Install it "
                f"(pip install zstandard) or decompress the file first."
            ) from error
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader, 1 << 20)
    return raw


def parse_record(line: bytes, path: Path | str, line_number: int) -> dict | None:
    """Parses one line of a JSON Lines file.

    Args:
        line: The line, with or without its line break.
        path: File name, for messages.
        line_number: Counted from 1, for messages.

    Returns:
        The JSON object, or None for a blank line.

    Raises:
        InputError: The line is not UTF-8 or not a JSON object.
    """
    if not line.strip():
        return None
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front of the first line.
        record = json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {line_number}: not UTF-8 (byte {error.start + 1}). Convert the file."
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}, line {line_number}: not JSON ({error}). "
            f"Every line must be one JSON object; for plain text set --input-format text."
        ) from error
    if not isinstance(record, dict):
        raise InputError(
            f"{path}, line {line_number}: a JSON {type(record).__name__}, expected an object "
            f'such as {{"text": "..."}}.'
        )
    return record


def record_text(record: dict, key: str, path: Path | str, line_number: int) -> list[str]:
    """Takes the text under `key` out of a record.

    Args:
        record: A parsed JSON object.
        key: Key of the text; its value is a string, or a list of strings (the sequences
            of one document).
        path: File name, for messages.
        line_number: Counted from 1, for messages.

    Returns:
        The sequences of the document.

    Raises:
        InputError: The key is missing, or its value is of another type.
    """
    if key not in record:
        found = ", ".join(sorted(record)[:8]) or "none"
        raise InputError(
            f"{path}, line {line_number}: no key '{key}' (keys found: {found}). Name the key "
            f"of the text on the command line."
        )
    value = record[key]
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise InputError(
        f"{path}, line {line_number}: key '{key}' holds {type(value).__name__}, expected a "
        f"string or a list of strings."
    )


def read_blocks(file: TextFile, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Cuts a file into blocks of whole lines.

    Args:
        file: An open file.
        block_bytes: Wanted size of a block in bytes; a longer line is a block of its own.

    Yields:
        Number of the block's first line (from 1) and the block.

    Raises:
        InputError: The file is damaged.
    """
    first_line = 1
    while True:
        try:
            block = file.stream.read(block_bytes)
            if block and not block.endswith(b"\n"):
                block += file.stream.readline()
        except Exception as error:
            # zstandard has an exception class of its own that cannot be named without it.
            if isinstance(error, READ_ERRORS) or type(error).__name__ == "ZstdError":
                raise InputError(
                    f"{file.path}: damaged or truncated after line {first_line - 1} "
                    f"({error or type(error).__name__}). Fetch or compress it again."
                ) from error
            raise
        if not block:
            return
        yield first_line, block
        first_line += block.count(b"\n")


def read_whole(file: TextFile) -> str:
    """Reads a plain text file as one document.

    Raises:
        InputError: The file is damaged or not UTF-8.
    """
    data = b"".join(block for _, block in read_blocks(file, 1 << 24))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file.path}, line {line}: not UTF-8. Convert the file.") from error


def read_texts(path: Path, key: str, override: str = "auto") -> Iterator[tuple[str, int]]:
    """Reads the texts of one file, for uses where document bounds do not matter.

    Args:
        path: JSON Lines file, or plain text file, which is cut into blocks of whole lines.
        key: Key of the text in JSON Lines.
        override: See `input_format`.

    Yields:
        Text of a document or block, and the bytes of the file on disk read so far.

    Raises:
        InputError: See `parse_record`, `record_text` and `read_blocks`.
    """
    with TextFile(path) as file:
        if input_format(path, override) == "text":
            for _, block in read_blocks(file, 1 << 20):
                yield block.decode("utf-8-sig", errors="replace"), file.tell()
            return
        for first_line, block in read_blocks(file, 1 << 18):
            for offset, line in enumerate(block.split(b"\n")):
                record = parse_record(line, path, first_line + offset)
                if record is not None:
                    text = "\n".join(record_text(record, key, path, first_line + offset))
                    yield text, file.tell()
