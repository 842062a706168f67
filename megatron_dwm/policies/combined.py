"""Several policies at once, `--dwm-policy head+curriculum`: the product of their weights.

    w_i = prod_k w_ik / m,    m: the running mean of the product

The mean of a product is not the product of the means, so m, fixed at the start of a step and
updated at its end, brings the mean back to one. A sample that one policy drops stays dropped. Each
policy learns as it would alone, from the same influence: the effect of more weight on a sample,
whatever weight the other policies give it.

Shapes: b samples in a micro-batch, n on this rank.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.policies.base import (
    Lesson,
    PolicyContext,
    SampleView,
    StepView,
    WeightPolicy,
    policy_class,
)
from megatron_dwm.policies.maps import DECAY
from megatron_dwm.policies.running import StepSums, share_of_new


class Combined(WeightPolicy):
    """The product of policies.

    Args:
        context: what the policies are built from.
        names: names of the policies.
    """

    def __init__(self, context: PolicyContext, names: list[str]) -> None:
        super().__init__(context)
        self.names = names
        self.policies = [policy_class(name)(context) for name in names]
        self.needs = self.policies[0].needs
        for policy in self.policies[1:]:
            self.needs = self.needs | policy.needs
        self.scorer = next((p.scorer for p in self.policies if p.scorer is not None), None)
        # Running mean of the product, and its age.
        self.running = torch.tensor([1.0, 0.0], dtype=torch.float64, device=context.device)
        self._sums = StepSums(context.topology)
        self._products: dict[int, torch.Tensor] = {}

    def begin(self, step: StepView) -> None:
        """See `WeightPolicy.begin`."""
        self._settle()
        self._products.clear()
        for policy in self.policies:
            policy.begin(step)

    def foresee(self, step: StepView, influence: torch.Tensor | None) -> None:
        """See `WeightPolicy.foresee`; for the policies that ask for it."""
        for policy in self.policies:
            if policy.needs.influence_ahead:
                policy.foresee(step, influence)

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`."""
        product = torch.stack([policy.weights(view).double() for policy in self.policies]).prod(0)
        self._products[view.index] = product
        return (product / self.running[0]).float()

    def observe(self, step: StepView, influence: torch.Tensor) -> Lesson:
        """See `WeightPolicy.observe`; for the policies that learn."""
        lessons = [p.observe(step, influence) for p in self.policies if p.needs.influence]
        whole = Lesson()
        for lesson in lessons:
            whole.updated |= lesson.updated
            if lesson.grad_norm == lesson.grad_norm:  # not NaN
                whole.grad_norm = lesson.grad_norm
            whole.causes += [cause for cause in lesson.causes if cause not in whole.causes]
        return whole

    def end(self, step: StepView) -> list[str]:
        """See `WeightPolicy.end`; starts to sum the products."""
        causes = [cause for policy in self.policies for cause in policy.end(step)]
        if self.context.sees_losses and self._products:
            product = torch.cat([self._products[k] for k in sorted(self._products)])
            self._sums.start(torch.stack([torch.ones_like(product).sum(), product.sum()]))
        return list(dict.fromkeys(causes))

    def bad_scores(self) -> torch.Tensor | bool:
        """See `WeightPolicy.bad_scores`; asks all policies, as each resets when asked."""
        found: torch.Tensor | bool = False
        for policy in self.policies:
            found = policy.bad_scores() | found
        return found

    def broken(self) -> torch.Tensor | bool:
        """See `WeightPolicy.broken`."""
        found: torch.Tensor | bool = False
        for policy in self.policies:
            found = policy.broken() | found
        return found

    @property
    def opening(self) -> float:
        """See `WeightPolicy.opening`; that of the policy that is held back most."""
        return min(policy.opening for policy in self.policies)

    @property
    def synchronous(self) -> bool:
        """See `WeightPolicy.synchronous`."""
        return any(policy.synchronous for policy in self.policies)

    @property
    def batch(self) -> Any:
        """What the guards did, for the first policy that has guards."""
        found = (getattr(policy, "batch", None) for policy in self.policies)
        return next((batch for batch in found if batch is not None), None)

    def local_scores(self) -> torch.Tensor | None:
        """See `WeightPolicy.local_scores`; those of the first policy that has some."""
        found = (policy.local_scores() for policy in self.policies)
        return next((scores for scores in found if scores is not None), None)

    def figures(self) -> dict[str, Any]:
        """See `WeightPolicy.figures`; of equal names, the first policy's counts."""
        found: dict[str, Any] = {}
        for policy in self.policies:
            found = {**policy.figures(), **found}
        return found

    def notices(self) -> list[str]:
        """See `WeightPolicy.notices`."""
        return [line for policy in self.policies for line in policy.notices()]

    def description(self) -> dict[str, Any] | None:
        """See `WeightPolicy.description`; that of all policies."""
        found: dict[str, Any] = {"form": "+".join(self.names)}
        for policy in self.policies:
            found.update({k: v for k, v in (policy.description() or {}).items() if k != "form"})
        return found

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        self._settle()
        states = {str(k): policy.state_dict() for k, policy in enumerate(self.policies)}
        return {"running": self.running.cpu(), "policies": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        self.running = state["running"].to(self.running.device)
        for k, policy in enumerate(self.policies):
            policy.load_state_dict(state["policies"][str(k)])

    def common_state(self) -> dict[str, Any]:
        """See `WeightPolicy.common_state`."""
        return {str(k): policy.common_state() for k, policy in enumerate(self.policies)}

    def load_common_state(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_common_state`."""
        for k, policy in enumerate(self.policies):
            if str(k) in state:
                policy.load_common_state(state[str(k)])

    def forget_evidence(self) -> None:
        """See `WeightPolicy.forget_evidence`."""
        for policy in self.policies:
            policy.forget_evidence()

    def local_state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.local_state_dict`."""
        states = {str(k): policy.local_state_dict() for k, policy in enumerate(self.policies)}
        return {k: state for k, state in states.items() if state}

    def load_local_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_local_state_dict`."""
        for k, policy in enumerate(self.policies):
            if str(k) in state:
                policy.load_local_state_dict(state[str(k)])

    def _settle(self) -> None:
        sums = self._sums.take()
        if sums is None:
            return
        mean, age = self.running[0], self.running[1] + 1
        seen = mean + share_of_new(age, DECAY) * (sums[1] / sums[0] - mean)
        self.running = torch.stack([torch.where(seen > 0, seen, mean), age])


def build_policy(names: str, context: PolicyContext) -> WeightPolicy:
    """Returns the policy of a name, or of several names joined by `+`.

    Args:
        names: see `DWMConfig.policies`.
        context: what it is built from.

    Raises:
        DWMError: see `policy_class`.
    """
    first, *others = names.split("+")
    if not others:
        return policy_class(first)(context)
    return Combined(context, [first, *others])
