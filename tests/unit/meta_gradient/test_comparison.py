"""An estimate against brute force: what a factor, noise and another order of samples come to.

The measurements are made up: a truth, an estimate of it, and one-sided differences with noise and
curvature. Not exercised here: brute force itself (tests/functional/test_verification.py).
"""

import math

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.hosts.megatron_lm.verification import (  # noqa: E402
    console_line,
    drowned,
    log_fields,
    passes,
    warnings,
)
from megatron_dwm.meta_gradient.comparison import TOLERANCE, TOLERANCE_BF16, compare  # noqa: E402

TRUTH = torch.tensor([-2.0, -1.4, -0.9, 0.3, 0.8, 1.6], dtype=torch.float64) * 1e-3
BOTH = pytest.mark.parametrize("tolerance", [TOLERANCE, TOLERANCE_BF16])


def compared(factor=1.0, noise=0.0, curvature=0.0, tolerance=TOLERANCE, order=None, seed=0):
    """Returns the comparison of `factor` times the truth with a measurement of it.

    Args:
        factor: of the estimate.
        noise: of both one-sided differences, over the truth's spread.
        curvature: half the difference of the two, the same for each sample, likewise.
        tolerance: as in `Verification`.
        order: of the estimates, if not the truth's.
        seed: of the noise.
    """
    size = TRUTH.std() * torch.tensor(1.0)
    g = torch.Generator().manual_seed(seed)
    up, down = (noise * size * torch.randn(len(TRUTH), generator=g) for _ in range(2))
    bend = curvature * size
    estimate = factor * (TRUTH if order is None else TRUTH[order])
    samples, weights = list(range(len(TRUTH))), torch.ones(len(TRUTH))
    up, down = TRUTH + up + bend, TRUTH + down - bend
    return compare(samples, weights, estimate, up, down, tolerance)


def said(found, threshold=0.9):
    return "\n".join(warnings(found, threshold, "ghost"))


@BOTH
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_right_estimate_passes_without_a_word(tolerance, noise):
    found = compared(noise=noise, curvature=0.3, tolerance=tolerance)
    assert found.magnitude == pytest.approx(1.0, abs=0.03)
    assert passes(found, 0.9) and said(found) == ""


@BOTH
@pytest.mark.parametrize("factor", [2.0, 64.0, 64.0**2, 2.0**16, 0.5, 1 / 64, -1.0])
def test_a_factor_is_refused_though_the_correlation_is_one(tolerance, factor):
    """As where a loss scale is not divided out, once or twice, or a mean over ranks is missing."""
    found = compared(factor, noise=0.02, tolerance=tolerance)
    assert abs(found.correlation) > 0.99
    assert found.magnitude == pytest.approx(factor, rel=0.05)
    assert found.wrong_magnitude and not passes(found, 0.9)
    text = said(found)
    assert "META-GRADIENT NOT CONFIRMED" in text
    assert f"the estimate is {found.magnitude:.3g} times what brute force measures" in text
    assert ("The order of the samples is right" in text) == (factor > 0)


@BOTH
def test_the_tolerance_is_the_one_that_is_stated(tolerance):
    inside, outside = 0.98 * tolerance, 1.02 * tolerance
    for factor in (inside, 1 / inside):
        assert passes(compared(factor, tolerance=tolerance), 0.9)
    for factor in (outside, 1 / outside):
        found = compared(factor, tolerance=tolerance)
        assert not passes(found, 0.9)
        assert f"may be {1 / tolerance:.3g} to {tolerance:.3g} times that" in said(found)


def test_noise_is_no_reason_to_refuse():
    """A right estimate, and measurements that could not tell it from one that is twice as large."""
    found = [compared(noise=1.5, seed=seed) for seed in range(40)]
    assert not any(f.wrong_magnitude for f in found)
    told = [f for f in found if passes(f, 0.2) and f.unknown_magnitude]
    assert len(told) > 20
    assert all("without a verdict on the magnitude" in said(f, 0.2) for f in told)


def test_curvature_is_no_reason_to_refuse():
    """As at Adam's second step: 1.55 times, and less so where weights are changed by less."""
    coarse, finer = compared(1.55), compared(1.2)
    assert coarse.wrong_magnitude
    found = coarse.repeated(finer)
    assert found.magnitude == pytest.approx(1.2) and not found.wrong_magnitude
    # What is the same for every change is no curvature.
    assert coarse.repeated(compared(1.54)).wrong_magnitude


@pytest.mark.parametrize("seed", range(20))
def test_a_large_factor_is_seen_through_the_noise(seed):
    found = compared(64.0, noise=0.6, seed=seed)
    assert found.wrong_magnitude and "NOT CONFIRMED" in said(found)


def test_a_correlation_that_noise_cannot_give_is_no_verdict_as_before():
    found = compared(noise=3.0, seed=1)
    assert drowned(found, 0.9) and not passes(found, 0.9)
    assert "verification without a verdict (correlation" in said(found)


def test_another_order_is_refused_with_the_right_magnitude():
    order = torch.tensor([5, 0, 1, 2, 3, 4])
    found = compared(order=order)
    assert not passes(found, 0.9)
    assert "may be learning noise" in said(found)


@pytest.mark.parametrize("factor", [1e-4, 0.5, 2.0, 50.0])
def test_where_no_magnitude_is_promised_none_is_judged(factor):
    """Adam's preconditioner from before the step, or none: the order of the samples counts."""
    found = compared(factor, tolerance=None)
    assert found.magnitude == pytest.approx(factor)
    assert passes(found, 0.9) and said(found) == ""


def test_the_magnitude_is_printed_and_logged():
    found = compared(64.0)
    assert "magnitude: 64 |" in console_line(found, 3)
    assert log_fields(found)["verify_magnitude"] == pytest.approx(64.0)


def test_an_estimate_of_nothing_is_refused_as_before():
    """NaN, zero, infinity: no figure can be made of them, and JSON has none."""
    for factor in (0.0, math.nan, math.inf):
        found = compared(factor)
        assert not passes(found, 0.9) and "NOT CONFIRMED" in said(found)
        assert all(x is None or math.isfinite(x) for x in log_fields(found).values())
