"""Reads text inputs: JSON Lines or plain text, compressed or not."""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dwm.errors import InputError
from megatron_dwm.files.compressed_files import (
    HEAD_BYTES,
    FileFormatError,
    codec_of,
    decompressed,
    refuse_foreign,
)
from megatron_dwm.files.json_files import JsonError, json_type, parse_json

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def expand_inputs(patterns: Sequence[str], flag: str = "--input") -> list[Path]:
    """Expands file names and glob patterns.

    A file that is named twice, even with another spelling or through a link, is read once; a line
    on standard error says so.

    Args:
        patterns: File names or glob patterns, taken in the order given.
        flag: Name of the command line flag, for messages.

    Returns:
        The files, each once: pattern by pattern, sorted by name within a pattern.

    Raises:
        InputError: A pattern matches no file, or names a directory.
    """
    files: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        # A file name may contain glob characters, so try the name itself first.
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise InputError(f"{flag} {pattern}: no such file. Check the path or the pattern.")
        for name in names:
            if not os.path.isfile(name):
                raise InputError(f"{flag} {name}: not a file. For a directory give '{name}/*'.")
            status = os.stat(name)
            first = files.setdefault((status.st_dev, status.st_ino), path := Path(name))
            if first is not path:
                how = "named twice" if first == path else f"the same file as {first}"
                print(f"NOTE: {flag} {name}: {how}; it is read once.", file=sys.stderr)
    return list(files.values())


def input_format(path: Path, override: str = "auto") -> str:
    """Tells JSON Lines from plain text by the file's name.

    Args:
        path: File name; a compression suffix is ignored.
        override: `jsonl` or `text` to set the format, `auto` to decide by the name.

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
        path: Its name.
        stream: Decompressed content.
        compressed: Whether it is compressed, according to its first bytes.
        size: Bytes of the file on disk.
    """

    def __init__(self, path: Path):
        """Opens `path`; its first bytes determine the compression, whatever its name.

        Raises:
            InputError: The file cannot be opened, or it is of a format that cannot be read.
        """
        self.path = path
        try:
            self._raw = open(path, "rb")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
        self.size = os.fstat(self._raw.fileno()).st_size
        try:
            self.stream, codec = decompressed(self._raw, path.suffix.lower())
        except OSError as error:
            self._raw.close()
            raise InputError(f"{path}: {error}.") from error
        self.compressed = codec is not None

    def __enter__(self) -> "TextFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self._raw.close()

    def tell(self) -> int:
        """Bytes of the file on disk that were read so far, for progress bars."""
        return self._raw.tell()


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
        # utf-8-sig: Windows editors put a byte order mark before the first line.
        record = parse_json(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {line_number}: not UTF-8 (byte {error.start + 1}). Convert the file."
        ) from error
    except JsonError as error:
        raise InputError(
            f"{path}, line {line_number}: not JSON ({error}). "
            f"Every line must be one JSON object; for plain text set --input-format text."
        ) from error
    if not isinstance(record, dict):
        raise InputError(
            f"{path}, line {line_number}: a JSON {json_type(record)}, expected an object "
            f'such as {{"text": "..."}}.'
        )
    return record


def record_text(record: dict, key: str, path: Path | str, line_number: int) -> list[str]:
    """Returns the text under `key` of a record.

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
        f"{path}, line {line_number}: key '{key}' holds {json_type(value)}, expected a "
        f"string or a list of strings."
    )


def read_blocks(file: TextFile, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Splits a file into blocks of whole lines.

    Args:
        file: An open file.
        block_bytes: Target size of a block in bytes; a longer line becomes its own block.

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
        except FileFormatError as error:
            raise InputError(f"{file.path}: {error}.") from error
        except OSError as error:
            raise InputError(
                f"{file.path}: damaged or truncated after line {first_line - 1} ({error}). "
                f"Fetch or compress it again."
            ) from error
        if not block:
            return
        if first_line == 1 and file.compressed:
            _check_content(file.path, block[:HEAD_BYTES])
        yield first_line, block
        first_line += block.count(b"\n")


def _check_content(path: Path, head: bytes) -> None:
    """Refuses compressed files whose content is not text."""
    codec = codec_of(head)
    if codec is not None:
        raise InputError(f"{path}: compressed twice ({codec.name} inside); decompress it once.")
    try:
        refuse_foreign(head)
    except FileFormatError as error:
        raise InputError(f"{path}: compressed, and inside {error}.") from error


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
        path: JSON Lines file, or plain text file, which is split into blocks of whole lines.
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
