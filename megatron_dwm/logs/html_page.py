"""Parts of a self-contained HTML page: no scripts, no network, no other files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from megatron_dwm.logs.charts import Chart

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.5em 0 0.5em; }
h1 { margin-top: 0; }
h2 { border-top: 2px solid #1a1a1a; padding-top: 0.5em; }
.charts, .passages { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; max-width: 34rem; height: auto; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; margin: 0.5rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.25rem; }
th, td { border: 1px solid #767676; padding: 0.2rem 0.5rem; text-align: right;
  overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; min-width: 8rem; overflow-wrap: break-word; }
th { background: #f0f0f0; }
@media (max-width: 40rem) { table { font-size: 0.875rem; } }
summary { cursor: pointer; padding: 0.25rem 0; }
blockquote { margin: 0.25rem 0 0; padding: 0.5rem 0.75rem; border-left: 4px solid #555;
  background: #f6f6f6; white-space: pre-wrap; font-family: ui-monospace, monospace;
  font-size: 0.875rem; }
.passages p { margin: 0; font-weight: 600; }
""".strip()


def page(title: str, body: Sequence[str]) -> str:
    """Returns a whole page.

    Args:
        title: text of the page's title and its first heading.
        body: HTML of the rest.
    """
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(title)}</h1>",
        *body,
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def heading(level: int, text: str) -> str:
    """Returns a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """Returns a paragraph."""
    return f"<p>{escape(text)}</p>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of texts that scrolls by itself if it is wider than the page."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    # Scrollable parts must be reachable by keyboard.
    return "\n".join(
        [
            f'<section class="scroll" tabindex="0" aria-label="{escape(caption)}">',
            f"<table><caption>{escape(caption)}</caption>",
            f"<thead><tr>{top}</tr></thead>",
            "<tbody>",
            *body,
            "</tbody></table></section>",
        ]
    )


def charts(shown: Sequence[Chart]) -> str:
    """Returns charts side by side if there is room, each with its table folded."""
    found = ['<div class="charts">']
    for chart in shown:
        data = base64.b64encode(chart.svg()).decode("ascii")
        found += [
            "<figure>",
            f'<img alt="{escape(chart.alt)}" src="data:image/svg+xml;base64,{data}">',
            f"<figcaption><details><summary>{escape(chart.title)}, as a table</summary>",
            table(chart.title, chart.header, chart.rows),
            "</details></figcaption>",
            "</figure>",
        ]
    return "\n".join([*found, "</div>"])


def quotes(shown: Sequence[tuple[str, str]]) -> str:
    """Returns passages of text verbatim, each under a line that names its source.

    Args:
        shown: the line and the passage.
    """
    found = ['<div class="passages">']
    for line, text in shown:
        # Whatever the direction of a text, it stays within its box.
        quote = f'<blockquote dir="auto">{escape(text)}</blockquote>'
        found.append(f"<div><p>{escape(line)}</p>{quote}</div>")
    return "\n".join([*found, "</div>"])
