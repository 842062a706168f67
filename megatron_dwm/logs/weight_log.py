"""The step log: receives each step's values and writes lines without delaying the training."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from megatron_dwm.logs.lines import describe
from megatron_dwm.logs.sinks import Sinks

if TYPE_CHECKING:
    from megatron_dwm.step.record import StepRecord

MOST_WAITING = 64  # maximum number of steps whose tensors are kept unread


class WeightLog:
    """Writes each step's weights.

    Reading a step's weights means waiting for the device, so steps are kept, with their tensors on
    the device, until something else waits anyway (a meta step, a console line), there is an urgent
    message, or many have accumulated. `flush` writes them at other times: before a checkpoint is
    saved, from which a resumed run continues the log, and after the last step.

    Args:
        sinks: where the lines go; None on ranks that write nothing.
        domains: names of the blend's data sets, in the order of the loader's `dataset_id`.
        log_interval: steps between console lines.
        samples: whether every sample's weight is written.
    """

    def __init__(
        self, sinks: Sinks | None, domains: list[str], log_interval: int, samples: bool
    ) -> None:
        self.sinks, self.domains = sinks, domains
        self.log_interval, self.samples = log_interval, samples
        self.waiting: list[tuple[StepRecord, dict[str, Any]]] = []

    def write(self, record: StepRecord, extra: dict[str, Any] | None = None) -> None:
        """Logs one step, now or slightly later.

        Args:
            record: the step.
            extra: further values for the step's line.
        """
        if self.sinks is None or not self.sinks.active or record.weights is None:
            return
        # A policy may change its tensors in place before they are read.
        figures = {k: _copy(value) for k, value in record.figures.items()}
        self.waiting.append((dataclasses.replace(record, figures=figures), extra or {}))
        if self._due(record):
            self.flush()

    def flush(self) -> None:
        """Writes the pending steps."""
        if self.sinks is None or not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        for record, extra in waiting:
            line = {**describe(record, self.domains, self.samples), **extra}
            self.sinks.write(line, record.iteration)
        self.sinks.flush()

    def close(self, wait: bool = True) -> None:
        """Ends the log.

        Args:
            wait: whether to write the pending steps, which may wait for the device; False if the
                device may never finish.
        """
        if wait:
            self.flush()
        self.waiting = []
        if self.sinks is not None:
            self.sinks.close()

    def _due(self, record: StepRecord) -> bool:
        """Whether the pending steps should be written now."""
        told = record.overhead is not None and record.overhead.notice is not None
        return (
            record.meta is not None
            or record.iteration % self.log_interval == 0
            or len(self.waiting) >= MOST_WAITING
            or bool(record.causes or record.notices)
            or told
        )


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
