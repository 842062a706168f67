"""Splits text input into batches for worker processes, and batches into documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.files.text_files import (
    TextFile,
    input_format,
    parse_record,
    read_blocks,
    read_whole,
    record_text,
)

BLOCK_BYTES = 1 << 18


@dataclass
class Batch:
    """Work for one call of a worker.

    Attributes:
        path: File name, for messages.
        first_line: Number of the first line, from 1.
        content: Whole lines of JSON Lines, or (str) one plain text document.
        position: Bytes of the whole input on disk that have been read up to the end of this batch.
    """

    path: str
    first_line: int
    content: bytes | str
    position: int

    def documents(self, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, list[str]]]]:
        """Yields each document: its line, and its sequences under each of the keys.

        Raises:
            InputError: A line that cannot be used; the message names file and line.
        """
        if isinstance(self.content, str):
            yield 1, {key: [self.content] for key in keys}
            return
        for number, line in enumerate(self.content.split(b"\n"), start=self.first_line):
            record = parse_record(line, self.path, number)
            if record is not None:
                yield number, {k: record_text(record, k, self.path, number) for k in keys}


def read_batches(files: Sequence[Path], override: str) -> Iterator[Batch]:
    """Reads the input in order, in batches for the workers.

    Args:
        files: Input files.
        override: See `text_files.input_format`.

    Yields:
        Batches of about BLOCK_BYTES; a plain text file is one batch.

    Raises:
        InputError: See `text_files`.
    """
    done = 0
    for path in files:
        with TextFile(path) as file:
            if input_format(path, override) == "text":
                yield Batch(str(path), 1, read_whole(file), done + file.size)
            else:
                for first_line, block in read_blocks(file, BLOCK_BYTES):
                    yield Batch(str(path), first_line, block, done + file.tell())
            done += file.size
