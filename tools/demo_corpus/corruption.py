"""Known-bad text made from good text: the oracle of the demo."""

import base64
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence

NOISE_RATE = 0.25
_NOISE = string.ascii_letters + string.digits + string.punctuation


def shuffle_words(text: str, rng: random.Random) -> str:
    """Puts the words in random order; the white space between them stays as it is."""
    parts = re.split(r"(\s+)", text)
    words = parts[::2]
    rng.shuffle(words)
    parts[::2] = words
    return "".join(parts)


def add_character_noise(text: str, rng: random.Random, rate: float = NOISE_RATE) -> str:
    """Replaces each character but white space, with probability `rate`, by another one."""
    out = list(text)
    for i, char in enumerate(out):
        if rng.random() < rate and not char.isspace():
            noise = rng.choice(_NOISE)
            while noise == char:
                noise = rng.choice(_NOISE)
            out[i] = noise
    return "".join(out)


def loop(text: str, rng: random.Random) -> str:
    """Repeats a stretch of 3 to 20 words up to the length of the text."""
    words = text.split()
    length = min(rng.randint(3, 20), len(words))
    start = rng.randint(0, len(words) - length)
    phrase = " ".join(words[start : start + length]) + " "
    return (phrase * (len(text) // len(phrase) + 1))[: len(text)].rstrip()


def encode_base64(text: str, rng: random.Random) -> str:
    """Encodes the text in base64, in lines as in mail."""
    del rng
    return base64.encodebytes(text.encode()).decode("ascii").rstrip()


CORRUPTIONS: dict[str, Callable[[str, random.Random], str]] = {
    "word_shuffle": shuffle_words,
    "character_noise": add_character_noise,
    "loop": loop,
    "base64": encode_base64,
}


def cut_paragraphs(text: str, max_chars: int = 4000) -> list[str]:
    """Cuts a text between paragraphs into pieces of about `max_chars`.

    A longer paragraph is cut between its lines, and a longer line between words.
    """
    pieces: list[str] = []
    current = ""
    for separator, unit in _units(text, max_chars):
        if current and len(current) + len(separator) + len(unit) > max_chars:
            pieces.append(current)
            current = unit
        else:
            current = current + separator + unit if current else unit
    return [piece for piece in (*pieces, current) if piece.strip()]


def _units(text: str, max_chars: int) -> Iterator[tuple[str, str]]:
    for paragraph in re.split(r"\n\s*\n", text):
        if len(paragraph) <= max_chars:
            yield "\n\n", paragraph
            continue
        separator = "\n\n"
        for line in paragraph.split("\n"):
            while len(line) > max_chars:
                cut = line.rfind(" ", 1, max_chars)
                cut = cut if cut > 0 else max_chars
                yield separator, line[:cut]
                separator, line = " ", line[cut:].lstrip()
            yield separator, line
            separator = "\n"


def corrupt(
    documents: Sequence[tuple[str, str]], max_bytes: int, seed: int
) -> Iterator[tuple[str, str, str]]:
    """Makes corrupt documents, the kinds in turn so that all have a like share.

    Args:
        documents: Key and text of the good documents.
        max_bytes: Size of the result in UTF-8 bytes; less if the documents run out.
        seed: Seed of every choice.

    Yields:
        Key of the good document, kind of corruption, corrupt text.
    """
    rng = random.Random(seed)
    pieces = [(key, piece) for key, text in documents for piece in cut_paragraphs(text)]
    rng.shuffle(pieces)
    size = dict.fromkeys(CORRUPTIONS, 0)
    for key, piece in pieces:
        if sum(size.values()) >= max_bytes:
            return
        kind = min(size, key=size.__getitem__)
        text = CORRUPTIONS[kind](piece, rng)
        size[kind] += len(text.encode())
        yield key, kind, text
