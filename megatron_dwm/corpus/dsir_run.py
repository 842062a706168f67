"""`megatron-dwm dsir`: counts n-grams, scores documents and selects, in parallel and resumable.

Two passes over the texts: the first counts the n-grams of target and input, the second scores each
document. Each file's result is kept in a folder beside the output until that is written, so that a
killed run resumes with the first file that it had not finished. Shapes: B buckets, D documents with
text.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.corpus.dsir import Features, Hasher, count, log_ratios, log_weight, select
from megatron_dwm.corpus.ordered_pool import answers_in_order
from megatron_dwm.corpus.part_folder import PartFolder
from megatron_dwm.corpus.text_batches import Batch, read_batches
from megatron_dwm.errors import InputError
from megatron_dwm.files.json_files import JsonError, read_object
from megatron_dwm.progress import bar

RAW, TARGET, SCORES = "input-counts", "target-counts", "scores"
_SETTINGS = "settings.json"
_ROWS = 1 << 16


@dataclass(frozen=True)
class Selection:
    """Which documents are drawn.

    Attributes:
        fraction: Share of all documents.
        seed: Seed of the draw.
        min_ngrams: Documents with fewer n-grams are never drawn.
    """

    fraction: float
    seed: int
    min_ngrams: int = 0


@dataclass
class _Answer:
    """The result of a batch of file number `file`, or (without arrays) the end of the file.

    Attributes:
        file: Number of the file.
        position: Bytes of the file on disk that were read.
        arrays: Counts, or scores of documents.
    """

    file: int
    position: int
    arrays: dict[str, np.ndarray] | None


class TextHasher:
    """Hashes the documents of files; reports where a text cannot be hashed."""

    def __init__(self, features: Features):
        """Sets what is counted."""
        self._hasher = Hasher(features)

    def buckets(self, text: str, path: str, line: int) -> np.ndarray:
        """Returns the bucket of every n-gram of a text.

        Raises:
            InputError: The text cannot be written as UTF-8.
        """
        try:
            return self._hasher.buckets(text)
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}, line {line}: the text has a lone surrogate "
                f"(\\u{ord(error.object[error.start]):04x}), which UTF-8 cannot hold. "
                f"Correct or remove the line."
            ) from error


class _Worker:
    """Counts the n-grams of batches, or, given log ratios, scores their documents."""

    def __init__(self, features: Features, key: str, ratios: np.ndarray | None):
        self._features, self._key, self._ratios = features, key, ratios
        self._hasher = TextHasher(features)

    def __call__(self, item: tuple[int, int, Batch | None]) -> _Answer:
        file, position, batch = item
        if batch is None:
            return _Answer(file, position, None)
        found = (
            self._hasher.buckets(text, batch.path, line)
            for line, texts in batch.documents([self._key])
            if (text := document_text(texts[self._key]))
        )
        if self._ratios is None:
            return _Answer(file, position, {"counts": count(found, self._features)})
        pairs = [(log_weight(buckets, self._ratios), len(buckets)) for buckets in found]
        return _Answer(file, position, score_arrays(pairs))


def document_text(sequences: Sequence[str]) -> str:
    """Returns the text of a document of several sequences; empty if it has no text."""
    return "\n".join(sequence for sequence in sequences if sequence)


def score_arrays(pairs: Sequence[tuple[float, int]]) -> dict[str, np.ndarray]:
    """Returns log weights and numbers of n-grams of documents, each `[D]`."""
    return {
        "log_weight": np.array([weight for weight, _ in pairs], np.float64),
        "ngrams": np.array([ngrams for _, ngrams in pairs], np.int64),
    }


def run(args: argparse.Namespace, files: list[Path], targets: list[Path]) -> None:
    """Writes the weights of all documents with text.

    Args:
        args: The parsed command line.
        files: Files of `--input`.
        targets: Files of `--target`.

    Raises:
        InputError: The texts are bad, there are none, or another run's work is in the way.
    """
    features = Features(args.ngrams, args.buckets)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    folder = PartFolder(f"{args.output}.dsir", "files")
    _claim(folder, _settings(args, files, targets), args.restart)
    one_pass = partial(_take, args, features, folder)
    one_pass(TARGET, targets, None)
    one_pass(RAW, files, None)
    ratios = summed_ratios(folder, args.smoothing)
    one_pass(SCORES, files, ratios)
    selection = None
    if args.select is not None:
        selection = Selection(args.select, args.seed, args.min_ngrams)
    parts = list(folder.load_all(SCORES))
    log_weights, ngrams = (
        np.concatenate([part[name] for part in parts]) for name in ("log_weight", "ngrams")
    )
    print(write(args.output, log_weights, ngrams, selection))
    folder.remove()


def summed_ratios(folder: PartFolder, smoothing: float) -> np.ndarray:
    """Returns the log ratios `[B]` from all counts in a folder.

    Raises:
        InputError: Counts are missing, or there is no text.
    """
    total = {}
    for kind, flag in ((TARGET, "--target"), (RAW, "--input")):
        total[kind] = reduce(np.add, (part["counts"] for part in folder.load_all(kind)))
        if not total[kind].any():
            raise InputError(f"{flag}: no text in it. Check the files and --json-key.")
    return log_ratios(total[TARGET], total[RAW], smoothing)


def write(
    output: str, log_weights: np.ndarray, ngrams: np.ndarray, selection: Selection | None
) -> str:
    """Writes the CSV file; it appears whole or not at all.

    Args:
        output: The file.
        log_weights: `[D]` float64.
        ngrams: `[D]` int64, n-grams of each document.
        selection: Which documents are drawn; None leaves out that column.

    Returns:
        A line that says what was written.

    Raises:
        InputError: No document can be drawn.
    """
    columns = [log_weights, ngrams]
    names = ["document", "log_weight", "ngrams"]
    summary = f"Wrote {output}: {len(ngrams)} documents, {int(ngrams.sum())} n-grams"
    if selection is not None:
        eligible = ngrams >= selection.min_ngrams
        if not eligible.any():
            raise InputError(
                f"--min-ngrams {selection.min_ngrams}: no document has as many; the longest has "
                f"{int(ngrams.max())}. Set a smaller number."
            )
        selected = select(log_weights, eligible, selection.fraction, selection.seed)
        columns.append(selected.astype(np.int64))
        names.append("selected")
        summary += f", {np.count_nonzero(selected)} selected"
    partial_file = Path(f"{output}.partial-{os.getpid()}")
    try:
        with open(partial_file, "w", encoding="ascii", newline="") as file:
            file.write(",".join(names) + "\n")
            for first in range(0, len(ngrams), _ROWS):
                cells = [column[first : first + _ROWS].tolist() for column in columns]
                for document, row in enumerate(zip(*cells, strict=True), first):
                    # repr of a float round-trips exactly.
                    file.write(",".join([str(document), *map(repr, row)]) + "\n")
        os.replace(partial_file, output)
    finally:
        partial_file.unlink(missing_ok=True)
    return summary


def _settings(
    args: argparse.Namespace, files: Sequence[Path], targets: Sequence[Path]
) -> dict[str, Any]:
    """Returns everything that the parts depend on, by the names of the flags."""

    def identity(paths: Sequence[Path]) -> list[list[Any]]:
        found = [(path, path.stat()) for path in paths]
        return [[str(path), status.st_size, status.st_mtime_ns] for path, status in found]

    return {
        "--input": identity(files),
        "--target": identity(targets),
        "--input-format": args.input_format,
        "--json-key": args.json_key,
        "--ngrams": args.ngrams,
        "--buckets": args.buckets,
        "--smoothing": args.smoothing,
    }


def _claim(folder: PartFolder, settings: dict[str, Any], restart: bool) -> None:
    """Resumes the work in a folder, or begins it.

    Raises:
        InputError: The folder holds work with other settings.
    """
    place = folder.path / _SETTINGS
    if restart and folder.path.exists():
        folder.remove()
    if folder.path.exists():
        try:
            before = read_object(place)
        except (JsonError, OSError):
            before = {}
        other = [name for name, value in settings.items() if before.get(name) != value]
        if other:
            raise InputError(
                f"{folder.path}: work of a run with another {' and '.join(other)}. Use the same "
                "flags as that run, or give --restart to start over."
            )
        return
    # Renamed into place, so that no folder without settings ever has this name.
    new = folder.path.with_name(f"{folder.path.name}.partial-{os.getpid()}")
    new.mkdir()
    (new / _SETTINGS).write_text(json.dumps(settings))
    os.rename(new, folder.path)


def _take(
    args: argparse.Namespace,
    features: Features,
    folder: PartFolder,
    kind: str,
    files: Sequence[Path],
    ratios: np.ndarray | None,
) -> None:
    """Counts or scores the remaining files; each writes a part of the kind."""
    outstanding = [n for n in range(len(files)) if folder.load(kind, n, len(files)) is None]
    if not outstanding:
        return
    make = partial(_Worker, features, args.json_key, ratios)
    items = _batches_of(files, outstanding, args.input_format)
    sizes = {number: files[number].stat().st_size for number in outstanding}
    label = {TARGET: "counting the target", RAW: "counting", SCORES: "scoring"}[kind]
    parts: list[dict[str, np.ndarray]] = []
    done = 0
    with bar(sum(sizes.values()), "B", label) as shown:
        for answer in answers_in_order(items, make(), make, args.workers):
            if answer.arrays is not None:
                if parts and ratios is None:
                    parts[0]["counts"] += answer.arrays["counts"]
                else:
                    parts.append(answer.arrays)
                shown.update(done + answer.position - shown.n)
                continue
            folder.save(kind, answer.file, len(files), **_joined(parts, features, ratios is None))
            parts = []
            done += sizes[answer.file]
            shown.update(done - shown.n)


def _joined(
    parts: list[dict[str, np.ndarray]], features: Features, counted: bool
) -> dict[str, np.ndarray]:
    """Returns the joined arrays of a file, which may have no batches."""
    if counted:
        return parts[0] if parts else {"counts": np.zeros(features.buckets, np.int64)}
    names = score_arrays([])
    return {name: np.concatenate([names[name], *(part[name] for part in parts)]) for name in names}


def _batches_of(
    files: Sequence[Path], numbers: Sequence[int], override: str
) -> Iterator[tuple[int, int, Batch | None]]:
    """Yields the batches of each file, and None at its end."""
    for number in numbers:
        position = 0
        for batch in read_batches([files[number]], override):
            position = batch.position
            yield number, position, batch
        yield number, position, None
