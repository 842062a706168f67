"""Compares an estimated meta-gradient with brute force: order, magnitude, and noise.

A correlation does not see a constant factor: an estimate that is S times too large, as with a loss
scale that is not divided out, correlates as well as the right one. So the magnitude is compared
too, by the slope of a straight line through the origin, `measured = slope * estimated`. Brute force
has errors of its own, of two kinds:

    noise      the two one-sided differences, which would be equal in a perfect measurement, give
               the slope a standard error
    curvature  Adam's early steps are close to the gradient's sign, so an element whose gradient is
               nearly zero has a large derivative that holds only for tiny changes. The one-sided
               differences do not show this. So before a magnitude is called wrong, brute force is
               repeated with a quarter of the change, and the slope may be off by twice as much as
               that changed it

Whether there is a magnitude to compare depends on what is estimated:

    lookahead next, jacobian exact   the derivative itself: slope 1
    lookahead current                no. h is from before the step, and so are Adam's second
                                     moments, which one large gradient can change by any factor; the
                                     derivative through them, and clipping's projection, are left
                                     out. In Adam's first steps estimates of 100 and -8 times the
                                     true value were seen. With SGD only h differs, and there is no
                                     bound on that either
    jacobian identity                no. Without the division by the root of the second moments,
                                     Adam's step has different units altogether

If there is none, the slope is reported but not judged: only the order of the samples is. What those
variants share with the first one (loss scale, reductions, token counts) can be judged by comparing
a step of the same run with `--dwm-lookahead next --dwm-jacobian exact`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

# Factor by which the magnitude of an exact estimate may be off, either way. In bf16 brute force has
# to change a weight by ten times as much, and the estimate is rounded too.
TOLERANCE, TOLERANCE_BF16 = 1.25, 1.6
_BENDS = 2.0  # how many times its observed change the slope may still be off
# Student's t distribution, 99 % two-sided, by degrees of freedom: with few samples the noise is
# poorly known.
_STUDENT = {1: 63.7, 2: 9.92, 3: 5.84, 4: 4.60, 5: 4.03, 6: 3.71, 7: 3.50, 8: 3.36, 9: 3.25}


@dataclass
class Verification:
    """How a step's meta-gradient compares with the actual effect of changing a weight.

    Attributes:
        samples: global sample numbers.
        weights: their weights.
        estimated: `c_i` by the package's own passes, for those samples.
        measured: the same by brute force.
        correlation: Pearson's, NaN if one side is constant.
        relative_error: `|estimated - measured| / |measured|`.
        noise: half the difference between brute force upwards and downwards, relative to the spread
            of their mean over the samples. It comes from rounding, which moves different parameters
            up than down, and from curvature.
        slope: `<estimated, measured> / <estimated, estimated>`: 1 if the magnitude is right, 1/S if
            the estimate is S times too large.
        slope_error: standard error of the slope, from the same differences as `noise`.
        slope_bend: how much the slope changed when weights were changed by less; 0: not measured.
        tolerance: factor by which the slope may be off 1; None: it is not judged.
    """

    samples: list[int]
    weights: list[float]
    estimated: list[float]
    measured: list[float]
    correlation: float
    relative_error: float
    noise: float
    slope: float
    slope_error: float
    slope_bend: float
    tolerance: float | None

    @property
    def ceiling(self) -> float:
        """The correlation that a perfect estimate would have with measurements of this noise.

        `sqrt(signal / measured)` in variances, because the measurement is signal plus noise.
        """
        return math.sqrt(max(0.0, 1.0 - self.noise**2)) if self.noise >= 0 else math.nan

    @property
    def magnitude(self) -> float:
        """The estimate's size relative to the measurement."""
        return 1.0 / self.slope if self.slope else math.inf

    @property
    def wrong_magnitude(self) -> bool:
        """Whether the magnitude is off by more than the tolerance and the margin together."""
        if self.tolerance is None:
            return False
        low, high = self.slope - self.margin, self.slope + self.margin
        return high < 1 / self.tolerance or low > self.tolerance

    @property
    def unknown_magnitude(self) -> bool:
        """Whether the magnitude should be judged, but brute force is not good enough.

        Either it is beyond the tolerance, possibly because of brute force's own errors, or two
        standard errors are half of it.
        """
        if self.tolerance is None or self.wrong_magnitude:
            return False
        within = 1.0 / self.tolerance <= self.slope <= self.tolerance
        return not (within and 2.0 * self.slope_error <= 0.5)

    @property
    def margin(self) -> float:
        """How much the slope may be off because of brute force's own errors, almost certainly."""
        student = _STUDENT.get(len(self.samples) - 1, 3.2)
        return student * self.slope_error + _BENDS * self.slope_bend

    def repeated(self, finer: Verification) -> Verification:
        """Returns this comparison with the slope of another that changed weights by less."""
        bend = abs(finer.slope - self.slope)
        return replace(self, slope=finer.slope, slope_error=finer.slope_error, slope_bend=bend)


def compare(
    samples: list[int],
    weights: torch.Tensor,
    estimated: torch.Tensor,
    upwards: torch.Tensor,
    downwards: torch.Tensor,
    tolerance: float | None,
) -> Verification:
    """Computes the comparison from both one-sided differences; tensors `[len(samples)]` float64.

    Args:
        samples: global sample numbers, two or more.
        weights: their weights.
        estimated: `c_i` by the package's own passes.
        upwards: change of the meta loss divided by that of the weight, for a raised weight.
        downwards: the same for a lowered weight.
        tolerance: as in `Verification`.
    """
    measured, difference = (upwards + downwards) / 2, (upwards - downwards) / 2
    norm = torch.linalg.vector_norm
    spread = norm(measured - measured.mean())
    # Around its mean: the loss at unchanged weights is in both differences, and cancels in their
    # mean.
    scatter = norm(difference - difference.mean())
    size = norm(estimated)
    return Verification(
        samples=samples,
        weights=weights.tolist(),
        estimated=estimated.tolist(),
        measured=measured.tolist(),
        correlation=torch.corrcoef(torch.stack([estimated, measured]))[0, 1].item(),
        relative_error=(norm(estimated - measured) / norm(measured)).item(),
        # If all measurements are equal, nothing was measured.
        noise=(scatter / spread).item() if spread else math.inf,
        slope=(estimated @ measured / size.square()).item(),
        slope_error=(scatter / math.sqrt(len(samples) - 1) / size).item(),
        slope_bend=0.0,
        tolerance=tolerance,
    )
