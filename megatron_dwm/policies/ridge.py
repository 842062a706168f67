"""Ridge regression with forgetting, in closed form and float64.

    A <- f A + X^T X,   b <- f b + X^T z,   w = (A + lambda tr(A) / k I)^-1 b

for features X `[N, k]` and targets z `[N]`; f forgets, so that w follows a changing language model.
With n samples remembered and features of variance 1, `tr(A) / k = n`.

The penalty comes from a Gaussian prior. If features explain a share R^2 of the targets' variance,
each weight has variance R^2 / k and the noise has variance 1 - R^2, so that

    lambda = k (1 - R^2) / (n R^2)

which is large while there are few samples. R is known: it is the correlation of scores and targets
before the targets were seen.
"""

from __future__ import annotations

import math
from typing import Any

import torch

# Bounds of R^2.
LEAST_R2, MOST_R2 = 0.05, 0.9
_STATE = ("gram", "moment", "w", "scale")


class Ridge:
    """Sums over all meta steps so far, and the resulting weights.

    Attributes:
        w: `[k]`.
        scale: factor that gives `<w, x>` variance 1 over the samples remembered.
        count: n, the effective number of samples remembered.

    Args:
        width: k.
        forgetting: f, per meta step.
        penalty: lambda; None: from the formula above.
        device: where features live.
    """

    def __init__(
        self, width: int, forgetting: float, penalty: float | None, device: torch.device
    ) -> None:
        kind = {"dtype": torch.float64, "device": device}
        self.forgetting, self.penalty = forgetting, penalty
        self.gram = torch.zeros(width, width, **kind)
        self.moment = torch.zeros(width, **kind)
        self.w = torch.zeros(width, **kind)
        self.count = 0.0
        self.scale = torch.ones((), **kind)

    def update(
        self, gram: torch.Tensor, moment: torch.Tensor, samples: int, correlation: float = math.nan
    ) -> None:
        """Includes `X^T X` and `X^T z` over all samples of a meta step, and solves.

        Args:
            gram: `[k, k]`.
            moment: `[k]`.
            samples: N.
            correlation: R; NaN if it is not known yet.
        """
        self.gram.mul_(self.forgetting).add_(gram)
        self.moment.mul_(self.forgetting).add_(moment)
        self.count = self.forgetting * self.count + samples
        width = len(self.moment)
        penalty = self.penalty
        if penalty is None:
            r2 = correlation**2 if correlation > 0 else 0.0  # also for NaN
            r2 = min(max(r2, LEAST_R2), MOST_R2)
            penalty = width * (1 - r2) / (self.count * r2)
        system = self.gram.clone()
        system.diagonal().add_(penalty * self.gram.trace() / width + 1e-9)
        torch.linalg.cholesky(system, out=system)
        self.w = torch.cholesky_solve(self.moment.unsqueeze(1), system).squeeze(1)
        variance = self.w @ self.gram @ self.w / self.count
        self.scale = torch.where(variance > 0, variance.clamp(min=1e-24).rsqrt(), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums and the weights."""
        found: dict[str, Any] = {name: getattr(self, name).cpu() for name in _STATE}
        return {**found, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the sums and the weights."""
        for name in _STATE:
            setattr(self, name, state[name].to(self.gram.device))
        self.count = state["count"]
