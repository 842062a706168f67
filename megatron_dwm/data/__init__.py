"""Data files: indices, packed samples (and nothing that imports torch or Megatron)."""

from megatron_dwm.data.index import (
    DatasetError,
    IndexSummary,
    SampleDocuments,
    num_packed_samples,
    read_index,
    sample_documents,
)

__all__ = [
    "DatasetError",
    "IndexSummary",
    "SampleDocuments",
    "num_packed_samples",
    "read_index",
    "sample_documents",
]
