"""The interface of all weight policies, and how a policy is found by its name.

A policy declares what it needs, gives each micro-batch its weights, may learn from the samples'
influence on the meta loss, and keeps its state in the checkpoint. Your own policy is a subclass
anywhere on the path, named as `--dwm-policy package.module:Class`.

The step calls a policy in this order:

    foresee(step, c)   on every rank, if influence is asked for ahead of the step
    begin(step)        on every rank, before the trainer's own step
    weights(view)      on ranks that see losses, inside the forward step of each micro-batch
    observe(step, c)   on every rank, on meta steps, once the influence is known
    end(step)          on every rank, when the step is over

The state that `weights` reads must not change between `begin` and `observe`: no weight may depend
on the order of the micro-batches, or on how they are distributed over ranks.

Shapes: b samples in a micro-batch, m micro-batches on this rank (n = m b), N samples in the global
batch, s tokens in a sample, h the language model's hidden size.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_dwm.config.policy_table import Needs, named, no_policy

if TYPE_CHECKING:
    import torch

    from megatron_dwm.config import DWMConfig
    from megatron_dwm.core.batches import StepBatches
    from megatron_dwm.core.topology import Topology


__all__ = [
    "Lesson",
    "Needs",
    "PolicyContext",
    "SampleView",
    "StepView",
    "WeightPolicy",
    "policy_class",
]


@dataclass
class PolicyContext:
    """What policies are built from.

    Attributes:
        config: all settings, defaults resolved.
        topology: which ranks hold which samples, and parts of samples.
        device: where tensors live.
        micro_batch_size: b.
        hidden_size: h.
        sequence_parallel: whether hidden states are split over tensor-parallel ranks.
        scorer: builds the separate weighting model; called by policies that have one.
        steps: number of steps of the whole training.
    """

    config: DWMConfig
    topology: Topology
    device: torch.device
    micro_batch_size: int
    hidden_size: int
    sequence_parallel: bool
    scorer: Any = None
    steps: int = 1

    @property
    def sees_losses(self) -> bool:
        """Whether this rank is in the last pipeline stage."""
        return self.topology.sees_losses


@dataclass
class StepView:
    """One training step, as a policy sees it.

    Attributes:
        iteration: 0-based.
        num_microbatches: m.
        batches: the step's micro-batches.
        domains: `[n]` data set of each local sample, -1 unknown; None on ranks without losses.
        documents: `[n]` numbers by setting (`Needs.documents`), see `SampleView`; empty on ranks
            without losses.
        learns: whether the policy may learn in this step (it is in a meta window).
        causes: what was NaN or infinite in the step, once that is known.
    """

    iteration: int
    num_microbatches: int
    batches: StepBatches
    domains: torch.Tensor | None = None
    documents: dict[str, torch.Tensor] = field(default_factory=dict)
    learns: bool = True
    causes: list[str] = field(default_factory=list)


@dataclass
class SampleView:
    """One micro-batch in its forward pass, on a rank that sees losses.

    Attributes:
        index: number of the micro-batch in the step, from 0.
        losses: `[b, s]` per-token losses, detached.
        mask: `[b, s]` float32, how much each position counts in the loss; None unless asked for
            (`Needs.losses`, `Needs.states`).
        states: `[s, b, h]` final hidden states, detached (`[s / tp, b, h]` under sequence
            parallelism); None unless asked for.
        domains: `[b]`, as in `StepView`.
        documents: `[b]` numbers by setting (`Needs.documents`): the mean, over the sample's tokens,
            of their documents' numbers; empty unless asked for.
    """

    index: int
    losses: torch.Tensor
    mask: torch.Tensor | None = None
    states: torch.Tensor | None = None
    domains: torch.Tensor | None = None
    documents: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Lesson:
    """What a policy learned from a meta step's influence.

    Attributes:
        updated: whether it learned from it.
        grad_norm: gradient norm of a weighting model that learns by gradient, before clipping; else
            NaN.
        causes: what was NaN or infinite, the same on every rank, see `bad_steps`.
    """

    updated: bool = False
    grad_norm: float = float("nan")
    causes: list[str] = field(default_factory=list)


class WeightPolicy(abc.ABC):
    """A way to weight samples.

    The mean weight is one in expectation. Subclasses are constructed from a `PolicyContext` alone.
    """

    needs = Needs()
    scorer: Any = None  # a separate weighting model, if there is one

    def __init__(self, context: PolicyContext) -> None:
        self.context = context

    def begin(self, step: StepView) -> None:  # noqa: B027 - nothing to do is the usual case
        """Prepares a weighted step. Called on every rank; collectives are allowed."""

    def foresee(  # noqa: B027 - only where `Needs.influence_ahead` asks
        self, step: StepView, influence: torch.Tensor | None
    ) -> None:
        """Receives the influence that the samples of the coming step would have at weight 1.

        Args:
            step: the step.
            influence: as for `observe`; None if it cannot be known yet.
        """

    @abc.abstractmethod
    def weights(self, view: SampleView) -> torch.Tensor:
        """Returns the weights of a micro-batch, `[b]` float32, finite and not negative."""

    def observe(self, step: StepView, influence: torch.Tensor) -> Lesson:
        """Receives the influence of the step's samples. On every rank; collectives are allowed.

        Args:
            step: the step.
            influence: `[N]` `c_i = dL_meta/dw_i` divided by the learning rate, negative where more
                weight helps, in the order (data-parallel rank, micro-batch, sample); finite. On
                ranks that see no losses, a single zero.
        """
        return Lesson()

    def end(self, step: StepView) -> list[str]:
        """Ends a weighted step. Called on every rank; collectives are allowed.

        Returns:
            What became NaN or infinite by learning here, the same on every rank.
        """
        return []

    def bad_scores(self) -> torch.Tensor | bool:
        """Returns whether a score of this rank was NaN or infinite since the last call."""
        return False

    def broken(self) -> torch.Tensor | bool:
        """Returns whether anything that the policy has learned is NaN or infinite."""
        return False

    @property
    def opening(self) -> float:
        """How far weights may move away from 1, from 0 to 1: below 1 if a gate holds them back."""
        return 1.0

    @property
    def synchronous(self) -> bool:
        """Whether `bad_scores` must be checked in every step, at the price of a wait."""
        return False

    def local_scores(self) -> torch.Tensor | None:
        """Returns the scores `[n]` of the last step's local samples; None if there are none."""
        return None

    def figures(self) -> dict[str, Any]:
        """Returns values of the last step for the log: numbers, or scalar tensors."""
        return {}

    def notices(self) -> list[str]:
        """Returns lines for the user since the last call, on ranks that see losses."""
        return []

    def description(self) -> dict[str, Any] | None:
        """Returns what must agree with a saved state, as plain values; None: there is no state."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as tensors and plain values, the same on every data-parallel rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - no state, no work
        """Loads what `state_dict` returned."""

    def common_state(self) -> dict[str, Any]:
        """Returns state that is the same on every rank, even without losses, as plain values."""
        return {}

    def load_common_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - as above
        """Loads what `common_state` returned."""

    def forget_evidence(self) -> None:  # noqa: B027 - there is none
        """Drops another run's evidence, when a policy starts from that run's state."""

    def local_state_dict(self) -> dict[str, Any]:
        """Returns state that only this rank has; lost if a run resumes on other ranks."""
        return {}

    def load_local_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - as above
        """Loads what `local_state_dict` returned on this rank."""


def policy_class(name: str) -> type[WeightPolicy]:
    """Returns the policy class of a name in `BUILT_IN`, or of a path `package.module:Class`.

    Raises:
        DWMError: there is none, or it is not a `WeightPolicy`.
    """
    found = named(name)
    if not (isinstance(found, type) and issubclass(found, WeightPolicy)):
        raise no_policy(name)
    return found
