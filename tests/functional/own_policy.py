"""A policy of a user's own, for `--dwm-policy tests.functional.own_policy:ByDomain`."""

import torch

from megatron_dwm.policies.base import Needs, WeightPolicy


class ByDomain(WeightPolicy):
    """Samples of the first data set weigh 1.5, the others 0.5."""

    needs = Needs(domains=True)

    def weights(self, view):
        """As `WeightPolicy.weights`."""
        return torch.where(view.domains == 0, 1.5, 0.5)
