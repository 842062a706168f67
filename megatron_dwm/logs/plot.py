"""Plots runs side by side, and the domains' weights over time. Needs matplotlib.

Plots are readable without colour: every line has its own dash pattern and its name at its end.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy

from megatron_dwm.errors import DWMError
from megatron_dwm.logs.compare import Comparison

_DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (10, 3)),
    (0, (1, 4)),
    (0, (10, 2, 3, 2)),
)
_PARTS = 30  # number of points of a domain's line
_LABEL_GAP = 0.055  # minimum distance of two names, relative to the height of the axes
_EARLY = 0.2  # first share of the run, whose high losses are cut off


def domain_weights_over_run(
    log: list[dict[str, Any]], parts: int = _PARTS
) -> dict[str, tuple[list[float], list[float]]]:
    """Returns domain -> (iterations, mean weights over the samples around them).

    Args:
        log: lines of `dwm_log.jsonl`.
        parts: number of equal pieces that the run is divided into.
    """
    last = max((line["iteration"] for line in log), default=0)
    sums: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for line in log:
        part = (line["iteration"] - 1) * parts // last
        for domain, weight in line["domain_weight"].items():
            if weight is None:
                continue
            samples = line["domain_samples"][domain]
            total = sums[domain][part]
            total[0] += weight * samples
            total[1] += samples
    middle = last / parts
    return {
        domain: (
            [(part + 0.5) * middle for part in sorted(found)],
            [found[part][0] / found[part][1] for part in sorted(found)],
        )
        for domain, found in sorted(sums.items())
    }


def check_matplotlib(flag: str) -> Any:
    """Checks, before any work, whether something can be drawn.

    Returns:
        matplotlib's `FigureCanvasBase`.

    Raises:
        DWMError: matplotlib, which the flag needs, is missing.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise DWMError(
            f"{flag} needs matplotlib, which is not installed; leave {flag} out, or "
            "pip install 'megatron-dwm[report]'"
        ) from None
    return FigureCanvasBase


def check_plot(path: str) -> None:
    """Checks, before any work, whether a plot can be drawn and saved under this name.

    Raises:
        DWMError: matplotlib is missing, or does not know the file's ending.
    """
    known = check_matplotlib("--plot").get_supported_filetypes()
    ending = os.path.splitext(path)[1].lstrip(".").lower()
    if ending not in known:
        raise DWMError(f"--plot {path}: the name must end in one of .{', .'.join(sorted(known))}")


def draw(
    path: str, comparison: Comparison | None, weights: dict[str, tuple[list[float], list[float]]]
) -> None:
    """Draws losses over tokens and over time, and domains' weights, as far as given.

    Args:
        path: the picture, in the format that its ending names.
        comparison: the runs, or None.
        weights: what `domain_weights_over_run` returned; may be empty.
    """
    from matplotlib.figure import Figure

    curves = [] if comparison is None else comparison.curves()
    timed = bool(curves) and all(numpy.isfinite(curve.seconds).all() for curve in curves)
    panels = bool(curves) + timed + bool(weights)
    figure = Figure(figsize=(1 + 5 * max(1, panels), 4.6), layout="constrained")
    axes = iter(numpy.atleast_1d(figure.subplots(1, max(1, panels))))
    if comparison is not None:
        amounts = [[amount / 1e6 for amount in curve.amounts] for curve in curves]
        losses = {
            "set_title": "equal tokens" if comparison.unit == "tokens" else "equal samples",
            "set_xlabel": f"{comparison.unit} read (millions)",
            "set_ylabel": "validation loss (nats per token)",
        }
        _panel(next(axes), amounts, curves, losses)
        if timed:
            of = {"processor": "processor time of a rank", "clock": "time"}[comparison.clock]
            labels = losses | {
                "set_title": "equal time",
                "set_xlabel": f"{of} in training steps (s)",
            }
            _panel(next(axes), [curve.seconds for curve in curves], curves, labels)
    if weights:
        axis = next(axes)
        for dashes, (x, y) in zip(dashes_of(len(weights)), weights.values(), strict=True):
            axis.plot(x, y, linestyle=dashes)
        axis.set(
            title="what the domains weighed",
            xlabel="iteration (steps)",
            ylabel="mean weight of the samples",
        )
        axis.axhline(1, color="grey", linewidth=0.6)
        name_lines(axis, [(name, x[-1], y[-1]) for name, (x, y) in weights.items()])
    figure.savefig(path, dpi=150)


def _panel(axis: Any, xs: list[list[float]], curves: list[Any], labels: dict[str, str]) -> None:
    """Draws validation losses over something."""
    for dashes, x, curve in zip(dashes_of(len(curves)), xs, curves, strict=True):
        axis.plot(x, curve.losses, linestyle=dashes, marker=".", markersize=4)
    for setter, text in labels.items():
        getattr(axis, setter)(text)
    # Losses of the first steps would flatten the differences that matter.
    shown = [
        loss
        for x, curve in zip(xs, curves, strict=True)
        for at, loss in zip(x, curve.losses, strict=True)
        if at >= _EARLY * x[-1] and numpy.isfinite(loss)
    ]
    if shown and max(shown) > min(shown):
        room = 0.05 * (max(shown) - min(shown))
        axis.set_ylim(min(shown) - room, max(shown) + room)
    name_lines(axis, [(c.name, x[-1], c.losses[-1]) for x, c in zip(xs, curves, strict=True)])


def name_lines(axis: Any, ends: list[tuple[str, float, float]], gap: float = _LABEL_GAP) -> None:
    """Writes each line's name to the right of its end, names kept apart.

    Args:
        axis: matplotlib's axes.
        ends: name, x and y of each line's last point.
        gap: minimum distance of two names, relative to the height of the axes.
    """
    ends = [end for end in ends if numpy.isfinite(end[2])]
    low, high = axis.get_ylim()
    heights = [(y - low) / (high - low) for _, _, y in ends]
    for (name, x, y), height in zip(ends, spread(heights, gap), strict=True):
        axis.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            verticalalignment="center",
            annotation_clip=False,
            parse_math=False,  # a name may have dollar signs
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey"},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Returns heights of names, at least a gap apart, in the same order, close to the given."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed: list[float] = []
    for index in order:
        placed.append(max(heights[index], placed[-1] + gap) if placed else heights[index])
    # Names were only pushed up: half of the push is undone.
    shift = (sum(placed) - sum(heights)) / len(heights) if heights else 0.0
    found = [0.0] * len(heights)
    for index, height in zip(order, placed, strict=True):
        found[index] = height - shift
    return found


def dashes_of(count: int) -> list[Any]:
    """Returns a dash pattern for each of several lines."""
    return [_DASHES[k % len(_DASHES)] for k in range(count)]
