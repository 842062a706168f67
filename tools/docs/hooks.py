"""Hooks of the site builder, for what goes beyond Markdown (MkDocs, see mkdocs.yml).

    navigation    from what each page says of its place (`pages.py`)
    other pages   CONTRIBUTING.md and others are pages too; links to them are those of the tree
    tutorials     scripts become pages, with what they print and draw (`tutorials.py`)
    formulas      become MathML, so that the site needs no script and no network for them

MkDocs calls the functions `on_*`.
"""

from __future__ import annotations

import html
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import pages  # noqa: E402
import tutorials  # noqa: E402

log = logging.getLogger("mkdocs.hooks.docs")
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)]*)?\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in docs/, and builds the navigation."""
    for name in pages.OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(pages.ROOT / name)))
    for tutorial in tutorials.found():
        page = f"tutorials/{tutorial.name}.md"
        files.append(File.generated(config, page, content=tutorials.page(tutorial)))
        picture = tutorials.picture_of(tutorial)
        if picture.is_file():
            name = f"tutorials/{tutorial.name}.png"
            files.append(File.generated(config, name, abs_src_path=str(picture)))
        else:
            log.warning("%s was not run: call make docs", tutorial.name)
    config.nav = _navigation(files)
    return files


def _navigation(files: Files) -> list[dict[str, list[Any]]]:
    places = {"CONTRIBUTING.md": ("Project", 10), "CHANGELOG.md": ("Project", 90)}
    places["benchmarks/quality.md"] = ("Background", 60)
    by_section: dict[str, list[tuple[int, str]]] = {name: [] for name in pages.SECTIONS}
    for file in files.documentation_pages():
        section, number = places.get(file.src_uri) or pages.place(file.content_string) or ("", 0)
        if section not in by_section:
            # A page that does not state its place is still included.
            section, number = "Project", 80
        by_section[section].append((number, file.src_uri))
    titles = {"benchmarks/quality.md": "Tables of the benchmark"}
    return [
        {name: [{titles[uri]: uri} if uri in titles else uri for _, uri in sorted(found)]}
        for name, found in by_section.items()
    ]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links of the tree into links of the site, and says which commands are not run."""
    here = page.file.src_uri
    # Before the title is looked for: MkDocs takes a heading that comes first.
    markdown = pages.without_place(markdown)

    def linked(match: re.Match[str]) -> str:
        return f"{match[1]}{_on_site(here, match[2])}{match[3] or ''})"

    return _LINK.sub(linked, pages.with_notes(markdown))


def _on_site(here: str, target: str) -> str:
    """Returns a link of a page as it is on the site, where docs/ is the root."""
    if ":" in target:
        return target
    folder = posixpath.dirname(here)
    in_docs = here not in pages.OUTSIDE
    there = posixpath.normpath(posixpath.join("docs" if in_docs else "", folder, target))
    there = there.removeprefix("docs/")
    # A tutorial's page is named as its script.
    if there.startswith("tutorials/") and not Path(there).name.startswith("_"):
        there = there.removesuffix(".py") + ".md" if there.endswith(".py") else there
    return posixpath.relpath(there, folder or ".")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turns formulas into MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        source = html.unescape(match[2]).strip()
        try:
            found = convert(source, display=display)
        except Exception as error:  # noqa: BLE001 - whatever the converter cannot take
            log.warning("%s: the formula %r: %s", page.file.src_uri, source, error)
            return match[0]
        if match[1] == "div":
            return f'<div class="formula">{found}</div>'
        return found

    return _FORMULA.sub(formula, content)
