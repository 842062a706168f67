"""The results as markdown tables."""

from __future__ import annotations

import statistics
from typing import Any

from quality import figures
from quality.figures import Results, Seeds
from quality.plan import ARMS, MOE_ARM, MORE, REGIMES

QUARTERS = ("useful", "effective", "correlation", "gate")

LEGEND = """
Losses are in nats a token on held-out prose, +- the standard deviation over seeds. Differences are
paired by seed, +- their standard error. *Cost*: time of the run's steps in stock steps (by the
warm-up steps of a run of the arm alone on the machine, `--timing`, or where there is none of the
run itself; on a CPU processor time). *Equal time*: the curve read when the run has
spent uniform's time, at a learning rate that has not come to its end; *longer uniform*: the final
loss against that of a uniform run as long as this one took, both with their schedules completed.
*Multiplier*: tokens that uniform needs for the same loss over tokens spent, cost counted in; beyond
the longest uniform run it is extrapolated (~).
""".strip()
OF_MOE = "Arms `moe-` have four experts a layer, and are compared with `moe-uniform`."


def report(results: Results) -> str:
    """Returns the whole report."""
    arms = [arm for regime in results.regimes() for arm in results.arms(regime)]
    parts = [LEGEND, OF_MOE if any(arm.startswith(MOE_ARM) for arm in arms) else ""]
    for regime in [name for name in REGIMES if name in results.regimes()]:
        about = REGIMES[regime]
        parts.append(f"## {about.letter}. {regime}: {about.about}")
        parts += [part for part in regime_tables(results, regime) if part]
    parts.append(aims(results))
    parts.append(tuning(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def regime_tables(results: Results, regime: str) -> list[str]:
    """Returns the tables of a regime: losses, what the weights were, uniform's other lengths."""
    arms = ordered(results.arms(regime))
    rows = [row_of_losses(results, regime, arm) for arm in arms]
    losses = table(
        [
            *("arm", "seeds", "final loss", "minus uniform", "oracle's gain", "cost"),
            *("equal time: minus uniform", "oracle's gain", "minus longer uniform", "multiplier"),
        ],
        [row for row in rows if row],
    )
    rows = [row_of_weights(results.seeds(regime, arm), arm) for arm in arms]
    weights = table(
        [
            *("arm", "weight on useful samples by quarter", "effective share"),
            *("out-of-sample correlation", "gate"),
        ],
        [row for row in rows if row],
    )
    ladder = results.ladder(regime)
    lengths = table(
        ["tokens of a uniform run", *(f"{tokens / 1e6:.2f}M" for tokens, _ in ladder)],
        [["final loss", *(f"{loss:.4f}" for _, loss in ladder)]],
    )
    return [losses, weights, lengths if ladder else ""]


def ordered(arms: list[str]) -> list[str]:
    """Returns arms in the order of the plan, then variants; without lengths and tuning runs."""
    extra = [a for a in arms if a not in ARMS and not a.startswith("uniform-") and "-lr" not in a]
    extra = [arm for arm in MORE if arm in extra] + sorted(set(extra) - set(MORE))
    return [arm for arm in ARMS if arm in arms] + extra


def row_of_losses(results: Results, regime: str, arm: str) -> list[str]:
    """Returns an arm's row of the first table."""
    kind = MOE_ARM if arm.startswith(MOE_ARM) else ""  # compared with what has the same layers
    ours, uniform = results.seeds(regime, arm), results.seeds(regime, f"{kind}uniform")
    final = figures.finals(ours)
    base, oracle = figures.finals(uniform), figures.finals(results.seeds(regime, f"{kind}oracle"))
    row = [arm, str(len(ours)), plus_minus(*figures.mean_and_spread(list(final.values())))]
    if arm == f"{kind}uniform":
        return [*row, "0", "0%" if oracle else "", "1.000", "0", "", "0", "1"]
    early = {seed: figures.loss_at_equal_time(result) for seed, result in ours.items()}
    ladder = [] if kind else results.ladder(regime)
    pairs = [(ours[seed], uniform[seed]) for seed in sorted(ours) if seed in uniform]
    longer = [figures.against_longer_uniform(ladder, *pair) for pair in pairs]
    multipliers = [figures.multiplier(ladder, *pair) for pair in pairs]
    spent = statistics.fmean(figures.cost(result) for result in ours.values())
    return [
        *row,
        difference(figures.paired(final, base)),
        percent(figures.share_of_gain(final, base, oracle)),
        f"{spent:.3f}",
        difference(figures.paired(early, base)),
        percent(figures.share_of_gain(early, base, oracle)),
        difference([value for value in longer if value is not None]),
        factor([m for m in multipliers if m is not None], ladder, pairs),
    ]


def row_of_weights(seeds: Seeds, arm: str) -> list[str]:
    """Returns an arm's row of the second table, means over seeds; empty without weights."""
    found = [result["weights"] for result in seeds.values() if result["weights"]]
    if not found:
        return []
    return [arm, *(quarters([weights.get(name) for weights in found]) for name in QUARTERS)]


def quarters(values: list[list[float | None] | None]) -> str:
    """Returns four means over seeds; empty where there is nothing."""
    words = []
    for k in range(4):
        known = [v[k] for v in values if v is not None and v[k] is not None]
        words.append(f"{statistics.fmean(known):.2f}" if known else "-")  # type: ignore[arg-type]
    return "" if words == ["-"] * 4 else " ".join(words)


def aims(results: Results) -> str:
    """Returns what is aimed at, with what was found."""
    rows = []

    def add(regime: str, what: str, value: float | None, least: float, form: str) -> None:
        if value is not None:
            met = "yes" if value >= least else "no"
            rows.append(
                [REGIMES[regime].letter, what, format(least, form), format(value, form), met]
            )

    for regime in results.regimes():
        ours, uniform = results.seeds(regime, "head"), results.seeds(regime, "uniform")
        base, oracle = figures.finals(uniform), figures.finals(results.seeds(regime, "oracle"))
        if not ours:
            continue
        if regime == "shuffled":
            share = figures.share_of_gain(figures.finals(ours), base, oracle)
            add(regime, "head, of the oracle's gain", share, 0.8, ".0%")
            early = {seed: figures.loss_at_equal_time(result) for seed, result in ours.items()}
            share = figures.share_of_gain(early, base, oracle)
            add(regime, "head, of it at equal time", share, 0.75, ".0%")
        ladder = results.ladder(regime)
        pairs = [(ours[seed], uniform[seed]) for seed in ours if seed in uniform]
        found = [figures.multiplier(ladder, *pair) for pair in pairs]
        known = [value for value in found if value is not None]
        mean = statistics.fmean(known) if known else None
        if regime in ("noise", "target"):
            add(regime, "head, compute multiplier (in one of b and c)", mean, 1.3, ".3f")
        if regime in ("nothing", "scarce"):
            add(regime, "head, compute multiplier", mean, 0.995, ".3f")
    return table(["regime", "aim", "at least", "found", "met"], rows) if rows else ""


def tuning(results: Results) -> str:
    """Returns the table of learning rates."""
    found: dict[str, dict[float, float]] = {}
    for (_, arm), seeds in results.by_arm.items():
        if "-lr" in arm:
            for result in seeds.values():
                found.setdefault(arm.split("-lr")[0], {})[result["lr"]] = result["final"]
    if not found:
        return ""
    rates = sorted({lr for by_lr in found.values() for lr in by_lr})
    rows = [
        [arm, *(f"{by_lr[lr]:.4f}" if lr in by_lr else "" for lr in rates)]
        for arm, by_lr in found.items()
    ]
    heading = ["learning rate, regime a, one seed", *(f"{lr:g}" for lr in rates)]
    return table(heading, rows)


# ------------------------------------------------------------------------------------- words


def table(heading: list[str], rows: list[list[str]]) -> str:
    """Returns a markdown table; empty without rows."""
    if not rows:
        return ""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plus_minus(value: float, spread: float | None) -> str:
    """Returns `1.2345 +- 0.0010`."""
    return f"{value:.4f}" + ("" if spread is None else f" +- {spread:.4f}")


def difference(values: list[float]) -> str:
    """Returns the mean of paired differences with its standard error."""
    if not values:
        return ""
    error = figures.standard_error(values)
    return f"{statistics.fmean(values):+.4f}" + ("" if error is None else f" +- {error:.4f}")


def percent(value: float | None) -> str:
    """Returns a share as a percentage."""
    return "" if value is None else f"{value:.0%}"


def factor(
    values: list[float], ladder: list[tuple[float, float]], pairs: list[tuple[Any, Any]]
) -> str:
    """Returns the mean multiplier, marked where it is beyond the uniform runs."""
    if not values:
        return ""
    mean, spread = figures.mean_and_spread(values)
    needed = [figures.reference(ladder, *pair) for pair in pairs]
    low = min(loss for _, loss in ladder)
    high = max(loss for _, loss in ladder)
    beyond = any(at is not None and not low <= at <= high for at in needed)
    return ("~" if beyond else "") + f"{mean:.3f}" + ("" if spread is None else f" +- {spread:.3f}")
