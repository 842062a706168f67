"""Weighted epochs: how often and in which order documents are drawn, and how samples are cut.

It needs neither torch nor Megatron. Everything is a pure function of its arguments: the same on any
machine and for any number of threads (`threads=0` uses all cores).

A "document" is what Megatron's `GPTDataset` calls one: a sequence of the `.idx`. Document d of
weight w_d is drawn e_d = n w_d / sum(w) times on average in an epoch of n draws. Draws are laid
end to end in the order of a keyed `Permutation` (`visit_order`), and cut into samples of equal
length (`sample_index`); samples are visited in the order of another permutation, computed on the
fly.

Shapes: S sequences, D documents, P visited entries, N samples, K pieces.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from megatron_dwm.data.engine import engine

_data_engine = engine()

Permutation = _data_engine.Permutation
DOCUMENTS: int = _data_engine.DOCUMENTS
SAMPLES: int = _data_engine.SAMPLES

METHODS = ("systematic", "independent")


class Remaining(NamedTuple):
    """What is left of the entries of an epoch, see `remaining`.

    Attributes:
        begun: `[P]` bool, whether a token of the entry has been consumed.
        piece_entry: `[K]` int64, the entry of each piece, ascending.
        piece_start: `[K]` int32, first token of the piece in its document.
        piece_stop: `[K]` int32, the token after its last one.
    """

    begun: np.ndarray
    piece_entry: np.ndarray
    piece_start: np.ndarray
    piece_stop: np.ndarray


def draw_counts(
    weights: np.ndarray,
    num_draws: int,
    *,
    seed: int,
    epoch: int,
    method: Literal["systematic", "independent"] = "systematic",
    max_repeats: int | None = None,
    threads: int = 0,
) -> np.ndarray:
    """Decide how often each document is visited in an epoch.

    Args:
        weights: `[D]` real numbers, finite and >= 0 also as float32; need not add up to 1.
        num_draws: Number of draws n of the epoch.
        seed: Any signed 64-bit integer.
        epoch: Any signed 64-bit integer.
        method: "systematic": every count is its expectation e_d rounded down or up, with
            probabilities that make the mean e_d (randomised systematic resampling); equal
            weights with n = D visit every document exactly once. "independent": n independent
            draws with replacement, like `torch.multinomial`; counts vary by about sqrt(e_d).
        max_repeats: Limit of e_d; what it cuts off goes to the other documents in proportion to
            their weights. None for no limit. Independent draws vary around it.
        threads: Number of threads, 0 for all cores.

    Returns:
        `[D]` int32 with the sum n.

    Raises:
        ValueError: A weight is negative or not finite (the first such is named), all are 0, or
            `max_repeats` leaves fewer than `num_draws` draws.
    """
    weights = _as_float32(weights, "weights")
    if method == "systematic":
        return _systematic(weights, num_draws, None, seed, epoch, max_repeats, threads)
    if method != "independent":
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    if max_repeats is not None:
        # The limited expectations can serve as weights. In double precision, because a scale for
        # tiny weights would be infinite in float32.
        limit = _checked_limit(max_repeats)
        scale = _data_engine.expected_scale(weights, num_draws, limit, threads)
        weights = np.minimum(weights.astype(np.float64) * scale, limit).astype(np.float32)
    return _data_engine.independent_counts(weights, num_draws, seed, epoch, threads)


def expected_counts(
    weights: np.ndarray, num_draws: int, max_repeats: int, threads: int = 0
) -> np.ndarray:
    """Return e_d `[D]` float32 under a limit; arguments and errors as in `draw_counts`."""
    weights, limit = _as_float32(weights, "weights"), _checked_limit(max_repeats)
    scale = _data_engine.expected_scale(weights, num_draws, limit, threads)
    return np.minimum(weights * np.float32(scale), np.float32(limit))


def re_draw_counts(
    weights: np.ndarray,
    num_draws: int,
    consumed: np.ndarray,
    *,
    seed: int,
    epoch: int,
    max_repeats: int | None = None,
    threads: int = 0,
) -> np.ndarray:
    """Decide how often each document is visited in the rest of an epoch, under new weights.

    The expected count is max(0, e_d - consumed_d), with e_d as in `draw_counts` for the whole
    epoch. Visits beyond a document's e_d are not taken from the other documents: the sum of the
    counts can exceed num_draws - sum(consumed).

    Args:
        weights: `[D]` as in `draw_counts`.
        num_draws: Number of draws of the whole epoch.
        consumed: `[D]` integers >= 0, the visits that have been made in this epoch.
        seed: As in `draw_counts`.
        epoch: As in `draw_counts`.
        max_repeats: As in `draw_counts`, for the visits before and after together.
        threads: Number of threads, 0 for all cores.

    Returns:
        `[D]` int32.

    Raises:
        ValueError: As in `draw_counts`, or `consumed` is malformed.
    """
    return _systematic(
        _as_float32(weights, "weights"),
        num_draws,
        _as_int32(consumed, "consumed"),
        seed,
        epoch,
        max_repeats,
        threads,
    )


def visit_order(
    counts: np.ndarray,
    *,
    seed: int,
    epoch: int,
    first_document: int = 0,
    extra: int = 0,
    threads: int = 0,
) -> np.ndarray:
    """Lay out the drawn documents in the order in which they are visited.

    Args:
        counts: `[D]` integers >= 0, how often each document is visited.
        seed: Any signed 64-bit integer.
        epoch: Any signed 64-bit integer.
        first_document: Number of the document of `counts[0]`.
        extra: How many left-over pieces to mix in, as the numbers -1 to -extra.
        threads: Number of threads, 0 for all cores.

    Returns:
        `[P]` with P = sum(counts) + extra: entry i is draw `Permutation(P, seed, epoch,
        DOCUMENTS)[i]` of the draws sorted by document, pieces last. int32, or int64 when a
        number does not fit.

    Raises:
        ValueError: A count is negative (the first one is named), or an argument is out of range.
    """
    counts = _as_int32(counts, "counts")
    return _data_engine.visit_order(counts, seed, epoch, threads, first_document, extra)


def sample_index(
    entry_documents: np.ndarray,
    sequence_lengths: np.ndarray,
    sequence_length: int,
    *,
    add_extra_token: bool = True,
    starts: np.ndarray | None = None,
    stops: np.ndarray | None = None,
    threads: int = 0,
) -> np.ndarray:
    """Find where each packed sample begins, as Megatron's `build_sample_idx` does.

    Entry p takes the tokens `[starts[p], stops[p])` of sequence `entry_documents[p]`. The
    entries are laid end to end and cut every `sequence_length` tokens; the last partial sample
    is dropped.

    Args:
        entry_documents: `[P]` int32 or int64 sequence numbers.
        sequence_lengths: `[S]` int32 tokens per sequence.
        sequence_length: Tokens per sample.
        add_extra_token: Whether a sample needs one more token than it advances by, for its last
            label.
        starts: `[P]` integers, None for 0.
        stops: `[P]` integers, None for the lengths of the sequences.
        threads: Number of threads, 0 for all cores.

    Returns:
        `[N + 1, 2]` int32 (int64 for 2^31 entries and more): row k < N is the entry in which
        sample k begins and the offset of its first token from `starts[entry]`; row N is where
        the last sample ends. Without the extra token, a sample that begins where an entry ends
        is named by that end.

    Raises:
        ValueError: An argument is malformed; the first bad entry is named.
    """
    return _data_engine.sample_index(
        entry_documents,
        sequence_lengths,
        sequence_length,
        add_extra_token,
        _optional_int32(starts, "starts"),
        _optional_int32(stops, "stops"),
        threads,
    )


def epoch_tokens(
    entry_documents: np.ndarray,
    sequence_lengths: np.ndarray,
    *,
    starts: np.ndarray | None = None,
    stops: np.ndarray | None = None,
    threads: int = 0,
) -> int:
    """Return the number of tokens of all entries; arguments and errors as in `sample_index`."""
    return _data_engine.epoch_tokens(
        entry_documents,
        sequence_lengths,
        _optional_int32(starts, "starts"),
        _optional_int32(stops, "stops"),
        threads,
    )


def remaining(
    entry_documents: np.ndarray,
    sequence_lengths: np.ndarray,
    *,
    first_token: int,
    sequence_length: int,
    consumed: np.ndarray,
    starts: np.ndarray | None = None,
    stops: np.ndarray | None = None,
    threads: int = 0,
) -> Remaining:
    """Find which entries have been begun, and what is left of those.

    The entries are laid end to end from token 0 on; sample k holds the tokens `[first_token +
    k * sequence_length, first_token + (k + 1) * sequence_length)`. Tokens before sample 0 count
    as consumed, those after the last sample as not consumed. An entry without tokens counts as
    begun when the token that follows it has been consumed.

    Args:
        entry_documents: `[P]` as in `sample_index`.
        sequence_lengths: `[S]` as in `sample_index`.
        first_token: First token of sample 0; may be negative.
        sequence_length: Tokens per sample.
        consumed: `[N]` bool or uint8, whether each sample has been consumed.
        starts: As in `sample_index`.
        stops: As in `sample_index`.
        threads: Number of threads, 0 for all cores.

    Returns:
        The begun entries, and the longest ranges of their tokens that have not been consumed,
        counted from the beginning of the document.

    Raises:
        ValueError: An argument is malformed; the first bad entry is named.
    """
    consumed = np.asarray(consumed)
    if consumed.dtype == np.bool_:
        consumed = consumed.view(np.uint8)
    begun, piece_entry, piece_start, piece_stop = _data_engine.remaining(
        entry_documents,
        sequence_lengths,
        _optional_int32(starts, "starts"),
        _optional_int32(stops, "stops"),
        first_token,
        sequence_length,
        consumed,
        threads,
    )
    return Remaining(begun.view(np.bool_), piece_entry, piece_start, piece_stop)


def _systematic(
    weights: np.ndarray,
    num_draws: int,
    consumed: np.ndarray | None,
    seed: int,
    epoch: int,
    max_repeats: int | None,
    threads: int,
) -> np.ndarray:
    # In the kernels, 0 means "no limit".
    limit = 0 if max_repeats is None else _checked_limit(max_repeats)
    scale = _data_engine.expected_scale(weights, num_draws, limit, threads)
    return _data_engine.systematic_counts(weights, scale, seed, epoch, limit, consumed, threads)


def _checked_limit(max_repeats: int) -> int:
    if max_repeats < 1:
        raise ValueError(f"max_repeats: expected at least 1, found {max_repeats}")
    return max_repeats


def _as_float32(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected real numbers, found {array.dtype}")
    # Values that are too large become infinite, which the kernels refuse, naming the entry.
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _as_int32(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == np.int32 or not array.size:
        return array.astype(np.int32, copy=False)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, found {array.dtype}")
    limits = np.iinfo(np.int32)
    outside = (array < limits.min) | (array > limits.max)
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(f"{name}[{first}]: {array.flat[first]} does not fit in 32 bits")
    return array.astype(np.int32)


def _optional_int32(values: np.ndarray | None, name: str) -> np.ndarray | None:
    return None if values is None else _as_int32(values, name)
