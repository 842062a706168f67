"""The number of rows that a tokenizer needs: its largest id + 1, including special tokens.

The number of tokens is smaller if ids have gaps, for example after tokens were removed or added by
hand.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

# Single special tokens of a Megatron tokenizer; some tokenizers lack them and raise.
_SINGLE = ("eod", "bos", "eos", "pad", "unk", "mask", "cls", "sep")


def vocabulary_size(tokenizer: Any) -> int:
    """Returns the largest id + 1 of a Hugging Face tokenizer."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def megatron_vocabulary_size(tokenizer: Any) -> int:
    """Returns the largest id + 1 of a Megatron tokenizer, but at least its `vocab_size`.

    Megatron pads the vocabulary from `vocab_size`, which is the number of tokens for some
    tokenizers, and the flag's value for NullTokenizer.
    """
    return max([int(tokenizer.vocab_size), *(number + 1 for number in _ids(tokenizer))])


# Letters of several scripts, digits, spaces, punctuation, and words that are split into pieces.
_PROBE = (
    "The 12,345 naive readers' co-operation:\n\tdef f(x): return x**2  # Größe, été, 数据, данные"
)


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Returns a digest of a Megatron tokenizer's ids for a fixed text.

    It tells apart two tokenizers with vocabularies of the same size whose ids mean different
    things.

    Returns:
        16 hexadecimal digits; None for a tokenizer that takes no text (NullTokenizer).
    """
    try:
        ids = [int(number) for number in tokenizer.tokenize(_PROBE)]
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # NullTokenizer takes only numbers; some tokenizers of multimodal models take no strings.
        return None
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def _ids(tokenizer: Any) -> Iterator[int]:
    tables: list[Any] = []
    with contextlib.suppress(Exception):
        tables.append(tokenizer.inv_vocab)
    # SFTTokenizer has no such table, but keeps the Hugging Face tokenizer.
    with contextlib.suppress(Exception):
        words = tokenizer._tokenizer._tokenizer.get_vocab()
        tables.append(dict.fromkeys(words.values()))
    for table in tables:
        if isinstance(table, Mapping):
            yield from (number for number in table if isinstance(number, int))
    for name in _SINGLE:
        with contextlib.suppress(Exception):
            number = getattr(tokenizer, name)
            if isinstance(number, int):
                yield number
