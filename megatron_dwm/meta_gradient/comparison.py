"""How an estimated meta-gradient compares with brute force: order, magnitude, and noise of both.

A correlation is blind to a factor: an estimate that is S times too large, as with a loss scale that
is not divided out, correlates as the right one does. So the magnitude is compared, too, by the
slope of a straight line through the origin, `measured = slope * estimated`. Brute force has errors
of its own, of two kinds:

    noise      the two one-sided differences, which a perfect measurement would find alike, give the
               slope a standard error
    curvature  Adam's early steps are close to the gradient's sign, so that an element whose
               gradient is nearly zero has a large derivative and soon no more effect. The
               one-sided differences do not show that. So before a magnitude is refused brute force
               is repeated with a quarter of the change, and the slope may be off by as much as
               that has changed it, twice

Whether there is a magnitude to compare follows from what is estimated:

    lookahead next, jacobian exact   the derivative itself: slope 1
    lookahead current                no. h is from before the step, and so are Adam's second
                                     moments, of which one large gradient makes any multiple; what
                                     goes through them, and clipping's projection, is left out. In
                                     Adam's first steps estimates were seen that were 100 and -8
                                     times the truth. With SGD it is h alone that differs, and
                                     there is no bound on that either
    jacobian identity                no. Adam's step without its division by the root of the second
                                     moments is of other units altogether

Where there is none the slope is reported and not judged: only the order of the samples is. What
those variants share with the first one (loss scale, reductions, token counts) is judged when a step
of the same run is compared with `--dwm-lookahead next --dwm-jacobian exact`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

# By what factor the magnitude of an exact estimate may be off 1, either way. In bf16 brute force
# has to change a weight by ten times as much, and the estimate is rounded, too.
TOLERANCE, TOLERANCE_BF16 = 1.25, 1.6
_BENDS = 2.0  # times that the slope may change once more as it did
# Student's distribution, 99 % two-sided, by degrees of freedom: a few samples tell the noise badly.
_STUDENT = {1: 63.7, 2: 9.92, 3: 5.84, 4: 4.60, 5: 4.03, 6: 3.71, 7: 3.50, 8: 3.36, 9: 3.25}


@dataclass
class Verification:
    """How a step's meta-gradient compares with what a changed weight really does.

    Attributes:
        samples: global sample numbers.
        weights: their weights.
        estimated: `c_i` of the product, for those samples.
        measured: the same by brute force.
        correlation: Pearson's, NaN where one side is constant.
        relative_error: `|estimated - measured| / |measured|`.
        noise: half the difference of brute force upwards and downwards, relative to the spread of
            their mean over the samples: rounding, which moves other parameters up than down, and
            curvature.
        slope: `<estimated, measured> / <estimated, estimated>`: 1 where the magnitude is right, 1/S
            where the estimate is S times too large.
        slope_error: standard error of the slope, from the same differences as `noise`.
        slope_bend: how much the slope changed when a weight was changed by less; 0: not measured.
        tolerance: by what factor the slope may be off 1; None: by any, it is not judged.
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

        `sqrt(signal / measured)` in variances, as what was measured is signal and noise.
        """
        return math.sqrt(max(0.0, 1.0 - self.noise**2)) if self.noise >= 0 else math.nan

    @property
    def magnitude(self) -> float:
        """How many times as large as what was measured the estimate is."""
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
        """Whether the magnitude is to be judged, and brute force cannot.

        Because it is off the tolerance and may be so by brute force's own doing, or because two
        standard errors are half of it.
        """
        if self.tolerance is None or self.wrong_magnitude:
            return False
        within = 1.0 / self.tolerance <= self.slope <= self.tolerance
        return not (within and 2.0 * self.slope_error <= 0.5)

    @property
    def margin(self) -> float:
        """What the slope may be off by brute force's own doing, all but for certain."""
        student = _STUDENT.get(len(self.samples) - 1, 3.2)
        return student * self.slope_error + _BENDS * self.slope_bend

    def repeated(self, finer: Verification) -> Verification:
        """Returns this comparison with the slope of one that changed weights by less."""
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
    """From both one-sided differences to the figures; all tensors `[len(samples)]` float64.

    Args:
        samples: global sample numbers, two or more.
        weights: their weights.
        estimated: `c_i` of the product.
        upwards: the change of the meta loss over that of the weight, where a weight is raised.
        downwards: the same where it is lowered.
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
        # Where nothing that was measured differs, nothing was seen.
        noise=(scatter / spread).item() if spread else math.inf,
        slope=(estimated @ measured / size.square()).item(),
        slope_error=(scatter / math.sqrt(len(samples) - 1) / size).item(),
        slope_bend=0.0,
        tolerance=tolerance,
    )
