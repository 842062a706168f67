"""The charts of the preference report, each with its text and its numbers. Needs matplotlib.

They are readable without colour: lines differ in dashes and markers, with their names at their
ends. A table repeats what a chart shows. They are small, so that letters stay legible on a phone.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from megatron_dwm.logs.plot import dashes_of, name_lines

_SIZE = (4.9, 3.3)  # inches
_MARKS = "os^Dv*PX"
_NAME = 18  # maximum characters of a line's name
_GAP = 0.075  # minimum distance of two names, relative to the height of the axes
_ROWS = 10  # rows of a line's table
_EARLY = 0.1  # first share of the run, whose high losses are cut off

Line = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Chart:
    """A picture with its text and table.

    Attributes:
        name: file name, without ending.
        title: what it shows.
        alt: the same in words, for readers who cannot see it.
        figure: matplotlib's figure.
        header: header of the table.
        rows: rows of the table.
    """

    name: str
    title: str
    alt: str
    figure: Any
    header: list[str]
    rows: list[list[str]]

    def svg(self) -> bytes:
        """Returns the picture as SVG, the same bytes for the same numbers."""
        from matplotlib import rc_context

        target = io.BytesIO()
        with rc_context({"svg.hashsalt": self.name}), warnings.catch_warnings():
            # A name may have letters that the font lacks: the chart shows boxes, the table shows
            # them.
            warnings.simplefilter("ignore")
            self.figure.savefig(target, format="svg", metadata={"Date": None})
        return target.getvalue()

    def save_png(self, path: str) -> None:
        """Writes the picture as PNG.

        Raises:
            OSError: it cannot be written.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.figure.savefig(path, format="png", dpi=150)


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number for a table; a dash if there is none."""
    if value is None or not numpy.isfinite(value):
        return "–"
    small = value != 0 and abs(value) < 10**-digits
    return f"{value:.{digits - 1}e}" if small or abs(value) >= 1e6 else f"{value:.{digits}f}"


def over_steps(
    name: str,
    title: str,
    unit: str,
    lines: Mapping[str, Line],
    bands: Mapping[str, Sequence[float]] | None = None,
    marks: Sequence[tuple[int, str]] = (),
    at: float | None = None,
    early: bool = True,
) -> Chart:
    """Draws lines over the run's steps.

    Args:
        name: name of the chart's file.
        title: title of the chart.
        unit: label of the y axis.
        lines: steps and values, by name.
        bands: half widths of bands around lines, by name.
        marks: steps with a name, such as where a stage begins.
        at: a height to mark.
        early: whether the first steps count for the range of the axis.
    """
    figure, axis = _axes(title, "iteration (steps)", unit)
    # A line without points uses up its style too, so a run looks the same in every chart.
    styles = zip(dashes_of(len(lines)), itertools.cycle(_MARKS), lines.items(), strict=False)
    for k, (dashes, mark, (key, (x, y))) in enumerate(styles):
        style = {"linestyle": dashes, "marker": mark, "markersize": 4, "color": f"C{k}"}
        every = max(1, len(x) // 6)
        axis.plot(x, y, markevery=(k * every // 3 % every, every), **style)
        if bands and key in bands:
            half = numpy.array(bands[key])
            low, high = numpy.array(y) - half, numpy.array(y) + half
            axis.fill_between(x, low, high, alpha=0.2, color=f"C{k}")
    lines = {key: (x, y) for key, (x, y) in lines.items() if len(x)}
    if at is not None:
        axis.axhline(at, color="grey", linewidth=0.6)
    if not early:
        _leave_early_out(axis, list(lines.values()))
    for step, word in marks:
        axis.axvline(step, color="black", linewidth=0.6, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "fontsize": 8}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        axis.annotate(word, (step, 0.02), ha="right", va="bottom", parse_math=False, **place)
    if len(lines) > 1:
        name_lines(axis, [(_short(key), x[-1], y[-1]) for key, (x, y) in lines.items()], _GAP)
    ends = [f"{key} from {number(y[0])} to {number(y[-1])}" for key, (_, y) in lines.items()]
    alt = f"{title} over the steps of the run: {'; '.join(ends)}."
    return Chart(name, title, alt, figure, ["iteration", *lines], _rows_of(lines))


def against(
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    bins: Sequence[tuple[float, float, float, int]],
    logarithmic: bool = False,
) -> Chart:
    """Draws the means and spreads of bins.

    Args:
        name: name of the chart's file.
        title: title of the chart.
        x_label: of the axis.
        y_label: of the axis.
        bins: mean x, mean y, standard deviation of y and count.
        logarithmic: whether the x axis is logarithmic.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axis = _axes(title, x_label, y_label)
    x, y, spread = (numpy.array([entry[k] for entry in bins]) for k in range(3))
    axis.errorbar(x, y, spread, marker="o", markersize=4, capsize=3, linewidth=1)
    if logarithmic and len(x) and x.min() > 0:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    ends = (y[0], x[0], y[-1], x[-1]) if len(x) else (None,) * 4
    alt = "{}: {} at {}, to {} at {}.".format(title, *map(number, ends))
    rows = [[number(a), number(b), number(c), str(n)] for a, b, c, n in bins]
    header = [f"mean of {x_label}", "mean weight", "standard deviation", "count"]
    return Chart(name, title, alt, figure, header, rows)


def _axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=11, parse_math=False)
    axis.set_xlabel(x_label, parse_math=False)
    axis.set_ylabel(y_label, parse_math=False)
    axis.grid(linewidth=0.3)
    return figure, axis


def _leave_early_out(axis: Any, lines: list[Line]) -> None:
    """Fits the axis to all but the first steps, whose losses would flatten the rest."""
    shown = [value for x, y in lines for at, value in zip(x, y, strict=True) if at > _EARLY * x[-1]]
    if shown and max(shown) > min(shown):
        room = 0.05 * (max(shown) - min(shown))
        axis.set_ylim(min(shown) - room, max(shown) + room)


def _rows_of(lines: Mapping[str, Line]) -> list[list[str]]:
    """Returns a few table rows: each line's value nearest to the row's step."""
    steps = sorted({step for x, _ in lines.values() for step in x})
    if not steps:
        return []
    chosen = numpy.unique(numpy.linspace(0, len(steps) - 1, _ROWS).round().astype(int))
    rows = []
    for step in (steps[k] for k in chosen):
        row = [f"{step:g}"]
        for x, y in lines.values():
            inside = x[0] <= step <= x[-1]
            row.append(number(float(numpy.interp(step, x, y))) if inside else "–")
        rows.append(row)
    return rows


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
