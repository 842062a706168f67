"""Reads the tokens of single documents from a Megatron `.bin`."""

from __future__ import annotations

import numpy as np

from megatron_dwm.data.index import DatasetError, IndexSummary


class TokenReader:
    """Reads documents' tokens from a `.bin`, which is memory-mapped.

    Args:
        index: The corpus.
        vocab_size: Token ids must be below it; None allows any.
    """

    def __init__(self, index: IndexSummary, vocab_size: int | None = None) -> None:
        self.index, self.vocab_size = index, vocab_size
        path = f"{index.prefix}.bin"
        self._raw = np.zeros(0, np.uint8)
        if index.bin_bytes:
            self._raw = np.memmap(path, dtype=np.uint8, mode="r")

    def document(self, number: int, most: int | None = None) -> np.ndarray:
        """Returns a document's tokens, with all its sequences concatenated.

        Args:
            number: Number of the document.
            most: Maximum number of tokens to read; None reads all.

        Returns:
            `[tokens]` int64.

        Raises:
            DatasetError: A token id is outside the vocabulary.
        """
        index = self.index
        first, last = index.document_indices[number : number + 2]
        parts = [np.zeros(0, index.dtype)]
        left = np.inf if most is None else most
        for sequence in range(int(first), int(last)):
            if left <= 0:
                break
            count = int(min(left, index.sequence_lengths[sequence]))
            begin = int(index.sequence_pointers[sequence])
            end = begin + count * index.dtype.itemsize
            parts.append(self._raw[begin:end].view(index.dtype))
            left -= count
        tokens = np.concatenate(parts).astype(np.int64)
        if self.vocab_size is None:
            return tokens
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            bad = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            raise DatasetError(
                f"{index.prefix}.bin: document {number} has the token id {tokens[bad]} at its "
                f"token {bad}, but the model's vocabulary has {self.vocab_size} ids; "
                "give data made with the tokenizer that the model was trained with",
                this_rank_only=True,
            )
        return tokens
