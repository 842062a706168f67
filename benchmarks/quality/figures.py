"""What the results of runs come to: paired differences, cost, equal time, compute multiplier.

A result is the dict that `runner.summary` writes. Time is counted in stock steps, from the run's
own steps: a warm-up step does what a stock step does, so a plain or meta step's time over it holds
on a machine that others use as well.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

Result = dict[str, Any]
# Of one arm in one regime, by seed.
Seeds = dict[int, Result]


class Results:
    """Results by regime and arm.

    Args:
        results: the dicts.
        timing: those of `plan.timing_plan`, taken alone on a machine; an arm's cost follows from
            them where it has one, else from each run's own steps.
    """

    def __init__(self, results: list[Result], timing: list[Result] | None = None) -> None:
        self.by_arm: dict[tuple[str, str], Seeds] = {}
        paces = {result["arm"]: pace_of(result) for result in timing or []}
        for result in results:
            if result["arm"] in paces:
                result = {**result, "pace": paces[result["arm"]]}
            key = (result["regime"], result["arm"])
            self.by_arm.setdefault(key, {})[result["seed"]] = result

    def seeds(self, regime: str, arm: str) -> Seeds:
        """Returns an arm's results by seed."""
        return self.by_arm.get((regime, arm), {})

    def regimes(self) -> list[str]:
        """Returns the regimes that have results."""
        return list(dict.fromkeys(regime for regime, _ in self.by_arm))

    def arms(self, regime: str) -> list[str]:
        """Returns the arms of a regime that have results."""
        return [arm for found, arm in self.by_arm if found == regime]

    def ladder(self, regime: str) -> list[tuple[float, float]]:
        """Returns tokens and end loss of uniform runs of several lengths, shortest first.

        All of the seed that has the other lengths; empty where there are none.
        """
        found = []
        for arm in self.arms(regime):
            if arm.startswith("uniform-x"):
                found += list(self.seeds(regime, arm).values())
        if not found:
            return []
        seed = found[0]["seed"]
        found = [result for result in found if result["seed"] == seed]
        found += [r for r in self.seeds(regime, "uniform").values() if r["seed"] == seed]
        return sorted((result["tokens"], result["final"]) for result in found)


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Returns the mean and the standard deviation; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def standard_error(values: list[float]) -> float | None:
    """Returns the standard error of the mean; None of a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Returns ours minus theirs, seed by seed where both have one."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]


def finals(seeds: Seeds) -> dict[int, float]:
    """Returns each seed's final loss."""
    return {seed: result["final"] for seed, result in seeds.items()}


# ------------------------------------------------------------------------------------- time


def cost(result: Result) -> float:
    """Returns the time of the run's steps, in stock steps of the same number."""
    if "warm-up" not in result["kinds"]:
        return 1.0
    pace = {**pace_of(result), **result.get("pace", {})}
    spent = sum(kind["steps"] * pace[name] for name, kind in result["kinds"].items())
    return spent / result["steps"]


def pace_of(result: Result) -> dict[str, float]:
    """Returns the time of each kind of step, in warm-up steps, which do what stock steps do."""
    unit = _typical(result["kinds"]["warm-up"])
    return {name: _typical(kind) / unit for name, kind in result["kinds"].items()}


def _typical(kind: dict[str, float]) -> float:
    # The lower quartile, as what else runs on the machine only adds.
    return kind.get("low", kind["median"])


def loss_at_equal_time(result: Result) -> float:
    """Returns the loss when the run has spent the time that as many stock steps take.

    Read off the validation curve, whose distance to the final loss (of more samples) at the last
    step is carried over. The learning rate has not come to its end there.
    """
    over = cost(result)
    if over <= 1:
        return result["final"]
    warm = result["kinds"].get("warm-up", {"steps": 0})["steps"]
    steps = result["steps"]
    # A weighted step's time, in stock steps.
    rate = (over * steps - warm) / (steps - warm)
    return loss_at_step(result, warm + (steps - warm) / rate)


def loss_at_step(result: Result, step: float) -> float:
    """Returns the validation loss at a step, linear between evaluations."""
    curve = [(point["step"], point["loss"]) for point in result["curve"]]
    offset = result["final"] - curve[-1][1]
    if step <= curve[0][0]:
        return curve[0][1] + offset
    for (before, a), (after, b) in zip(curve, curve[1:], strict=False):
        if step <= after:
            return a + (b - a) * (step - before) / (after - before) + offset
    return result["final"]


# --------------------------------------------------------------------- compute multiplier


def tokens_needed(ladder: list[tuple[float, float]], loss: float) -> float:
    """Returns the tokens that uniform needs for a loss, linear in the tokens' logarithm.

    Args:
        ladder: tokens and end loss of uniform runs, shortest first; two or more.
        loss: to be reached.

    Returns:
        Tokens; beyond the ends by the nearest two runs; infinite where more tokens do not help.
    """
    pairs = list(zip(ladder, ladder[1:], strict=False))
    (_, a), (_, b) = pairs[0]
    if loss > a and a > b:
        return _on_line(*pairs[0], loss)
    for left, right in pairs:
        if left[1] >= loss >= right[1] and left[1] > right[1]:
            return _on_line(left, right, loss)
    left, right = pairs[-1]
    return _on_line(left, right, loss) if left[1] > right[1] else math.inf


def _on_line(left: tuple[float, float], right: tuple[float, float], loss: float) -> float:
    (n, a), (m, b) = left, right
    share = (a - loss) / (a - b)
    return n * (m / n) ** share


def loss_of_tokens(ladder: list[tuple[float, float]], tokens: float) -> float:
    """Returns the loss that uniform reaches on so many tokens, by the same lines."""
    pairs = list(zip(ladder, ladder[1:], strict=False))
    left, right = next((p for p in pairs if tokens <= p[1][0]), pairs[-1])
    share = math.log(tokens / left[0]) / math.log(right[0] / left[0])
    return left[1] + share * (right[1] - left[1])


def reference(ladder: list[tuple[float, float]], result: Result, uniform: Result) -> float | None:
    """Returns the loss on the ladder that stands for a result of another seed.

    The ladder is of one seed; a result is moved onto it by its difference to its own uniform run.
    """
    same = [loss for tokens, loss in ladder if tokens == uniform["tokens"]]
    return same[0] + result["final"] - uniform["final"] if same and len(ladder) > 1 else None


def multiplier(ladder: list[tuple[float, float]], result: Result, uniform: Result) -> float | None:
    """Returns tokens that uniform needs for the result's loss, over those that its time is worth.

    Args:
        ladder: of the regime.
        result: of the arm.
        uniform: of the same seed and length.
    """
    at = reference(ladder, result, uniform)
    if at is None:
        return None
    return tokens_needed(ladder, at) / (result["tokens"] * cost(result))


def against_longer_uniform(
    ladder: list[tuple[float, float]], result: Result, uniform: Result
) -> float | None:
    """Returns the loss minus that of a uniform run that took the same time in full.

    Unlike `loss_at_equal_time` both have come to the end of their schedule.
    """
    at = reference(ladder, result, uniform)
    if at is None:
        return None
    return at - loss_of_tokens(ladder, uniform["tokens"] * cost(result))


def share_of_gain(
    ours: dict[int, float], uniform: dict[int, float], oracle: dict[int, float]
) -> float | None:
    """Returns which share of the oracle's gain over uniform is ours, over the seeds of all three.

    None where there is none, or the oracle gains nothing.
    """
    seeds = sorted(ours.keys() & uniform.keys() & oracle.keys())
    gain = sum(uniform[s] - oracle[s] for s in seeds)
    if not seeds or gain <= 0:
        return None
    return sum(uniform[s] - ours[s] for s in seeds) / gain
