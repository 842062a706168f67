"""The sinks of the step log, with one interface; one may fail without affecting the others.

jsonl        every line, in parts of a bounded size
tensorboard  every line's metrics
wandb        the same metrics under the same names, at the steps when the log is written
console      one line every log interval; notices at once
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable
from heapq import nlargest
from typing import Any, Protocol

from megatron_dwm.logs.console import Notices, console_line
from megatron_dwm.logs.log_file import FILE_NAME, cut_after, next_part, older_parts
from megatron_dwm.logs.names import DOMAIN_WEIGHT, LAYOUT, NOTICES, scalars_of

PART_BYTES = 256 << 20  # size limit of a file of the JSONL log
PARTS_KEPT = 16  # finished files that are kept, besides the newest one
DOMAINS_SHOWN = 32  # domains that TensorBoard and Weights & Biases get


class LogSink(Protocol):
    """Receives the lines of the step log.

    Attributes:
        name: name for notices.
    """

    name: str

    def write(self, line: dict[str, Any], iteration: int) -> None:
        """Receives a line; it may wait in memory until `flush`.

        Args:
            line: line of the step log, see `lines.describe`; must not be changed.
            iteration: the line's iteration, 1-based; higher than the last one.
        """

    def flush(self) -> None:
        """Writes lines that wait in memory."""

    def close(self) -> None:
        """Releases open resources, after a last `flush`."""


class JsonlSink:
    """One JSON line per step, in files of a bounded size.

    Args:
        folder: where `dwm_log.jsonl` and its older parts are.
        first_iteration: iterations done before this run; later lines of an older log of the same
            folder are dropped, because this run takes those steps again.
        part_bytes: size limit of a file; a longer line gets its own file.
        parts_kept: number of finished files to keep; older ones are removed.
    """

    name = FILE_NAME

    def __init__(
        self,
        folder: str,
        first_iteration: int = 0,
        part_bytes: int = PART_BYTES,
        parts_kept: int = PARTS_KEPT,
    ) -> None:
        self.part_bytes, self.parts_kept = part_bytes, parts_kept
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, FILE_NAME)
        cut_after(self.path, first_iteration)
        self._waiting: list[bytes] = []
        self._open()

    def write(self, line: dict[str, Any], iteration: int) -> None:
        """See `LogSink.write`."""
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        if self._size > 0 and self._size + len(text) > self.part_bytes:
            self.flush()
            self._rotate()
        self._waiting.append(text)
        self._size += len(text)

    def flush(self) -> None:
        """See `LogSink.flush`."""
        text = memoryview(b"".join(self._waiting))
        self._waiting.clear()
        # On a nearly full disk, fewer bytes may be written than requested.
        while text:
            text = text[self.file.write(text) :]

    def close(self) -> None:
        """See `LogSink.close`."""
        self.file.close()

    def _open(self) -> None:
        # Unbuffered, so that a failed write is not silently repeated.
        self.file: Any = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for the run
        self._size = os.path.getsize(self.path)

    def _rotate(self) -> None:
        self.file.close()
        os.rename(self.path, next_part(self.path))
        older = older_parts(self.path)
        for part in older[: max(0, len(older) - self.parts_kept)]:
            os.remove(part)
        self._open()


class DomainMeans:
    """Mean weights by domain since the last call, for the domains with most samples."""

    def __init__(self) -> None:
        self._samples: dict[str, int] = defaultdict(int)  # of this process
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, line: dict[str, Any]) -> None:
        """Includes the domains of a line of the step log."""
        for name, weight in line["domain_weight"].items():
            count = line["domain_samples"][name]
            self._samples[name] += count
            if weight is not None:
                self._sums[name] += weight * count
                self._counts[name] += count

    def take(self) -> dict[str, float]:
        """Returns domain -> mean weight, for the `DOMAINS_SHOWN` with most samples so far."""
        shown = nlargest(DOMAINS_SHOWN, self._samples, key=self._samples.__getitem__)
        seen = [name for name in shown if self._counts.get(name)]
        found = {name: self._sums[name] / self._counts[name] for name in seen}
        self._sums.clear()
        self._counts.clear()
        return found


class _Figures:
    """What TensorBoard and Weights & Biases share.

    Args:
        log_interval: steps between two sets of domain weights.
    """

    def __init__(self, log_interval: int) -> None:
        self.log_interval, self.domains = log_interval, DomainMeans()

    def scalars(self, line: dict[str, Any], iteration: int) -> dict[str, float]:
        """Returns the metrics of a line, by name."""
        found = scalars_of(line)
        self.domains.add(line)
        if iteration % self.log_interval == 0:
            means = self.domains.take()
            found |= {DOMAIN_WEIGHT + name: round(mean, 6) for name, mean in means.items()}
        return found


class TensorBoardSink:
    """Metrics as scalars, notices as text, through the writer of `--tensorboard-dir`.

    The tab "Custom Scalars" shows them side by side, see `names.LAYOUT`.

    Args:
        writer: a `SummaryWriter`; stays open.
        log_interval: steps between two sets of domain weights.
    """

    name = "TensorBoard"

    def __init__(self, writer: Any, log_interval: int) -> None:
        self.writer, self.figures = writer, _Figures(log_interval)
        writer.add_custom_scalars(LAYOUT)

    def write(self, line: dict[str, Any], iteration: int) -> None:
        """See `LogSink.write`."""
        for name, value in self.figures.scalars(line, iteration).items():
            self.writer.add_scalar(name, value, iteration)
        if line.get("notices"):
            self.writer.add_text(NOTICES, "\n\n".join(line["notices"]), iteration)

    def flush(self) -> None:
        """Nothing to do: the writer flushes in its own thread."""

    def close(self) -> None:
        """See `LogSink.close`."""
        self.writer.flush()


class WandbSink:
    """The same metrics through the writer of `--wandb-project`.

    Weights & Biases accepts no step older than the last one, and the trainer sends one after each
    training step. Metrics of lines that waited are therefore sent together, at the step of the
    newest; if several lines have the same metric, the newest counts.

    Args:
        writer: the module `wandb`, or a run; stays open.
        log_interval: steps between two sets of domain weights.
    """

    name = "Weights & Biases"

    def __init__(self, writer: Any, log_interval: int) -> None:
        self.writer, self.figures = writer, _Figures(log_interval)
        self._waiting: dict[str, Any] = {}
        self._notices: list[str] = []
        self._iteration = 0

    def write(self, line: dict[str, Any], iteration: int) -> None:
        """See `LogSink.write`."""
        self._waiting |= self.figures.scalars(line, iteration)
        self._notices += line.get("notices", [])
        self._iteration = iteration

    def flush(self) -> None:
        """See `LogSink.flush`."""
        found, self._waiting = self._waiting, {}
        if self._notices:
            found[NOTICES], self._notices = "\n\n".join(self._notices), []
        if found:
            self.writer.log(found, step=self._iteration)

    def close(self) -> None:
        """Nothing to release."""


class ConsoleSink:
    """One line every log interval, in the style of Megatron's own; notices at once.

    Args:
        printer: prints one line.
        log_interval: steps between two lines.
    """

    name = "console"

    def __init__(self, printer: Callable[[str], None], log_interval: int) -> None:
        self.printer, self.log_interval = printer, log_interval
        self.notices = Notices()

    def write(self, line: dict[str, Any], iteration: int) -> None:
        """See `LogSink.write`."""
        if iteration % self.log_interval == 0:
            self.printer(console_line(line))
        for notice in [*line.get("notices", []), *self.notices.of(line)]:
            self.printer(notice)

    def flush(self) -> None:
        """Nothing to write."""

    def close(self) -> None:
        """Nothing to release."""


class Sinks:
    """Several sinks as one. A sink that fails stops with a notice; the others and the run go on.

    Args:
        printer: prints one line.
    """

    def __init__(self, printer: Callable[[str], None]) -> None:
        self.printer = printer
        self.active: list[LogSink] = []

    def open(self, name: str, make: Callable[[], LogSink]) -> None:
        """Adds the sink that `make` returns, unless it fails."""
        try:
            self.active.append(make())
        except Exception as error:
            self._say(name, error)

    def write(self, line: dict[str, Any], iteration: int) -> None:
        """See `LogSink.write`."""
        self._each(lambda sink: sink.write(line, iteration))

    def flush(self) -> None:
        """See `LogSink.flush`."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """See `LogSink.close`."""
        self.flush()
        closing, self.active = self.active, []
        for sink in closing:
            try:
                sink.close()
            except Exception as error:
                self._say(sink.name, error)

    def _each(self, call: Callable[[LogSink], None]) -> None:
        for sink in list(self.active):
            try:
                call(sink)
            # Whatever a disk, a server or a client library does: a log must never end a training
            # run.
            except Exception as error:
                self.active.remove(sink)
                self._say(sink.name, error)
                with contextlib.suppress(Exception):  # the error has been reported
                    sink.close()

    def _say(self, name: str, error: Exception) -> None:
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())  # on one line
        with contextlib.suppress(Exception):  # the console itself may be what fails
            self.printer(
                f"DWM: WARNING: the step log is no longer written to {name}: {reason}; the "
                "training continues without it, and a resumed run tries again"
            )


def open_sinks(
    folder: str | None,
    first_iteration: int,
    tensorboard: Any,
    wandb: Any,
    log_interval: int,
    printer: Callable[[str], None],
) -> Sinks:
    """Returns the sinks of a run, for the rank that writes.

    Args:
        folder: the run's `--save` folder; None: no JSONL.
        first_iteration: iterations done before this run.
        tensorboard: the writer opened by Megatron, or None.
        wandb: the same for Weights & Biases.
        log_interval: steps between console lines.
        printer: prints one line.
    """
    sinks = Sinks(printer)
    if folder is not None:
        sinks.open(JsonlSink.name, lambda: JsonlSink(folder, first_iteration))
    sinks.open(ConsoleSink.name, lambda: ConsoleSink(printer, log_interval))
    if tensorboard is not None:
        sinks.open(TensorBoardSink.name, lambda: TensorBoardSink(tensorboard, log_interval))
    if wandb is not None:
        sinks.open(WandbSink.name, lambda: WandbSink(wandb, log_interval))
    return sinks
