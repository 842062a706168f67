"""Exported folders in readers that others wrote: transformers, and CTranslate2's own engine.

A model goes Hugging Face -> Megatron checkpoint -> Hugging Face; both readers then must predict
the same next tokens, with the same logits, as transformers does with the first folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.conversion.export import export
from megatron_dwm.conversion.import_model import import_model

VOCAB_SIZE = 250
TOKENS = [3, 17, 99, 42, 249, 7, 7, 128]


def write_model(folder: Path, tied: bool) -> None:
    """Writes a random Llama with grouped queries; norms' epsilon as CTranslate2 takes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of a word for each id, which CTranslate2's converter asks for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{k}": k for k in range(VOCAB_SIZE)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)


def transformers_logits(folder: Path) -> np.ndarray:
    """Returns logits `[s, V]`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def ctranslate2_logits(folder: Path, converted: Path) -> np.ndarray:
    """Returns logits `[s, V]`."""
    import ctranslate2

    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))
    generator = ctranslate2.Generator(str(converted), device="cpu", compute_type="float32")
    return np.array(generator.forward_batch([[f"w{k}" for k in TOKENS]]))[0]


@pytest.mark.parametrize("tied", [False, True])
def test_readers_predict_the_same_tokens(tmp_path: Path, tied: bool) -> None:
    hf, run, out = (tmp_path / part for part in ("hf", "run", "out"))
    write_model(hf, tied)
    write_tokenizer(hf)
    import_model(str(hf), str(run))
    export(str(run), str(out))
    expected = transformers_logits(hf)
    # Logits that differ from token to token, so that a wrong reading shows.
    assert len(set(expected.argmax(axis=1))) > 2 and expected.std() > 0.1
    np.testing.assert_array_equal(transformers_logits(out), expected)
    found = ctranslate2_logits(out, tmp_path / "ct2")
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
