"""Plans the samples of a data set under document weights that may change during a run.

A *segment* is the plan for one set of weights: epochs of n draws each, laid end to end and cut into
samples. Its samples are visited epoch by epoch, and within an epoch in the order of a keyed
permutation. When the weights change after some samples, the next segment takes over from there:

    a draw of which a token was seen   stays: the rest of it is planned first
    a draw of which none was seen      is discarded; the new weights decide
    documents below their new count    are drawn for the rest of the epoch, e'_d - seen_d each
    documents above it                 are not drawn again in this epoch

So every draw that was begun is completed, and none of its tokens is repeated. A segment is a pure
function of the corpus, the seed and the history of (weights, samples seen): a resumed run makes the
same plan as the one before it, on any number of ranks.

It needs neither torch nor Megatron. Shapes: S sequences, D documents of the split, P visited
entries, N samples. As in Megatron's `GPTDataset`, a document here is one sequence of the `.idx`.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_dwm.data import draws as sampling
from megatron_dwm.data.index import DatasetError

# Version of everything that determines a plan: this file and the kernels. A run that has followed a
# plan of one version cannot continue with another.
PLAN_VERSION = 2
# Epochs of different segments never share a key: their numbers are this far apart.
_STAGE_STRIDE = 2**40


@dataclass(frozen=True)
class Corpus:
    """What all segments of a data set share.

    Attributes:
        name: name for messages.
        sequence_lengths: `[S]` int32 tokens per sequence.
        first_document: first sequence of the split.
        num_documents: D, sequences of the split.
        sequence_length: tokens per sample.
        add_extra_token: whether a sample needs one more token, for its last label.
        seed: seed of draws and orders.
        method: `systematic` or `independent` draws.
        max_repeats: limit of a document's expected visits per epoch; None: no limit.
    """

    name: str
    sequence_lengths: np.ndarray
    first_document: int
    num_documents: int
    sequence_length: int
    add_extra_token: bool
    seed: int
    method: Literal["systematic", "independent"] = "systematic"
    max_repeats: int | None = None

    @property
    def lengths(self) -> np.ndarray:
        """`[D]` int32 tokens of the split's documents."""
        return self.sequence_lengths[self.first_document :][: self.num_documents]


@dataclass(frozen=True)
class Pieces:
    """Parts of documents that are still to be read: `[K]` each, `start <= token < stop`."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, rows: list[tuple[int, int, int]]) -> Pieces:
        """Returns pieces from rows of `(document, start, stop)`."""
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return cls(table[:, 0], table[:, 1].astype(np.int32), table[:, 2].astype(np.int32))

    @classmethod
    def joined(cls, parts: list[Pieces]) -> Pieces:
        """Returns all pieces that have tokens, in the order given."""
        document, start, stop = (
            np.concatenate([getattr(p, name) for p in parts])
            for name in ("document", "start", "stop")
        )
        kept = stop > start
        return cls(document[kept], start[kept], stop[kept])


@dataclass(frozen=True)
class Segment:
    """Consecutive samples of a data set that one set of weights has planned.

    Attributes:
        corpus: the corpus that it plans.
        start: the data set's sample number of the segment's first sample.
        stage: number of earlier segments.
        first_epoch: number of the epoch that it begins in.
        documents: `[P]` sequence number of each visited entry.
        starts: `[P]` int32 first token of each entry, None: all entries are whole documents.
        stops: `[P]` int32 the token after its last one, or None.
        is_piece: bool for each entry of the first epoch, whether it is left over from an earlier
            segment; None: no entry is.
        seen: `[D]` int32 visits that earlier segments began in the first epoch; None: none.
        sample_index: `[N + 1, 2]` as returned by `draws.sample_index`.
        entry_bounds: first entry of each epoch, then P.
        token_bounds: tokens before each epoch, then all.
    """

    corpus: Corpus = field(repr=False)
    start: int
    stage: int
    first_epoch: int
    documents: np.ndarray = field(repr=False)
    starts: np.ndarray | None = field(repr=False)
    stops: np.ndarray | None = field(repr=False)
    is_piece: np.ndarray | None = field(repr=False)
    seen: np.ndarray | None = field(repr=False)
    sample_index: np.ndarray = field(repr=False)
    entry_bounds: tuple[int, ...]
    token_bounds: tuple[int, ...]

    @property
    def sample_bounds(self) -> list[int]:
        """First sample of each epoch, then N. A sample belongs to the epoch that completes it."""
        length, extra = self.corpus.sequence_length, int(self.corpus.add_extra_token)
        return [max(tokens - extra, 0) // length for tokens in self.token_bounds]

    @property
    def end(self) -> int:
        """The data set's sample number after the segment's last sample."""
        return self.start + self.sample_bounds[-1]

    def order(self, epoch: int) -> Any:
        """Returns the `Permutation` that orders the samples of the `epoch`-th epoch."""
        bounds = self.sample_bounds
        size = bounds[epoch + 1] - bounds[epoch]
        key = _epoch_key(self.stage, self.first_epoch + epoch)
        return sampling.Permutation(size, self.corpus.seed, key, sampling.SAMPLES)

    def row(self, position: int) -> int:
        """Returns the row of `sample_index` for the data set's sample `position`.

        Raises:
            IndexError: the sample is not in this segment.
        """
        if not self.start <= position < self.end:
            raise IndexError(
                f"sample {position} of {self.corpus.name}: the current plan holds the samples "
                f"{self.start} to {self.end - 1}"
            )
        bounds, local = self.sample_bounds, position - self.start
        epoch = bisect.bisect_right(bounds, local) - 1
        return bounds[epoch] + self.order(epoch)[local - bounds[epoch]]

    def span(self, entry: int) -> tuple[int, int, int]:
        """Returns `(sequence, first token in it, the token after its last)` of an entry."""
        document = int(self.documents[entry])
        if self.starts is None or self.stops is None:
            return document, 0, int(self.corpus.sequence_lengths[document])
        return document, int(self.starts[entry]), int(self.stops[entry])

    def parts(self, row: int) -> list[tuple[int, int, int]]:
        """Returns the parts of a sample, in order.

        Args:
            row: row of `sample_index`.

        Returns:
            `(sequence, first token in it, number of tokens)` of each part, the extra token
            included.
        """
        (begin, offset), (end, end_offset) = self.sample_index[row : row + 2].tolist()
        extra = int(self.corpus.add_extra_token)
        found = []
        for entry in range(begin, end + 1):
            document, start, stop = self.span(entry)
            if entry == end:
                stop = min(stop, start + end_offset + extra)
            if entry == begin:
                start += offset
            # Without the extra token a sample's start may be given as the end of the previous
            # entry.
            if stop > start:
                found.append((document, start, stop - start))
        return found


def first_segment(
    corpus: Corpus, weights: np.ndarray, num_samples: int | None, start: int = 0
) -> Segment:
    """Plans a data set of which nothing has been seen.

    Args:
        corpus: the documents.
        weights: `[D]` float32.
        num_samples: samples of the data set, including those before `start`; None: one epoch.
        start: number of the first sample.

    Raises:
        DatasetError: no document of a weight above 0 has tokens, or a weight is not usable.
    """
    return _plan(corpus, weights, num_samples, start, 0, 0, None, Pieces.of([]))


def next_segment(
    segment: Segment, weights: np.ndarray, num_samples: int | None, position: int
) -> Segment:
    """Continues the plan under new weights, see the module.

    Args:
        segment: the plan until now.
        weights: `[D]` float32 new weights.
        num_samples: total samples of the data set; None: to the end of the epoch.
        position: number of the data set's samples that have been seen. The segment must hold one
            more, so that the result does not depend on where its plan happens to end.

    Raises:
        DatasetError: as `first_segment`.
    """
    if not segment.start <= position < segment.end:
        raise ValueError(f"position {position} is outside {segment.start} to {segment.end - 1}")
    corpus, bounds, local = segment.corpus, segment.sample_bounds, position - segment.start
    epoch = bisect.bisect_right(bounds, local) - 1
    consumed = np.zeros(bounds[epoch + 1] - bounds[epoch], dtype=np.bool_)
    visited = np.arange(local - bounds[epoch], dtype=np.int64)
    consumed[segment.order(epoch).many(visited)] = True
    seen, left = _left_of(segment, epoch, consumed)
    # The first sample of an epoch begins with the tokens left over from the epoch before.
    if not consumed[0]:
        left.append(_tail(segment, epoch))
    pieces = Pieces.joined(left)
    number = segment.first_epoch + epoch
    return _plan(corpus, weights, num_samples, position, segment.stage + 1, number, seen, pieces)


def _left_of(segment: Segment, epoch: int, consumed: np.ndarray) -> tuple[np.ndarray, list[Pieces]]:
    """Returns `[D]`, the visits begun in an epoch, and the rest of those.

    Args:
        segment: the plan.
        epoch: the segment's epoch that is in progress.
        consumed: bool for each sample of the epoch.
    """
    corpus = segment.corpus
    chosen = slice(segment.entry_bounds[epoch], segment.entry_bounds[epoch + 1])
    documents = segment.documents[chosen]
    starts = None if segment.starts is None else segment.starts[chosen]
    stops = None if segment.stops is None else segment.stops[chosen]
    first_token = segment.sample_bounds[epoch] * corpus.sequence_length
    found = sampling.remaining(
        documents,
        corpus.sequence_lengths,
        first_token=first_token - segment.token_bounds[epoch],
        sequence_length=corpus.sequence_length,
        consumed=consumed,
        starts=starts,
        stops=stops,
    )
    drawn = np.ones(len(documents), dtype=np.bool_)
    left = [Pieces(documents[found.piece_entry], found.piece_start, found.piece_stop)]
    seen = np.zeros(corpus.num_documents, dtype=np.int32)
    if epoch == 0 and segment.is_piece is not None:
        drawn = ~segment.is_piece
        untouched = np.flatnonzero(segment.is_piece & ~found.begun)
        assert starts is not None and stops is not None
        left.append(Pieces(documents[untouched], starts[untouched], stops[untouched]))
    if epoch == 0 and segment.seen is not None:
        seen += segment.seen
    begun = documents[found.begun & drawn] - corpus.first_document
    seen += np.bincount(begun, minlength=corpus.num_documents).astype(np.int32)
    return seen, left


def _tail(segment: Segment, epoch: int) -> Pieces:
    """Returns the tokens before an epoch that are in no sample of earlier epochs."""
    length = segment.corpus.sequence_length
    missing = segment.token_bounds[epoch] - segment.sample_bounds[epoch] * length
    found: list[tuple[int, int, int]] = []
    entry = segment.entry_bounds[epoch]
    while missing > 0:
        entry -= 1
        document, start, stop = segment.span(entry)
        start = max(start, stop - missing)
        missing -= stop - start
        found.append((document, start, stop))
    return Pieces.of(found[::-1])


def _plan(
    corpus: Corpus,
    weights: np.ndarray,
    num_samples: int | None,
    start: int,
    stage: int,
    first_epoch: int,
    seen: np.ndarray | None,
    pieces: Pieces,
) -> Segment:
    _check_tokens(corpus, weights)
    wanted = None if num_samples is None else num_samples - start
    extra, length = int(corpus.add_extra_token), corpus.sequence_length
    epochs: list[np.ndarray] = []
    tokens, samples = [0], 0
    starts = stops = is_piece = None
    while not epochs or (wanted is not None and samples < wanted):
        number = first_epoch + len(epochs)
        fresh = bool(epochs)
        counts = _counts(corpus, weights, stage, number, None if fresh else seen)
        documents = sampling.visit_order(
            counts,
            seed=corpus.seed,
            epoch=_epoch_key(stage, number),
            first_document=corpus.first_document,
            extra=0 if fresh else len(pieces.document),
        )
        if not fresh and len(pieces.document):
            is_piece = documents < 0
            documents, starts, stops = _with_pieces(corpus, documents, pieces)
        here = (None, None) if fresh else (starts, stops)
        tokens.append(
            tokens[-1]
            + sampling.epoch_tokens(
                documents, corpus.sequence_lengths, starts=here[0], stops=here[1]
            )
        )
        epochs.append(documents)
        samples = max(tokens[-1] - extra, 0) // length
    joined = epochs[0] if len(epochs) == 1 else np.concatenate(epochs)
    if starts is not None and stops is not None and len(epochs) > 1:
        later = joined[len(starts) :]
        starts = np.concatenate([starts, np.zeros(len(later), np.int32)])
        stops = np.concatenate([stops, corpus.sequence_lengths[later]])
    index = sampling.sample_index(
        joined,
        corpus.sequence_lengths,
        length,
        add_extra_token=corpus.add_extra_token,
        starts=starts,
        stops=stops,
    )
    entry_bounds = np.cumsum([0, *(len(e) for e in epochs)]).tolist()
    return Segment(
        corpus,
        start,
        stage,
        first_epoch,
        joined,
        starts,
        stops,
        is_piece,
        seen,
        index,
        tuple(entry_bounds),
        tuple(tokens),
    )


def _counts(
    corpus: Corpus, weights: np.ndarray, stage: int, epoch: int, seen: np.ndarray | None
) -> np.ndarray:
    """Returns `[D]` int32 draws of an epoch, or of the rest of an epoch after `seen`."""
    key, draws = _epoch_key(stage, epoch), corpus.num_documents
    common: dict[str, Any] = {"seed": corpus.seed, "epoch": key, "max_repeats": corpus.max_repeats}
    try:
        if seen is None:
            return sampling.draw_counts(weights, draws, method=corpus.method, **common)
        if corpus.method == "independent":
            # Independent draws ignore earlier ones, except under a limit.
            left = max(draws - int(seen.sum()), 0)
            if corpus.max_repeats is not None:
                weights = np.maximum(
                    sampling.expected_counts(weights, draws, corpus.max_repeats) - seen, 0
                )
                common["max_repeats"] = None
                left = left if weights.any() else 0
            if left == 0:
                return np.zeros(len(weights), dtype=np.int32)
            return sampling.draw_counts(weights, left, method=corpus.method, **common)
        return sampling.re_draw_counts(weights, draws, seen, **common)
    except ValueError as error:
        raise DatasetError(f"{corpus.name}: {error}") from error


def _with_pieces(
    corpus: Corpus, documents: np.ndarray, pieces: Pieces
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inserts pieces at the places that `visit_order` reserved for them (-1 - k for piece k)."""
    places = np.flatnonzero(documents < 0)
    numbers = -1 - documents[places]
    documents[places] = pieces.document[numbers]
    starts = np.zeros(len(documents), dtype=np.int32)
    stops = corpus.sequence_lengths[documents].astype(np.int32)
    starts[places], stops[places] = pieces.start[numbers], pieces.stop[numbers]
    return documents, starts, stops


def _check_tokens(corpus: Corpus, weights: np.ndarray) -> None:
    if len(weights) != corpus.num_documents:
        raise ValueError(f"{len(weights)} weights for {corpus.num_documents} documents")
    if not bool(((weights > 0) & (corpus.lengths > 0)).any()):
        raise DatasetError(
            f"{corpus.name}: none of its {corpus.num_documents} documents has both tokens and a "
            "weight above 0; give the split a larger share with --split, or other weights"
        )


def _epoch_key(stage: int, epoch: int) -> int:
    return stage * _STAGE_STRIDE + epoch
