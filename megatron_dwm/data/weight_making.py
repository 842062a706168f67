"""Makes weight files from numbers in other files, or with equal weights for all documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dwm.data.document_weights import keep_top_fraction, weights_from_scores
from megatron_dwm.data.index import read_index
from megatron_dwm.data.weight_file import WeightFile, write_weights
from megatron_dwm.data.weight_sources import Columns, read_values
from megatron_dwm.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How to make the weights of a data set.

    Attributes:
        source: File with numbers, or None for weight 1 everywhere.
        columns: What to read from it.
        default: Number for documents that it leaves out, or None if it must not leave out any.
        temperature: Temperature that turns scores into weights; None: the numbers are weights.
        top_fraction: Share of the best documents that keep their weight; None: all of them.
        domain: Domain of all documents, or None.
    """

    source: Path | None
    columns: Columns
    default: float | None = None
    temperature: float | None = None
    top_fraction: float | None = None
    domain: str | None = None


def make(prefix: str, output: str, recipe: Recipe) -> WeightFile:
    """Makes the weight file of a data set.

    Args:
        prefix: Path of the data set without `.idx`.
        output: Weight file to write.
        recipe: How to make the weights.

    Raises:
        DWMError: The data set is damaged, the file is malformed, or the weights cannot be used for
            drawing.
    """
    index = read_index(prefix)
    numbers: np.ndarray | None = None
    domains: np.ndarray | None = None
    names: list[str] = []
    if recipe.source is not None:
        values = read_values(recipe.source, index, recipe.columns, recipe.default)
        numbers, domains, names = values.numbers, values.domains, values.names
    if recipe.domain is not None:
        names, domains = [recipe.domain], np.zeros(index.documents, np.int32)
    weights = np.ones(index.documents, np.float32) if numbers is None else numbers
    try:
        if recipe.temperature is not None:
            weights = weights_from_scores(weights, recipe.temperature)
        if recipe.top_fraction is not None:
            weights = keep_top_fraction(weights, recipe.top_fraction)
    except ValueError as error:
        raise InputError(f"{recipe.source or f'{prefix}.idx'}: {error}") from error
    return write_weights(output, weights, index, domains, names)
