"""Trains a Llama-style SentencePiece tokenizer on JSON Lines or plain text."""

import argparse
import hashlib
import heapq
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dwm.errors import InputError
from megatron_dwm.files.text_files import expand_inputs, read_texts
from megatron_dwm.progress import bar, working

# SentencePiece drops longer sentences, so lines are split before they reach it.
MAX_SENTENCE_BYTES = 4096
# Otherwise the trainer picks its own number of threads, and records it in the model file.
NUM_THREADS = 16


class TextSample:
    """A uniform sample of documents within a byte budget, from one pass over a stream.

    Every document gets a pseudo-random priority from the seed and its content; those with the
    lowest priorities stay. So neither the order of the documents nor the number of
    files changes the sample, and memory stays near the budget.
    """

    def __init__(self, max_bytes: int, seed: int):
        """Sets the budget in UTF-8 bytes and the seed."""
        self.max_bytes = max_bytes
        self.bytes = 0
        self.dropped = 0
        self._salt = str(seed).encode()
        self._heap: list[tuple[int, str]] = []
        # Priority of the best document dropped so far: a later, worse one must not fill the gap, or
        # the order would matter.
        self._limit = 1 << 64

    def add(self, text: str) -> None:
        """Offers a document to the sample."""
        data = text.encode("utf-8", errors="replace")
        digest = hashlib.blake2b(data, digest_size=8, key=self._salt).digest()
        priority = int.from_bytes(digest, "big")
        if priority >= self._limit:
            self.dropped += 1
            return
        heapq.heappush(self._heap, (-priority, text))
        self.bytes += len(data)
        while self.bytes > self.max_bytes and len(self._heap) > 1:
            worst, out = heapq.heappop(self._heap)
            self._limit = -worst
            self.bytes -= len(out.encode("utf-8", errors="replace"))
            self.dropped += 1

    def __len__(self) -> int:
        return len(self._heap)

    def texts(self) -> list[str]:
        """The sampled documents, in an order that depends on the sample alone."""
        return [text for _, text in sorted(self._heap, reverse=True)]


def sentences(texts: Iterable[str], max_bytes: int = MAX_SENTENCE_BYTES) -> Iterator[str]:
    """Splits documents into lines, and long lines between words.

    Args:
        texts: Documents.
        max_bytes: Longest sentence in UTF-8 bytes.

    Yields:
        Non-blank sentences without line breaks.
    """
    # A character takes up to four bytes, so this many fit whatever the script.
    limit = max_bytes // 4
    for text in texts:
        for line in text.split("\n"):
            # SentencePiece does not accept NUL and lone surrogates.
            line = line.replace("\0", "").encode("utf-8", errors="ignore").decode()
            while len(line) > limit and len(line.encode()) > max_bytes:
                cut = line.rfind(" ", 1, limit)
                cut = cut if cut > 0 else limit
                if line[:cut].strip():
                    yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line


def train(texts: Iterable[str], vocab_size: int, seed: int = 1234) -> bytes:
    """Trains a byte-fallback BPE model with Llama's settings and special tokens.

    Args:
        texts: Documents.
        vocab_size: Number of pieces, including special tokens and the 256 bytes.
        seed: Seed of the trainer.

    Returns:
        The serialised model: unk 0, bos 1, eos 2, no padding token.

    Raises:
        InputError: The texts are too few, or their alphabet too large, for the size.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences(texts)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_training_fault(str(error), vocab_size)) from error
    return model.getvalue()


def _training_fault(message: str, vocab_size: int) -> str:
    if found := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: the text is too small, it yields at most "
            f"{found[1]} pieces. Give more --input or set --vocab-size {found[1]} or less."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: the 256 bytes, the special tokens and the characters "
            f"of the text alone take {found[1]} pieces. Set a larger --vocab-size."
        )
    if "sentences_.empty()" in message:
        return "--input: no text in it. Check the files and --json-key."
    return f"--vocab-size {vocab_size}: SentencePiece failed: {message}"


def run(args: argparse.Namespace) -> None:
    """Reads, samples, trains and writes.

    Raises:
        InputError: The input is bad, or the output exists.
    """
    model_path = Path(args.out + ".model")
    vocab_path = Path(args.out + ".vocab")
    if model_path.exists() and not args.force:
        if args.skip_existing:
            print(f"{model_path} exists, nothing done.")
            return
        raise InputError(
            f"--out {args.out}: {model_path} exists. Set --force to overwrite it or "
            f"--skip-existing to keep it."
        )
    files = expand_inputs(args.input)
    sample = TextSample(int(args.max_mb * 1e6), args.seed)
    total = sum(path.stat().st_size for path in files)
    with bar(total, "B", "reading") as shown:
        done = 0
        for path in files:
            for text, position in read_texts(path, args.json_key, args.input_format):
                sample.add(text)
                shown.update(done + position - shown.n)
            done += path.stat().st_size
    print(
        f"Training {args.vocab_size} pieces on {sample.bytes / 1e6:.1f} MB "
        f"({len(sample)} of {len(sample) + sample.dropped} documents) ..."
    )
    with working("training"):
        model = train(sample.texts(), args.vocab_size, args.seed)

    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    model_path.parent.mkdir(parents=True, exist_ok=True)
    vocab = "".join(
        f"{pieces.id_to_piece(i)}\t{pieces.get_score(i):g}\n" for i in range(len(pieces))
    )
    for path, data in ((vocab_path, vocab.encode()), (model_path, model)):
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(data)
        os.replace(partial, path)
    print(f"Wrote {model_path}: {len(pieces)} pieces. For Megatron:")
    print(f"  --tokenizer-type SentencePieceTokenizer --tokenizer-model {model_path}")
