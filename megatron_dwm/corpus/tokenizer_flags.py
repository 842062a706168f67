"""Megatron's tokenizer flags, from a command line or as keywords."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_dwm.errors import InputError


def add_tokenizer_args(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds Megatron's tokenizer flags: same names, defaults and destinations.

    They are listed here because importing them from Megatron takes seconds, which `--help`
    should not.

    Args:
        parser: Receives them.
        required: Whether the command needs a tokenizer.
    """
    group = parser.add_argument_group("tokenizer (as in Megatron)")
    add = group.add_argument
    add("--tokenizer-type", required=required, help="such as SentencePieceTokenizer")
    add("--tokenizer-model", help="model file, directory or Hugging Face name")
    add("--vocab-size", type=int, help="vocabulary size, for NullTokenizer and TikTokenizer")
    add("--vocab-file", help="vocabulary of GPT2BPETokenizer and the BERT tokenizers")
    add("--merge-file", help="merges of GPT2BPETokenizer")
    add("--tokenizer-metadata", dest="metadata_path", help="tokenizer metadata (.json)")
    add(
        "--tokenizer-special-tokens",
        dest="special_tokens",
        nargs="+",
        help="tokens to add to the tokenizer",
    )
    add("--tiktoken-pattern", choices=["v1", "v2"], help="of TikTokenizer")
    add("--tiktoken-num-special-tokens", type=int, default=1000, help="of TikTokenizer (1000)")
    add(
        "--tokenizer-sentencepiece-legacy",
        action="store_true",
        help="special tokens as older SentencePiece wrappers treat them",
    )
    add(
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
        "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
        dest="tokenizer_sentencepiece_ignore_extra_whitespaces",
        action="store_false",
        help="keep repeated spaces",
    )
    add("--tokenizer-hf-no-use-fast", action="store_true", help="the slow Hugging Face tokenizer")
    add(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="no beginning- or end-of-text tokens from a Hugging Face tokenizer",
    )
    add("--trust-remote-code", action="store_true", help="run code of a Hugging Face tokenizer")
    add("--null-tokenizer-eod-id", type=int, help="for NullTokenizer (default: the last id)")
    add("--null-tokenizer-pad-id", type=int, default=-1, help="for NullTokenizer (default: none)")
    add("--chat-template", help="chat template of the tokenizer")
    # Stored tokens do not depend on these, but a command line written for training may have them.
    add("--padded-vocab-size", type=int, help=argparse.SUPPRESS)
    add(
        "--no-pad-vocab-size",
        "--disable-pad-vocab-size",
        dest="pad_vocab_size",
        action="store_false",
        help=argparse.SUPPRESS,
    )
    add("--vocab-extra-ids", type=int, default=0, help=argparse.SUPPRESS)


def tokenizer_settings(append_eod: bool, **values: Any) -> argparse.Namespace:
    """Returns the arguments of `build_megatron_tokenizer`, from keywords.

    Args:
        append_eod: As `--append-eod`.
        values: Values of tokenizer flags by their names: `tokenizer_type` for `--tokenizer-type`
            and so on.

    Raises:
        InputError: There is no such flag, or the type is missing.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_tokenizer_args(parser)
    settings = {action.dest: action.default for action in parser._actions}
    unknown = sorted(values.keys() - settings.keys())
    if unknown:
        raise InputError(
            f"{unknown[0]}: no such setting of a tokenizer; choose from {', '.join(settings)}"
        )
    if not values.get("tokenizer_type"):
        raise InputError("tokenizer_type: missing; give one, such as SentencePieceTokenizer")
    # The output does not depend on padding, which would need flags of the parallel layout.
    settings |= {**values, "append_eod": append_eod, "pad_vocab_size": False}
    return argparse.Namespace(**settings)
