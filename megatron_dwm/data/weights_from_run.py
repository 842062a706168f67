"""Makes weight files from a run's document weights: learn small, apply large.

    W_d = (sum_t w + P W) / (T_d + P)    over the T_d tokens t of document d that the run has seen;
                                         W: the mean over all tokens that it has seen of the data
                                         set, P: `--prior-tokens`
    share_k' = share_k W_k / sum_j share_j W_j    shares of the blend, for data set k with mean W_k

A document that the run has not seen gets the mean weight of its data set. Weight files decide how
often documents of one data set are drawn; the blend decides between data sets, and its new shares
are in `Found.share`.

Shapes: D documents of a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from megatron_dwm.data.index import read_index
from megatron_dwm.data.weight_file import WeightFile, write_weights
from megatron_dwm.data.weights_seen import DocumentWeightsSeen
from megatron_dwm.errors import DWMError


@dataclass(frozen=True)
class Found:
    """The result for one data set.

    Attributes:
        file: the weight file that was written.
        seen: share of the documents that the run has seen.
        mean: mean weight of a token of the data set.
        share: new share of the blend.
    """

    file: WeightFile
    seen: float
    mean: float
    share: float


def weights_of_documents(
    tokens: numpy.ndarray, weighted: numpy.ndarray, documents: int, prior: float
) -> tuple[numpy.ndarray, float]:
    """Returns `[D]` float32 weights, and the mean weight of the tokens seen.

    Args:
        tokens: number of tokens of each document that were seen, up to the last document seen.
        weighted: sum of their weights.
        documents: D.
        prior: P > 0, tokens of the data set's mean weight that are added to each document.
    """
    size = min(documents, len(tokens))
    counts, sums = numpy.zeros(documents), numpy.zeros(documents)
    counts[:size], sums[:size] = tokens[:size], weighted[:size]
    mean = float(sums.sum() / counts.sum()) if counts.sum() > 0 else 1.0
    return ((sums + prior * mean) / (counts + prior)).astype(numpy.float32), mean


def write_from_run(
    seen: DocumentWeightsSeen,
    prefixes: Sequence[str],
    outputs: Sequence[str],
    shares: Sequence[float],
    prior: float,
) -> list[Found]:
    """Writes the weight file of each data set.

    Args:
        seen: see `weights_seen.read`.
        prefixes: prefixes of the data sets to draw from, in the run's order.
        outputs: path of each weight file.
        shares: share of each in the blend that the run has read.
        prior: see `weights_of_documents`.

    Raises:
        DWMError: a data set has fewer documents than were seen, or no document that can be drawn
            has a weight above 0. No file is written then.
    """
    means, arrays, indices, coverage = [], [], [], []
    for k, prefix in enumerate(prefixes):
        index = read_index(prefix)
        last = numpy.flatnonzero(seen.tokens[k])
        if len(last) and last[-1] >= index.documents:
            raise DWMError(
                f"{prefix}: has {index.documents} documents, but the run has read its document "
                f"{last[-1]} ({seen.prefixes[k]}); name the data sets in the order of the run's"
            )
        weights, mean = weights_of_documents(
            seen.tokens[k], seen.weighted[k], index.documents, prior
        )
        if not (weights > 0).any():
            # All of it was dropped: its share is 0, and a file of zeros could not be drawn from.
            weights = numpy.ones_like(weights)
        arrays.append(weights)
        indices.append(index)
        means.append(mean)
        coverage.append(len(last) / max(1, index.documents))
    whole = sum(share * mean for share, mean in zip(shares, means, strict=True))
    if not whole > 0:
        raise DWMError(
            "the run has given every document it has read, of the data sets that have a share, a "
            "weight of 0"
        )
    files = [write_weights(*one) for one in zip(outputs, arrays, indices, strict=True)]
    return [
        Found(file, part, mean, share * mean / whole)
        for file, part, mean, share in zip(files, coverage, means, shares, strict=True)
    ]
