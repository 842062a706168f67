"""A sample of a run's documents, with their texts, weights and text statistics.

Shapes: n documents in the sample, p periods (from one saved iteration to the next).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from megatron_dwm.data import weights_seen
from megatron_dwm.data.index import IndexSummary, read_index
from megatron_dwm.data.token_reader import TokenReader
from megatron_dwm.errors import DWMError, in_short
from megatron_dwm.logs.text_statistics import (
    compression_ratio,
    rank_correlation,
    rank_correlation_within,
    symbol_share,
    type_token_ratio,
)

Decode = Callable[[list[int]], str]

# Statistics that weights are compared with: name -> label of the axis.
STATISTICS = {
    "length": "tokens of the document",
    "type-token ratio": "different words among the first 200 (share)",
    "compression ratio": "compressed size over size (low: repeats itself)",
    "share of symbols": "characters that are not letters, digits or spaces (share)",
}
_TOKENS = 16384  # maximum tokens of a document that are decoded
_BYTES = 256  # number of ids of a byte-level vocabulary
_LENGTH = 400  # characters of a passage
_EACH = 8  # passages of each kind
# Tokens seen from which on a document's weight is more than that of one random sample around it.
_ENOUGH = 32


@dataclass(frozen=True)
class DocumentSample:
    """A random sample of the documents that a run has seen.

    Attributes:
        prefixes: prefixes of the data sets.
        seen: number of documents that the run has seen, over all data sets.
        sets: `[n]` number of the data set.
        numbers: `[n]` number of the document in it.
        weights: `[n]` mean weight of the tokens seen.
        tokens: `[n]` tokens seen, counting repetitions.
        texts: texts of the documents, or their beginnings.
        statistics: `[n]` values, by the names of `STATISTICS`.
        periods: `[p]` first and last iteration.
        by_period: `[p, n]` mean weight of the tokens seen in the period, NaN if there were none.
    """

    prefixes: list[str]
    seen: int
    sets: numpy.ndarray
    numbers: numpy.ndarray
    weights: numpy.ndarray
    tokens: numpy.ndarray
    texts: list[str]
    statistics: dict[str, numpy.ndarray]
    periods: list[tuple[int, int]]
    by_period: numpy.ndarray

    def correlations(self, name: str) -> tuple[float, float, float]:
        """Returns a statistic's rank correlation with weight, its standard error, and within sets.

        The error is that for n independent pairs without correlation, `1 / sqrt(n - 1)`.
        """
        values = self.statistics[name]
        count = int(numpy.isfinite(values).sum())
        error = 1 / math.sqrt(count - 1) if count > 2 else math.nan
        within = rank_correlation_within(values, self.weights, self.sets)
        return rank_correlation(values, self.weights), error, within

    def over_periods(self, name: str) -> list[float]:
        """Returns `[p]` rank correlations of a statistic with the weight, one per period."""
        return [rank_correlation(self.statistics[name], weights) for weights in self.by_period]


@dataclass(frozen=True)
class Passage:
    """The beginning of a document.

    Attributes:
        prefix: prefix of its data set.
        number: its number in the data set.
        weight: its mean weight.
        length: its length in tokens.
        text: at most 400 characters.
    """

    prefix: str
    number: int
    weight: float
    length: int
    text: str


def sample_documents(
    run: str, prefixes: Sequence[str] | None, decode: Decode | None, count: int, seed: int
) -> DocumentSample | None:
    """Draws documents that a run has seen, uniformly at random, and reads their texts.

    Args:
        run: the run's folder.
        prefixes: current prefixes of the data sets, in the run's order; None: unchanged.
        decode: turns token ids into text; None if tokens are bytes.
        count: maximum n.
        seed: seed of the draw.

    Returns:
        None if the run has recorded no document weights, or has seen no document.

    Raises:
        DWMError: the recorded weights are damaged, a data set is missing or a different one, or its
            tokens are not those of the tokenizer.
    """
    iterations = weights_seen.iterations(run)
    if not iterations:
        return None
    last = weights_seen.read(run, iterations[-1])
    indices = _indices(run, last.prefixes, prefixes)
    known = [numpy.flatnonzero(tokens) for tokens in last.tokens]
    for index, documents, prefix in zip(indices, known, last.prefixes, strict=True):
        if len(documents) and documents[-1] >= index.documents:
            raise DWMError(
                f"--data {index.prefix}: has {index.documents} documents, but the run has read "
                f"document {documents[-1]} of {prefix}; name the data sets in the order of the "
                "run's"
            )
    bounds = numpy.cumsum([0, *map(len, known)])
    seen = int(bounds[-1])
    if not seen:
        return None
    drawn = numpy.random.default_rng(seed).choice(seen, min(count, seen), replace=False)
    drawn.sort()
    sets = numpy.searchsorted(bounds, drawn, side="right") - 1
    numbers = numpy.array([known[k][d - bounds[k]] for k, d in zip(sets, drawn, strict=True)])
    tokens, weighted = _sums(last, sets, numbers)
    texts, lengths = _texts(indices, sets, numbers, decode)
    periods, by_period = _periods(run, iterations, sets, numbers)
    figures = {
        "length": lengths,
        "type-token ratio": numpy.array([type_token_ratio(text) for text in texts]),
        "compression ratio": numpy.array([compression_ratio(text) for text in texts]),
        "share of symbols": numpy.array([symbol_share(text) for text in texts]),
    }
    assert figures.keys() == STATISTICS.keys()
    return DocumentSample(
        [index.prefix for index in indices],
        seen,
        sets,
        numbers,
        weighted / tokens,
        tokens,
        texts,
        figures,
        periods,
        by_period,
    )


def passages(sample: DocumentSample) -> dict[str, list[Passage]]:
    """Returns the documents of highest and lowest weight, and the uncertain ones, of a sample.

    Uncertain are those nearest to the middle between the 5 % and 95 % quantiles of the weights.
    Documents of which too little was seen are left out if there are enough others; no document is
    shown twice.
    """
    chosen = numpy.flatnonzero(sample.tokens >= _ENOUGH)
    if len(chosen) < 3 * _EACH:
        chosen = numpy.arange(len(sample.weights))
    weights = sample.weights[chosen]
    low, high = numpy.quantile(weights, [0.05, 0.95])
    orders = {
        "most wanted": numpy.argsort(-weights, kind="stable"),
        "least wanted": numpy.argsort(weights, kind="stable"),
        "uncertain": numpy.argsort(abs(weights - (low + high) / 2), kind="stable"),
    }
    found: dict[str, list[Passage]] = {}
    taken: set[int] = set()
    each = min(_EACH, -(-len(chosen) // len(orders)))
    for kind, order in orders.items():
        documents = [int(k) for k in chosen[order] if int(k) not in taken][:each]
        taken.update(documents)
        found[kind] = [_passage(sample, k) for k in documents]
    return found


def _passage(sample: DocumentSample, k: int) -> Passage:
    length = int(sample.statistics["length"][k])
    text = sample.texts[k][:_LENGTH]
    if len(sample.texts[k]) > _LENGTH:
        text += "…"
    prefix, number = sample.prefixes[sample.sets[k]], int(sample.numbers[k])
    return Passage(prefix, number, float(sample.weights[k]), length, printable(text))


def printable(text: str) -> str:
    """Returns a text with unprintable characters (such as control characters) replaced."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs", "Cn") else "\ufffd"
        for char in text.replace("\r\n", "\n")
    )


def _indices(run: str, stored: Sequence[str], given: Sequence[str] | None) -> list[IndexSummary]:
    if given is not None and len(given) != len(stored):
        raise DWMError(
            f"--data names {len(given)} data sets, but {run} has read {len(stored)} "
            f"({', '.join(stored)}); give as many, in this order"
        )
    try:
        return [read_index(prefix) for prefix in given or stored]
    except DWMError as error:
        raise DWMError(f"--data: {error}") from None


def _sums(
    seen: weights_seen.DocumentWeightsSeen, sets: numpy.ndarray, numbers: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Returns `[n]` tokens and `[n]` tokens at their weights; 0 beyond what was seen."""
    found = []
    for sums in (seen.tokens, seen.weighted):
        pairs = zip(sets, numbers, strict=True)
        found.append(numpy.array([sums[k][d] if d < len(sums[k]) else 0.0 for k, d in pairs]))
    return found[0], found[1]


def _periods(
    run: str, iterations: list[int], sets: numpy.ndarray, numbers: numpy.ndarray
) -> tuple[list[tuple[int, int]], numpy.ndarray]:
    """Returns the periods, and `[p, n]` mean weights in each: differences of the running sums."""
    periods, rows = [], []
    before = (0, numpy.zeros(len(sets)), numpy.zeros(len(sets)))
    for iteration in iterations:
        tokens, weighted = _sums(weights_seen.read(run, iteration), sets, numbers)
        new = tokens - before[1]
        # Less than a whole token is only the rounding of equal sums.
        known = new > 0.5
        mean = numpy.full(len(sets), numpy.nan)
        mean[known] = (weighted - before[2])[known] / new[known]
        if known.any():
            periods.append((before[0] + 1, iteration))
            rows.append(mean)
        before = (iteration, tokens, weighted)
    return periods, numpy.array(rows).reshape(len(periods), len(sets))


def _texts(
    indices: list[IndexSummary],
    sets: numpy.ndarray,
    numbers: numpy.ndarray,
    decode: Decode | None,
) -> tuple[list[str], numpy.ndarray]:
    """Returns texts and `[n]` lengths in tokens."""
    readers = [TokenReader(index) for index in indices]
    texts, lengths = [], []
    for k, number in zip(sets.tolist(), numbers.tolist(), strict=True):
        tokens = readers[k].document(number, _TOKENS)
        lengths.append(float(indices[k].document_tokens(number, number + 1)[0]))
        where = f"{indices[k].prefix}.bin: document {number}"
        texts.append(_text(tokens, decode, where))
    return texts, numpy.array(lengths)


def _text(tokens: numpy.ndarray, decode: Decode | None, where: str) -> str:
    if decode is None:
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < _BYTES:
            raise DWMError(
                f"{where} has the token id {tokens.max()}, so tokens are not bytes; give the "
                "tokenizer (--tokenizer-model FILE, or --tokenizer-type and what it needs)"
            )
        # The last id is not a byte of UTF-8: byte-level vocabularies use it as end of document.
        data = tokens[tokens < _BYTES - 1].astype(numpy.uint8).tobytes()
        return data.decode("utf-8", errors="replace")
    try:
        return decode(tokens.tolist())
    except Exception as error:
        # Each of Megatron's tokenizers reports an unknown id in its own way.
        raise DWMError(
            f"{where} cannot be decoded with this tokenizer ({in_short(error)}); give the one that "
            "the data were made with (--tokenizer-type, --tokenizer-model)"
        ) from None
