"""Deterministic splits by hash: the same document falls on the same side everywhere."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from .readers import Document

HELD_OUT_SHARE = 0.05
MIN_CHARS = 16
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def stable_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the strings alone."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def clean(text: str) -> str:
    """Unix line breaks, no control characters, no blank space at the ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    return _CONTROL.sub("", text).strip()


def is_held_out(domain: str, document: Document, held_out_groups: Sequence[str]) -> bool:
    """Tells the split of a document.

    Args:
        domain: Its domain.
        document: The document.
        held_out_groups: Groups to hold out; if empty, a share of HELD_OUT_SHARE by hash.

    Returns:
        True for the held-out split.
    """
    group = document.group or document.key
    if held_out_groups:
        return group in held_out_groups
    return stable_hash("split", domain, group) < HELD_OUT_SHARE


def in_hash_order(domain: str, documents: Iterable[Document], max_bytes: float) -> list[Document]:
    """Shuffles documents by hash and takes them up to a size in UTF-8 bytes.

    A document that would go past the size is passed over, so one long document does not
    leave the domain nearly empty.
    """
    taken, size = [], 0
    for document in sorted(documents, key=lambda d: stable_hash("order", domain, d.key)):
        length = len(document.text.encode())
        if size + length <= max_bytes:
            taken.append(document)
            size += length
    return taken


def halves[T](items: Iterable[T], size: dict[T, int]) -> tuple[list[T], list[T]]:
    """Deals items into two halves of like total size, the largest first."""
    result: tuple[list[T], list[T]] = ([], [])
    totals = [0, 0]
    for item in sorted(items, key=lambda i: (-size[i], stable_hash("half", str(i)))):
        side = int(totals[1] < totals[0])
        result[side].append(item)
        totals[side] += size[item]
    return result
