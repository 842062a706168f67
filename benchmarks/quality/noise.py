"""Useless text made from good text: shuffled tokens, OCR errors, boilerplate, near-duplicates."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

import numpy

# What a scanner takes for what; both ways where both occur.
CONFUSIONS = {
    "rn": "m", "m": "rn", "cl": "d", "d": "cl", "vv": "w", "w": "vv", "li": "h", "h": "b",
    "l": "1", "1": "l", "I": "l", "O": "0", "0": "O", "o": "0", "e": "c", "c": "e", "s": "5",
    "S": "5", "5": "S", "B": "8", "g": "9", "f": "t", "t": "f", "u": "n", "n": "u", "a": "o",
    "i": "j", "y": "v", "fi": "h", ",": ".", ".": ",", "'": "`", '"': "''",
}  # fmt: skip
_CONFUSABLE = re.compile("|".join(sorted(map(re.escape, CONFUSIONS), key=len, reverse=True)))
_SPECKS = "·•|~^_*¬°"


def shuffle_blocks(tokens: numpy.ndarray, block: int, seed: int) -> numpy.ndarray:
    """Returns the tokens `[n]`, each block of `block` in random order."""
    rng = numpy.random.default_rng(seed)
    parts = [rng.permutation(tokens[i : i + block]) for i in range(0, len(tokens), block)]
    return numpy.concatenate(parts) if parts else tokens.copy()


def scan(text: str, rng: random.Random, rate: float = 0.06) -> str:
    """Returns the text as a poor scan reads it.

    Args:
        text: good text.
        rng: of every choice.
        rate: share of the confusable characters that are misread. Words are broken at a third of
            it, run together at a third, and hyphenated at a line's end at a third; specks appear at
            a tenth; of the line breaks, half are lost.
    """
    text = _CONFUSABLE.sub(
        lambda found: CONFUSIONS[found[0]] if rng.random() < rate else found[0], text
    )
    out = []
    for word in re.split(r"(\s+)", text):
        if "\n" in word:
            out.append(" " if rng.random() < 0.5 else word)
        elif word.isspace():
            out.append("" if rng.random() < rate / 3 else word)
        elif len(word) > 4 and rng.random() < 2 * rate / 3:
            cut = rng.randrange(2, len(word) - 1)
            out.append(word[:cut] + rng.choice((" ", "-\n")) + word[cut:])
        else:
            out.append(word)
        if rng.random() < rate / 10:
            out.append(rng.choice(_SPECKS))
    return "".join(out)


def edit(text: str, rng: random.Random, rate: float = 0.02) -> str:
    """Returns a near-duplicate: a share `rate` of the words dropped, doubled or exchanged."""
    words = re.split(r"(\s+)", text)
    for i in range(0, len(words), 2):
        if rng.random() < rate:
            kind = rng.randrange(3)
            other = 2 * rng.randrange((len(words) + 1) // 2)
            words[i] = ("", f"{words[i]} {words[i]}", words[other])[kind]
    return "".join(words)


def near_duplicates(
    documents: Sequence[str], rng: random.Random, originals: int = 24
) -> Iterator[str]:
    """Yields, without end, slightly changed copies of few documents."""
    chosen = rng.sample(list(documents), min(originals, len(documents)))
    while True:
        yield edit(rng.choice(chosen), rng)


SITES = ("The Daily Courier", "Example Shop", "CityGuide", "OpenWiki", "TechForum", "Recipe Box")
MENUS = (
    "Home | News | Sport | Business | Opinion | Culture | Travel | Weather | Subscribe | Sign in",
    "Home\nAbout us\nProducts\nSupport\nCareers\nContact\nImprint\nPrivacy policy\nTerms of use",
    "Skip to main content\nSearch\nMenu\nLog in\nRegister\nBasket (0)\nCheckout\nMy account\nHelp",
    "Share on Facebook\nShare on Twitter\nShare by e-mail\nPrint this page\nMost read\nMost shared",
    "« Previous | 1 | 2 | 3 | 4 | 5 | ... | {number} | Next »\nSort by: relevance | date | price",
)
BANNERS = (
    "We use cookies to personalise content and ads, to provide social media features and to "
    "analyse our traffic. By clicking Accept you agree to the storing of cookies on your device.\n"
    "Accept all | Reject all | Manage preferences",
    "{site} uses cookies. Some are necessary, others help us to improve your experience. You can "
    "change your settings at any time. [OK] [More information]",
    "Sign up for our newsletter! Get the best of {site} in your inbox every week. Enter your "
    "e-mail address. You can unsubscribe at any time. Read our privacy policy.",
    "JavaScript is disabled in your browser. Please enable JavaScript to use {site}. Error "
    "{number}.",
    "Copyright © {year} {site}. All rights reserved. No part of this site may be reproduced "
    "without our written permission. Powered by {site} CMS {number}.",
)
LICENCES = (
    "# Copyright (c) {year}, {site} and contributors.\n# Licensed under the Apache License, "
    "Version 2.0 (the License);\n# you may not use this file except in compliance with the "
    "License.\n# You may obtain a copy of the License at\n#\n"
    "#     http://www.apache.org/licenses/LICENSE-2.0\n#\n"
    "# Unless required by applicable law or agreed to in writing, software\n# distributed under "
    "the License is distributed on an AS IS BASIS,\n# WITHOUT WARRANTIES OR CONDITIONS OF ANY "
    "KIND, either express or implied.",
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software "
    "and associated documentation files (the Software), to deal in the Software without "
    "restriction, including without limitation the rights to use, copy, modify, merge, publish, "
    "distribute, sublicense, and/or sell copies of the Software. (c) {year} {site}",
    "This program is free software; you can redistribute it and/or modify it under the terms of "
    "the GNU General Public License as published by the Free Software Foundation; either version 2 "
    "of the License, or (at your option) any later version.",
)


def boilerplate(chrome: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yields, without end, pages of menus, banners and licences that repeat with small changes.

    Args:
        chrome: heads of real pages, mixed in for a third of the blocks.
        rng: of every choice.
    """
    pools = [MENUS, BANNERS, LICENCES, *([list(chrome)] if chrome else [])]
    while True:
        site = rng.choice(SITES)
        blocks = []
        for _ in range(rng.randint(3, 8)):
            block = rng.choice(rng.choice(pools))
            for slot, value in (
                ("{site}", site),
                ("{year}", str(rng.randint(1998, 2024))),
                ("{number}", str(rng.randint(2, 999))),
            ):
                block = block.replace(slot, value)
            blocks.append(block)
        yield "\n\n".join(blocks)


def page_heads(pages: Sequence[str], length: int = 700) -> list[str]:
    """Returns what stands at the top of pages before their content: their first characters."""
    return [page[:length] for page in pages if len(page) > 2 * length]
