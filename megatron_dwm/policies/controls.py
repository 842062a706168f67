"""Controls: policies that a result of weighting must be compared with."""

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


class Uniform(WeightPolicy):
    """Every weight is 1, through the same weighted loss: bit-identical to the stock trainer."""

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`."""
        return torch.ones(view.losses.size(0), device=view.losses.device)


class Shuffled(WeightPolicy):
    """The learned policy's weights on other samples: its histogram, but no information.

    The learned policy keeps learning, from the scores of the right samples. Which exchanges are
    possible depends on when its weights are known: with a policy that weighs the whole batch at
    once, any; with one that weighs inside the forward step, a sample gets the weight of another
    sample of the previous step (in the first step: 1).

    Args:
        context: what it is built from; `--dwm-form` names the learned policy.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.inner = policy_class(context.config.form)(context)
        self.needs, self.scorer = self.inner.needs, self.inner.scorer
        self._step = StepView(0, 1, None)  # type: ignore[arg-type]
        self._last: torch.Tensor | None = None
        self._now: dict[int, torch.Tensor] = {}

    def begin(self, step: StepView) -> None:
        """See `WeightPolicy.begin`."""
        self._step = step
        self._now.clear()
        self.inner.begin(step)
        if self.context.sees_losses:
            self._order = self._shuffle(step)

    def weights(self, view: SampleView) -> torch.Tensor:
        """See `WeightPolicy.weights`."""
        b = self.context.micro_batch_size
        self._now[view.index] = self.inner.weights(view)
        whole = getattr(self.inner, "batch_of_step", None)
        source = whole if whole is not None else self._last
        if source is None or source.numel() != self._order.numel():
            return torch.ones_like(self._now[view.index])
        mine = self.context.topology.own_samples(source[self._order])
        return mine[view.index * b : (view.index + 1) * b]

    def observe(self, step: StepView, influence: torch.Tensor) -> Lesson:
        """See `WeightPolicy.observe`."""
        return self.inner.observe(step, influence)

    def end(self, step: StepView) -> list[str]:
        """Keeps the step's own weights for the next step."""
        causes = self.inner.end(step)
        if self.context.sees_losses and self._now:
            mine = torch.cat([self._now[k] for k in sorted(self._now)])
            self._last = self.context.topology.gather_samples(mine)
        return causes

    @property
    def batch(self) -> Any:
        """What the guards did to the learned weights."""
        return getattr(self.inner, "batch", None)

    def local_scores(self) -> torch.Tensor | None:
        """See `WeightPolicy.local_scores`."""
        return self.inner.local_scores()

    def broken(self) -> torch.Tensor | bool:
        """See `WeightPolicy.broken`."""
        return self.inner.broken()

    def bad_scores(self) -> torch.Tensor | bool:
        """See `WeightPolicy.bad_scores`."""
        return self.inner.bad_scores()

    @property
    def opening(self) -> float:
        """See `WeightPolicy.opening`."""
        return self.inner.opening

    @property
    def synchronous(self) -> bool:
        """See `WeightPolicy.synchronous`."""
        return self.inner.synchronous

    def figures(self) -> dict[str, Any]:
        """See `WeightPolicy.figures`."""
        return self.inner.figures()

    def notices(self) -> list[str]:
        """See `WeightPolicy.notices`."""
        return self.inner.notices()

    def description(self) -> dict[str, Any] | None:
        """See `WeightPolicy.description`."""
        return self.inner.description()

    def state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.state_dict`."""
        last = None if self._last is None else self._last.cpu()
        return {**self.inner.state_dict(), "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_state_dict`."""
        self.inner.load_state_dict(state)
        # Missing in a state that the learned policy itself has saved.
        last = state.get("last")
        self._last = None if last is None else last.to(self.context.device)

    def common_state(self) -> dict[str, Any]:
        """See `WeightPolicy.common_state`."""
        return self.inner.common_state()

    def load_common_state(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_common_state`."""
        self.inner.load_common_state(state)

    def forget_evidence(self) -> None:
        """See `WeightPolicy.forget_evidence`."""
        self.inner.forget_evidence()

    def local_state_dict(self) -> dict[str, Any]:
        """See `WeightPolicy.local_state_dict`."""
        return self.inner.local_state_dict()

    def load_local_state_dict(self, state: dict[str, Any]) -> None:
        """See `WeightPolicy.load_local_state_dict`."""
        self.inner.load_local_state_dict(state)

    def _shuffle(self, step: StepView) -> torch.Tensor:
        """Returns an order of the global batch, the same on every rank, different in every step."""
        count = step.num_microbatches * self.context.micro_batch_size
        count *= self.context.topology.replicas
        seed = self.context.config.seed * 1_000_003 + step.iteration
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order.to(self.context.device)
