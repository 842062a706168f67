"""Ridge regression with forgetting, in closed form and float64.

    A <- f A + X^T X,   b <- f b + X^T z,   w = (A + lambda tr(A) / k I)^-1 b

of features X `[N, k]` and targets z `[N]`; f forgets, so that w follows a language model that
changes.
"""

from __future__ import annotations

from typing import Any

import torch


class Ridge:
    """Sums of all meta steps so far, and the weights that follow from them.

    Args:
        width: k.
        forgetting: f, a meta step.
        penalty: lambda, relative to the mean of A's diagonal.
        device: where features live.
    """

    def __init__(self, width: int, forgetting: float, penalty: float, device: torch.device) -> None:
        kind = {"dtype": torch.float64, "device": device}
        self.forgetting, self.penalty = forgetting, penalty
        self.gram = torch.zeros(width, width, **kind)
        self.moment = torch.zeros(width, **kind)
        self.w = torch.zeros(width, **kind)

    def update(self, gram: torch.Tensor, moment: torch.Tensor) -> None:
        """Takes `X^T X` and `X^T z` over all samples of a meta step, and solves."""
        self.gram.mul_(self.forgetting).add_(gram)
        self.moment.mul_(self.forgetting).add_(moment)
        width = len(self.moment)
        system = self.gram.clone()
        system.diagonal().add_(self.penalty * self.gram.trace() / width + 1e-9)
        torch.linalg.cholesky(system, out=system)
        self.w = torch.cholesky_solve(self.moment.unsqueeze(1), system).squeeze(1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums and the weights."""
        return {name: getattr(self, name).cpu() for name in ("gram", "moment", "w")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them over."""
        for name in ("gram", "moment", "w"):
            setattr(self, name, state[name].to(self.gram.device))
