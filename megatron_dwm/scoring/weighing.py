"""Turns the scores of several corpora into weights, domains and a summary.

Shapes: D documents of one corpus.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from megatron_dwm.data.document_weights import (
    domain_summary,
    keep_top_fraction,
    weights_from_scores,
)
from megatron_dwm.data.index import IndexSummary
from megatron_dwm.data.weight_file import WeightFile, document_chunks
from megatron_dwm.errors import DWMError
from megatron_dwm.scoring.documents import EMPTY_SCORE

_COLUMNS = (
    "domain",
    "documents",
    "tokens",
    "mean weight",
    "share of draws",
    "share of tokens drawn",
)


def weights_of(
    scores: Sequence[np.ndarray],
    prefixes: Sequence[str],
    temperature: float,
    top_fraction: float | None,
) -> list[np.ndarray]:
    """Turns the scores of all corpora together into weights, comparable across files.

    `w = exp((s - max s) / T)` with mean 1 over all documents with tokens; documents without tokens
    get 0. With a fraction, only that share of the documents with tokens keeps its weight.

    Args:
        scores: for each corpus, `[D]` float32, `EMPTY_SCORE` for a document without tokens.
        prefixes: name of each corpus.
        temperature: T > 0.
        top_fraction: share to keep, in (0, 1]; None for all.

    Returns:
        `[D]` float32 weights of each corpus.

    Raises:
        DWMError: no document has tokens, or a whole corpus is left without weight.
    """
    together = np.concatenate(scores)
    scored = together != EMPTY_SCORE
    if not scored.any():
        raise DWMError(f"{', '.join(prefixes)}: no document has tokens, so there is no score")
    found = weights_from_scores(together[scored], temperature)
    if top_fraction is not None:
        found = keep_top_fraction(found, top_fraction)
    weights = np.zeros(len(together), np.float32)
    weights[scored] = found
    parts = np.split(weights, np.cumsum([len(s) for s in scores])[:-1])
    for prefix, part in zip(prefixes, parts, strict=True):
        if not part.any():
            raise DWMError(
                f"{prefix}: no document keeps a weight above 0 beside those of the other files; "
                "leave it out of --data, or raise --temperature or --top-fraction (scores are "
                "kept, so it will be quick)"
            )
    return parts


def summary(files: Sequence[WeightFile], indices: Sequence[IndexSummary]) -> str:
    """Returns a table of each domain's share, over all corpora together.

    A corpus without domains is one line under its file name. `share of draws` is the share of the
    weight, and so of the documents drawn; `share of tokens drawn` counts each document with its
    tokens. The last line is the effective sample size, `(sum w)^2 / sum w^2`.

    Args:
        files: the weight files.
        indices: index of each.
    """
    rows: dict[str, np.ndarray] = {}
    total = squares = 0.0
    for file, index in zip(files, indices, strict=True):
        weight = drawn = 0.0
        for chunk in document_chunks(file.documents):
            values = file.weights[chunk].astype(np.float64)
            lengths = index.document_tokens(chunk.start, chunk.stop)
            weight += float(values.sum())
            squares += float((values * values).sum())
            drawn += float((values * lengths).sum())
        total += weight
        found = domain_summary(file, index) or [
            {
                "domain": os.path.basename(index.prefix),
                "documents": file.documents,
                "tokens": index.tokens,
                "weight_share": 1.0,
                "expected_token_share": 1.0,
            }
        ]
        for row in found:
            figures = np.array(
                [
                    row["documents"],
                    row["tokens"],
                    row["weight_share"] * weight,
                    row["expected_token_share"] * drawn,
                ]
            )
            rows[row["domain"]] = rows.get(row["domain"], 0) + figures
    documents, _, _, all_drawn = np.sum(list(rows.values()), axis=0)
    lines = [_COLUMNS]
    for name, (count, tokens, weight, drawn) in rows.items():
        lines.append(
            (
                name,
                f"{int(count):,}",
                f"{int(tokens):,}",
                f"{weight / max(count, 1):.3f}",
                f"{weight / total:.1%}",
                f"{drawn / (all_drawn or 1):.1%}",
            )
        )
    effective = total * total / squares
    return (
        f"{_aligned(lines)}\n\neffective sample size: {effective:,.0f} of {int(documents):,} "
        f"documents ({effective / documents:.1%})"
    )


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
