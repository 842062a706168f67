"""What the trainer passes to a step, and the sizes of the run that passes need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class RunShape:
    """The sizes and settings of the run that the passes need, read once by the host.

    Attributes:
        micro_batch_size: b.
        seq_length: s.
        decoder_seq_length: passed on to the schedules.
        per_token: `--calculate-per-token-loss`.
        device: where tensors live.
    """

    micro_batch_size: int
    seq_length: int
    decoder_seq_length: int | None
    per_token: bool
    device: torch.device


@dataclass
class Trainee:
    """The LLM as the trainer passes it to `train_step`.

    Attributes:
        model: DDP-wrapped chunks.
        optimizer: Megatron's optimizer.
        config: the LLM's `TransformerConfig`.
        forward_backward: the trainer's pipeline schedule.
        data_iterator: the step's data iterator(s), for their form only.
    """

    model: list[Any]
    optimizer: Any
    config: Any
    forward_backward: Callable[..., Any]
    data_iterator: Any


@dataclass
class StepOutcome:
    """The outcome of the trainer's own step.

    Attributes:
        losses: the reported losses, by name; empty on ranks that see none.
        skipped: whether the optimizer took no step, as after an overflow.
        grad_norm: gradient norm before clipping; None if there is none.
        own: what the trainer's step returned, to be passed back to the trainer.
    """

    losses: dict[str, Any]
    skipped: bool = False
    grad_norm: float | None = None
    own: Any = None


def loss_scale(trainee: Trainee) -> float:
    """Returns S of `--loss-scale`, by which schedules multiply losses before differentiating."""
    scaled = trainee.config.grad_scale_func
    return 1.0 if scaled is None else float(scaled(torch.ones(())))
