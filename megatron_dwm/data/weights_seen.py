"""Collects mean weights of documents as a run weighs their samples, for a larger run to draw by.

This needs no extra pass, because the run weighs every sample anyway. For each document in a sample,
its tokens there count with the sample's weight. What a rank has seen is kept in
`SAVE/dwm_document_weights/iter_NNNNNNN/rank_K.npz`, written before that iteration's checkpoint, so
that a run that resumes from it continues with the matching sums. Each file states the number of
files, so that an incomplete set is noticed. `megatron-dwm weights from-run` sums over the ranks.

Shapes: n samples on this rank, s tokens in a sample, D documents of a data set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy

from megatron_dwm.errors import DWMError

FOLDER = "dwm_document_weights"
_ITERATION = re.compile(r"iter_(\d{7})")
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class DocumentWeightsSeen:
    """One rank's sums of tokens, and of tokens times their samples' weights, by document.

    Args:
        prefixes: prefixes of the training data sets, by the loader's `dataset_id`.

    Attributes:
        tokens: by data set, `[D]` float64, with D up to the last document seen.
        weighted: the same, each token times its sample's weight.
    """

    def __init__(self, prefixes: list[str]) -> None:
        self.prefixes = prefixes
        self.tokens = [numpy.zeros(0) for _ in prefixes]
        self.weighted = [numpy.zeros(0) for _ in prefixes]

    def add(self, ids: numpy.ndarray, sets: numpy.ndarray, weights: numpy.ndarray) -> None:
        """Includes samples.

        Args:
            ids: `[n, s]` document of each token, -1: none.
            sets: `[n]` number of each sample's data set.
            weights: `[n]` weights of the samples.
        """
        for k in numpy.unique(sets):
            flat = ids[sets == k].ravel()
            of_tokens = numpy.repeat(weights[sets == k], ids.shape[1])[flat >= 0]
            flat = flat[flat >= 0]
            if not len(flat):
                continue
            documents, place = numpy.unique(flat, return_inverse=True)
            of_documents = numpy.bincount(place, weights=of_tokens)
            for sums, values in (
                (self.tokens, numpy.bincount(place)),
                (self.weighted, of_documents),
            ):
                sums[k] = _as_long_as(sums[k], int(documents[-1]) + 1)
                sums[k][documents] += values

    def shares(self) -> list[float]:
        """Returns each data set's share of the tokens."""
        counts = [float(tokens.sum()) for tokens in self.tokens]
        return [count / max(1.0, sum(counts)) for count in counts]

    # ------------------------------------------------------------------ files

    def save(self, run: str, iteration: int, rank: int, ranks: int) -> None:
        """Writes what this rank has seen in the first `iteration` steps.

        Args:
            run: the run's folder.
            iteration: number of steps taken.
            rank: rank of this process.
            ranks: number of processes that write a file.

        Raises:
            DWMError: it cannot be written.
        """
        folder = _folder(run, iteration)
        arrays: dict[str, Any] = {"prefixes": numpy.array(json.dumps(self.prefixes))}
        arrays["ranks"] = numpy.array(ranks)
        arrays |= {f"tokens_{k}": sums for k, sums in enumerate(self.tokens)}
        arrays |= {f"weighted_{k}": sums for k, sums in enumerate(self.weighted)}
        path = folder / f"rank_{rank}.npz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.part", "wb") as file:
                numpy.savez_compressed(file, **arrays)
            os.replace(f"{path}.part", path)
        except OSError as error:
            raise DWMError(
                f"--dwm-document-weights: {path} cannot be written ({error}); make room, or leave "
                "the flag out"
            ) from error

    def load(self, run: str, iteration: int) -> None:
        """Loads what all ranks had seen; to be called on one rank.

        Raises:
            DWMError: there is nothing, or it is damaged, or it belongs to other data.
        """
        found = read(run, iteration)
        if found.prefixes != self.prefixes:
            raise DWMError(
                f"{_folder(run, iteration)} is of the data {', '.join(found.prefixes)}, not of "
                f"{', '.join(self.prefixes)}; give the same --data-path, or leave "
                "--dwm-document-weights out"
            )
        self.tokens, self.weighted = found.tokens, found.weighted


def make_room(run: str, iteration: int) -> None:
    """Removes files without a checkpoint, and what an earlier save of `iteration` has left.

    That save may have been by other ranks, whose files would be counted too. To be called on one
    rank, before the others write.

    Args:
        run: the run's folder.
        iteration: the iteration that is about to be written.

    Raises:
        DWMError: an earlier save's files cannot be removed.
    """
    for folder in Path(run, FOLDER).glob("iter_*"):
        number = _ITERATION.fullmatch(folder.name)
        if number and int(number[1]) != iteration and not Path(run, folder.name).is_dir():
            shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.rmtree(_folder(run, iteration))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DWMError(
            f"--dwm-document-weights: an earlier {_folder(run, iteration)} cannot be removed "
            f"({error}); remove it, or leave the flag out"
        ) from error


def iterations(run: str) -> list[int]:
    """Returns the iterations for which the files of all ranks exist, in ascending order."""
    found = (_ITERATION.fullmatch(folder.name) for folder in Path(run, FOLDER).glob("iter_*"))
    return sorted(int(match[1]) for match in found if match and _is_whole(run, int(match[1])))


def read(run: str, iteration: int) -> DocumentWeightsSeen:
    """Returns what all ranks had seen in the first `iteration` steps, summed up.

    Raises:
        DWMError: there is nothing, or it is damaged, or some ranks' files are missing.
    """
    folder = _folder(run, iteration)
    paths = sorted(folder.glob("rank_*.npz"))
    if not paths:
        raise DWMError(
            f"{folder} has no document weights; the run must have been started with "
            "--dwm-document-weights"
        )
    whole: DocumentWeightsSeen | None = None
    for path in paths:
        try:
            with numpy.load(path) as found:
                one = DocumentWeightsSeen(json.loads(str(found["prefixes"])))
                one.tokens = [found[f"tokens_{k}"] for k in range(len(one.prefixes))]
                one.weighted = [found[f"weighted_{k}"] for k in range(len(one.prefixes))]
                # Older files do not have it.
                ranks = int(found["ranks"]) if "ranks" in found else len(paths)
        except _DAMAGE as error:
            raise DWMError(f"{path}: damaged ({error}); take another iteration") from error
        if ranks != len(paths):
            raise DWMError(
                f"{folder} has the files of {len(paths)} ranks, but {ranks} were to write one: the "
                "save was cut short; take another iteration"
            )
        if whole is None:
            whole = one
            continue
        for sums, more in ((whole.tokens, one.tokens), (whole.weighted, one.weighted)):
            for k, values in enumerate(more):
                sums[k] = _added(sums[k], values)
    assert whole is not None
    return whole


def _is_whole(run: str, iteration: int) -> bool:
    """Whether every rank's file exists; a damaged one is noticed when it is read."""
    paths = list(_folder(run, iteration).glob("rank_*.npz"))
    if not paths:
        return False
    try:
        with numpy.load(paths[0]) as found:
            return "ranks" not in found or int(found["ranks"]) == len(paths)
    except _DAMAGE:
        return True


def _as_long_as(sums: numpy.ndarray, size: int) -> numpy.ndarray:
    if size <= len(sums):
        return sums
    # Doubled, so that a corpus read from its start is not copied in each step.
    grown = numpy.zeros(max(size, 2 * len(sums)))
    grown[: len(sums)] = sums
    return grown


def _added(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    if len(a) < len(b):
        a, b = b, a
    total = a.copy()
    total[: len(b)] += b
    return total


def _folder(run: str, iteration: int) -> Path:
    return Path(run, FOLDER, f"iter_{iteration:07d}")
