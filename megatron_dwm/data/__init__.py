"""Data files: indexes, weights, packed samples (nothing here imports torch or Megatron).

Drawing by weight needs the C++ engine, which is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from megatron_dwm.data.document_weights import (
    domain_summary,
    keep_top_fraction,
    weight_summary,
    weights_from_scores,
)
from megatron_dwm.data.index import (
    DatasetError,
    IndexSummary,
    SampleDocuments,
    num_packed_samples,
    read_index,
    sample_documents,
)
from megatron_dwm.data.weight_file import WeightFile, read_weights, weights_path, write_weights

if TYPE_CHECKING:
    from megatron_dwm.data.draws import Permutation, draw_counts, sample_index, visit_order
    from megatron_dwm.data.epoch_plan import Corpus, Segment, first_segment, next_segment

_DRAWS = ("Permutation", "draw_counts", "sample_index", "visit_order")
_PLANS = ("Corpus", "Segment", "first_segment", "next_segment")

__all__ = [
    "Corpus",
    "DatasetError",
    "IndexSummary",
    "Permutation",
    "SampleDocuments",
    "Segment",
    "WeightFile",
    "domain_summary",
    "draw_counts",
    "first_segment",
    "keep_top_fraction",
    "next_segment",
    "num_packed_samples",
    "read_index",
    "read_weights",
    "sample_documents",
    "sample_index",
    "visit_order",
    "weight_summary",
    "weights_from_scores",
    "weights_path",
    "write_weights",
]


def __getattr__(name: str) -> Any:
    """Imports names that need the engine on first use."""
    import importlib

    for names, home in ((_DRAWS, "draws"), (_PLANS, "epoch_plan")):
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
