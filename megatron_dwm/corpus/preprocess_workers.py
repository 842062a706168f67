"""The tokenizing processes of `preprocess`."""

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.core.vocabulary import megatron_vocabulary_size
from megatron_dwm.corpus.ordered_pool import answers_in_order
from megatron_dwm.corpus.text_batches import Batch
from megatron_dwm.errors import InputError, in_short


@dataclass
class Documents:
    """The tokenized documents of a batch under one key, concatenated.

    Attributes:
        tokens: Raw array of the dataset's type.
        lengths: Tokens of every sequence.
        counts: Sequences of every document.
    """

    tokens: bytes
    lengths: list[int]
    counts: list[int]

    def split(self, dtype: type) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Yields the tokens `[n]` and sequence lengths of each document."""
        tokens: np.ndarray = np.frombuffer(self.tokens, dtype=dtype)
        token = sequence = 0
        for count in self.counts:
            lengths = self.lengths[sequence : sequence + count]
            size = sum(lengths)
            yield tokens[token : token + size], lengths
            token += size
            sequence += count


@dataclass
class Encoded:
    """A worker's answer to a batch.

    Attributes:
        keys: Documents with text, by key.
        documents: Documents seen, with text or without.
        batch_bytes: Size of the batch's content.
        position: That of the batch.
    """

    keys: dict[str, Documents]
    documents: int
    batch_bytes: int
    position: int


class Encoder:
    """Turns batches into tokens; one lives in every worker."""

    def __init__(self, tokenizer: Any, args: argparse.Namespace, dtype: type):
        """Keeps the tokenizer and the settings.

        Args:
            tokenizer: Megatron tokenizer.
            args: The parsed command line.
            dtype: NumPy type of the stored tokens.
        """
        self._tokenize = tokenizer.tokenize
        self._eod = tokenizer.eod if args.append_eod else None
        self._keys = args.json_keys
        self._dtype = dtype
        self._max_id = np.iinfo(dtype).max
        self._vocabulary = megatron_vocabulary_size(tokenizer)

    def encode(self, batch: Batch) -> Encoded:
        """Tokenizes a batch.

        Raises:
            InputError: A line that cannot be used; the message names file and line.
        """
        arrays: dict[str, list[np.ndarray]] = {key: [] for key in self._keys}
        result = {key: Documents(b"", [], []) for key in self._keys}
        seen = 0
        for line_number, texts in batch.documents(self._keys):
            seen += 1
            for key, sequences in texts.items():
                encoded = self.encode_document(sequences, batch.path, line_number)
                if not encoded:
                    continue
                arrays[key].extend(encoded)
                result[key].lengths.extend(len(ids) for ids in encoded)
                result[key].counts.append(len(encoded))
        for key, parts in arrays.items():
            result[key].tokens = np.concatenate(parts).tobytes() if parts else b""
        return Encoded(result, seen, len(batch.content), batch.position)

    def encode_document(
        self, sequences: list[str], path: str, line_number: int
    ) -> list[np.ndarray]:
        """Tokenizes the sequences of a document.

        Args:
            sequences: Its texts.
            path: File name, for messages.
            line_number: Counted from 1, for messages.

        Returns:
            Token ids of each sequence that has any, the last one with the end-of-document token if
            requested.

        Raises:
            InputError: A text that cannot be used; the message names file and line.
        """
        encoded = [self._encode_text(text, path, line_number) for text in sequences]
        encoded = [ids for ids in encoded if len(ids)]
        if encoded and self._eod is not None:
            encoded[-1] = np.append(encoded[-1], np.array([self._eod], self._dtype))
        return encoded

    def _encode_text(self, text: str, path: str, line_number: int) -> np.ndarray:
        # As in Megatron's tool, the tokenizer decides: spaces are text, and even an empty string
        # has a token if the tokenizer prepends one.
        try:
            ids = np.asarray(self._tokenize(text))
        except Exception as error:
            if not text:
                # NullTokenizer, which takes only numbers.
                return np.empty(0, self._dtype)
            raise InputError(
                f"{path}, line {line_number}: the tokenizer cannot take this text "
                f"({in_short(error)})."
            ) from error
        if ids.size and (ids.min() < 0 or ids.max() > self._max_id):
            raise InputError(
                f"{path}, line {line_number}: token ids {ids.min()} to {ids.max()} do not "
                f"fit {np.dtype(self._dtype).name}, the type for this vocabulary size. Check "
                f"--vocab-size."
            )
        if ids.size and ids.max() >= self._vocabulary:
            raise InputError(
                f"{path}, line {line_number}: token ids up to {ids.max()} do not fit the "
                f"vocabulary of {self._vocabulary} ids, which begin at 0. Check --vocab-size."
            )
        return ids.astype(self._dtype, copy=False)


@contextlib.contextmanager
def quiet_megatron_import() -> Iterator[None]:
    """Silences Megatron's import-time messages about optional GPU packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def build_megatron_tokenizer(args: argparse.Namespace) -> Any:
    """Builds the tokenizer that the `--tokenizer-*` flags name.

    Args:
        args: The parsed command line.

    Returns:
        Megatron tokenizer.

    Raises:
        InputError: No tokenizer can be built from the flags, or there is no token for
            `--append-eod`.
    """
    # The tokenizer's own threads would compete with the worker processes for cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from megatron.core.tokenizers.utils.build_tokenizer import (
            SUPPORTED_TOKENIZERS,
            build_tokenizer,
        )
    except ImportError as error:
        raise InputError(
            f"Megatron cannot be imported ({error}). Install it: "
            f'pip install "megatron-core>=0.19,<0.20"'
        ) from error
    if args.tokenizer_type not in SUPPORTED_TOKENIZERS:
        raise InputError(
            f"--tokenizer-type {args.tokenizer_type}: unknown. "
            f"Choose from {', '.join(SUPPORTED_TOKENIZERS)}."
        )
    if args.tokenizer_type == "NullTokenizer" and not args.vocab_size:
        raise InputError("--tokenizer-type NullTokenizer: needs --vocab-size.")
    is_file = "SentencePiece" in args.tokenizer_type or args.tokenizer_type == "Llama2Tokenizer"
    if is_file and not args.tokenizer_model:
        raise InputError(f"--tokenizer-type {args.tokenizer_type}: needs --tokenizer-model FILE.")
    for flag in ("vocab_file", "merge_file") + (("tokenizer_model",) if is_file else ()):
        value = getattr(args, flag)
        if value and not Path(value).is_file():
            raise InputError(f"--{flag.replace('_', '-')} {value}: no such file.")
    try:
        tokenizer = build_tokenizer(args)
    except Exception as error:
        raise InputError(
            f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}: "
            f"Megatron cannot build this tokenizer ({in_short(error)})."
        ) from error
    if args.append_eod:
        missing = (
            f"--append-eod: {args.tokenizer_type} has no end-of-document token here. Leave "
            f"the flag out or use a tokenizer that has one."
        )
        try:
            eod = tokenizer.eod
        except Exception as error:
            # Each of Megatron's tokenizers reports this in its own way.
            raise InputError(f"{missing} ({type(error).__name__}: {error})") from error
        if eod is None or eod < 0:
            raise InputError(missing)
    return tokenizer


def _make_encode(args: argparse.Namespace, dtype: type) -> Callable[[Batch], Encoded]:
    """Builds the tokenizer again, in a worker that was not forked."""
    with quiet_megatron_import():
        tokenizer = build_megatron_tokenizer(args)
    return Encoder(tokenizer, args, dtype).encode


def encode_in_order(
    batches: Iterable[Batch], args: argparse.Namespace, tokenizer: Any, dtype: type, workers: int
) -> Iterator[Encoded]:
    """Tokenizes batches in parallel and gives the answers in the order of the batches.

    Args:
        batches: Read only as far ahead as keeps the workers busy.
        args: The parsed command line.
        tokenizer: The tokenizer that `args` name.
        dtype: NumPy type of the stored tokens.
        workers: Number of processes.

    Returns:
        Answers.

    Raises:
        InputError: The first error in the order of the input, or a worker died.
    """
    encode = Encoder(tokenizer, args, dtype).encode
    return answers_in_order(batches, encode, partial(_make_encode, args, dtype), workers)
