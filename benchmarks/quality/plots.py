"""Validation curves by arm, one panel per regime; markers and dashes tell them apart."""

from __future__ import annotations

import statistics
from pathlib import Path

from quality.figures import Results
from quality.plan import REGIMES, WARMUP_SHARE
from quality.tables import ordered

MARKERS = "osD^vPX*<>ph"
DASHES = ("-", "--", "-.", ":")
SHOWN = 0.45  # of the run, from its end: before, all arms fall alike


def draw(results: Results, path: Path) -> None:
    """Writes the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    regimes = [name for name in REGIMES if name in results.regimes()]
    rows = -(-(len(regimes) + 1) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.6 * rows), squeeze=False)
    panels = list(axes.flat)
    arms = ordered([arm for regime in regimes for arm in results.arms(regime)])
    lines = {}
    for panel, regime in zip(panels, regimes, strict=False):
        for k, arm in enumerate(arms):
            seeds = list(results.seeds(regime, arm).values())
            if not seeds:
                continue
            curves = [[point["loss"] for point in result["curve"]] for result in seeds]
            steps = [point["step"] for point in seeds[0]["curve"]]
            mean = [statistics.fmean(values) for values in zip(*curves, strict=False)]
            shown = [i for i, step in enumerate(steps) if step >= (1 - SHOWN) * steps[-1]]
            (lines[arm],) = panel.plot(
                [steps[i] for i in shown],
                [mean[i] for i in shown],
                linestyle=DASHES[k % len(DASHES)],
                marker=MARKERS[k % len(MARKERS)],
                markersize=5,
                linewidth=1.4,
                label=arm,
            )
        letter = REGIMES[regime].letter
        panel.set_title(f"{letter}. {regime}", loc="left", fontsize=11)
        panel.set_xlabel("step")
        panel.set_ylabel("validation loss")
        panel.grid(alpha=0.3)
    for panel in panels[len(regimes) :]:
        panel.axis("off")
    panels[len(regimes)].legend(
        handles=[lines[arm] for arm in arms if arm in lines],
        loc="center",
        title=f"mean over seeds; weighted from {WARMUP_SHARE:.0%} of the run",
        frameon=False,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
