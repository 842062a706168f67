"""What tells two tokenizers apart whose vocabularies have one size."""

import pytest

from megatron_dwm.core.vocabulary import tokenizer_fingerprint


class Bytes:
    """Byte ids, moved by a number."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def tokenize(self, text: str) -> list[int]:
        return [(byte + self.shift) % 256 for byte in text.encode()]


class Numbers:
    """As NullTokenizer: takes numbers alone."""

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def test_the_same_ids_have_the_same_fingerprint_and_others_another():
    found = [tokenizer_fingerprint(Bytes(shift)) for shift in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 16


@pytest.mark.parametrize("tokenizer", [Numbers(), object()])
def test_a_tokenizer_that_takes_no_text_has_none(tokenizer):
    assert tokenizer_fingerprint(tokenizer) is None
