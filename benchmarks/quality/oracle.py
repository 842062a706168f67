"""The oracle as a weight policy: each sample's weight follows from the data set that it is from."""

from __future__ import annotations

import json
import os

import torch

from megatron_dwm.errors import DWMError
from megatron_dwm.policies.base import Needs, PolicyContext, SampleView, WeightPolicy
from quality.plan import ORACLE_VARIABLE


class Oracle(WeightPolicy):
    """Weights by data set, a JSON list in the environment variable `QUALITY_ORACLE`.

    Args:
        context: what it is built from.
    """

    needs = Needs(domains=True)

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        try:
            weights = json.loads(os.environ[ORACLE_VARIABLE])
            self.by_data_set = torch.tensor(weights, dtype=torch.float32, device=context.device)
        except (KeyError, ValueError, TypeError) as error:
            raise DWMError(
                f"{ORACLE_VARIABLE} must be a JSON list of one weight per data set ({error})"
            ) from None

    def weights(self, view: SampleView) -> torch.Tensor:
        """As `WeightPolicy.weights`."""
        if view.domains is None or bool((view.domains < 0).any()):
            raise DWMError("the oracle needs a blend of data sets, whose samples are numbered")
        return self.by_data_set[view.domains]
