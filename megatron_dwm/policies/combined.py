"""Several policies at once, `--dwm-policy head+curriculum`: the product of their weights.

    w_i = prod_k w_ik / m,    m: the running mean of the product

The mean of a product is not the product of the means, so that m, fixed at the start of a step and
updated at its end, brings the mean back to one. A sample that one policy drops stays dropped. Each
policy learns as it does alone, from the same influence: what more of a sample would do, whatever
the others say of it.

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
        context: what they are built from.
        names: of the policies.
    """

    def __init__(self, context: PolicyContext, names: list[str]) -> None:
        super().__init__(context)
        self.names = names
        self.policies = [policy_class(name)(context) for name in names]
        self.needs = self.policies[0].needs
        for policy in self.policies[1:]:
            self.needs = self.needs | policy.needs
        self.scorer = next((p.scorer for p in self.policies if p.scorer is not None), None)
        # Running mean of the product, age.
        self.running = torch.tensor([1.0, 0.0], dtype=torch.float64, device=context.device)
        self._sums = StepSums(context.topology)
        self._products: dict[int, torch.Tensor] = {}

    def begin(self, step: StepView) -> None:
        """As `WeightPolicy.begin`."""
        self._settle()
        self._products.clear()
        for policy in self.policies:
            policy.begin(step)

    def foresee(self, step: StepView, influence: torch.Tensor | None) -> None:
        """As `WeightPolicy.foresee`, of those that ask for it."""
        for policy in self.policies:
            if policy.needs.influence_ahead:
                policy.foresee(step, influence)

    def weights(self, view: SampleView) -> torch.Tensor:
        """As `WeightPolicy.weights`."""
        product = torch.stack([policy.weights(view).double() for policy in self.policies]).prod(0)
        self._products[view.index] = product
        return (product / self.running[0]).float()

    def observe(self, step: StepView, influence: torch.Tensor) -> Lesson:
        """As `WeightPolicy.observe`, of those that learn."""
        lessons = [p.observe(step, influence) for p in self.policies if p.needs.influence]
        whole = Lesson()
        for lesson in lessons:
            whole.updated |= lesson.updated
            if lesson.grad_norm == lesson.grad_norm:  # not NaN
                whole.grad_norm = lesson.grad_norm
            whole.causes += [cause for cause in lesson.causes if cause not in whole.causes]
        return whole

    def end(self, step: StepView) -> list[str]:
        """As `WeightPolicy.end`; starts summing the products."""
        causes = [cause for policy in self.policies for cause in policy.end(step)]
        if self.context.sees_losses and self._products:
            product = torch.cat([self._products[k] for k in sorted(self._products)])
            self._sums.start(torch.stack([torch.ones_like(product).sum(), product.sum()]))
        return list(dict.fromkeys(causes))

    def bad_scores(self) -> torch.Tensor | bool:
        """As `WeightPolicy.bad_scores`, of all: each forgets what it has told."""
        found: torch.Tensor | bool = False
        for policy in self.policies:
            found = policy.bad_scores() | found
        return found

    def broken(self) -> torch.Tensor | bool:
        """As `WeightPolicy.broken`."""
        found: torch.Tensor | bool = False
        for policy in self.policies:
            found = policy.broken() | found
        return found

    @property
    def opening(self) -> float:
        """As `WeightPolicy.opening`, of the one that is held back most."""
        return min(policy.opening for policy in self.policies)

    @property
    def synchronous(self) -> bool:
        """As `WeightPolicy.synchronous`."""
        return any(policy.synchronous for policy in self.policies)

    @property
    def batch(self) -> Any:
        """What the guards did, of the first policy that has some."""
        found = (getattr(policy, "batch", None) for policy in self.policies)
        return next((batch for batch in found if batch is not None), None)

    def local_scores(self) -> torch.Tensor | None:
        """As `WeightPolicy.local_scores`, of the first policy that has some."""
        found = (policy.local_scores() for policy in self.policies)
        return next((scores for scores in found if scores is not None), None)

    def figures(self) -> dict[str, Any]:
        """As `WeightPolicy.figures`; where two have the same, the first policy's."""
        found: dict[str, Any] = {}
        for policy in self.policies:
            found = {**policy.figures(), **found}
        return found

    def notices(self) -> list[str]:
        """As `WeightPolicy.notices`."""
        return [line for policy in self.policies for line in policy.notices()]

    def description(self) -> dict[str, Any] | None:
        """As `WeightPolicy.description`, of all."""
        found: dict[str, Any] = {"form": "+".join(self.names)}
        for policy in self.policies:
            found.update({k: v for k, v in (policy.description() or {}).items() if k != "form"})
        return found

    def state_dict(self) -> dict[str, Any]:
        """As `WeightPolicy.state_dict`."""
        self._settle()
        states = {str(k): policy.state_dict() for k, policy in enumerate(self.policies)}
        return {"running": self.running.cpu(), "policies": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `WeightPolicy.load_state_dict`."""
        self.running = state["running"].to(self.running.device)
        for k, policy in enumerate(self.policies):
            policy.load_state_dict(state["policies"][str(k)])

    def common_state(self) -> dict[str, Any]:
        """As `WeightPolicy.common_state`."""
        return {str(k): policy.common_state() for k, policy in enumerate(self.policies)}

    def load_common_state(self, state: dict[str, Any]) -> None:
        """As `WeightPolicy.load_common_state`."""
        for k, policy in enumerate(self.policies):
            if str(k) in state:
                policy.load_common_state(state[str(k)])

    def forget_evidence(self) -> None:
        """As `WeightPolicy.forget_evidence`."""
        for policy in self.policies:
            policy.forget_evidence()

    def local_state_dict(self) -> dict[str, Any]:
        """As `WeightPolicy.local_state_dict`."""
        states = {str(k): policy.local_state_dict() for k, policy in enumerate(self.policies)}
        return {k: state for k, state in states.items() if state}

    def load_local_state_dict(self, state: dict[str, Any]) -> None:
        """As `WeightPolicy.load_local_state_dict`."""
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
    """Returns the policy of a name, or of several with `+` between them.

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
