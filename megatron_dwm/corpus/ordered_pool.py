"""A pool of processes whose answers come in the order of the items."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from megatron_dwm.errors import InputError

# Items in flight per worker: enough to keep it busy, few enough to bound memory.
ITEMS_PER_WORKER = 4


@dataclass
class _Fault:
    """The text of an `InputError`; a chained exception may not be picklable."""

    message: str


_work: Callable[[Any], Any] | None = None


def _start_worker(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if _work is None:
        _work = make()


def _end_with_parent() -> None:
    # A killed parent cannot tell its workers, which would wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _answer(item: Any) -> Any:
    assert _work is not None  # _start_worker
    try:
        return _work(item)
    except InputError as error:
        return _Fault(str(error))


def _death(processes: Iterable[multiprocessing.process.BaseProcess]) -> str:
    """Returns what a dead worker died of; the pool has ended the others with SIGTERM."""
    codes = {process.exitcode for process in processes}
    code = next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), None)
    if code is None or code == -signal.SIGKILL:
        return "a worker process died, most likely for lack of memory. Set fewer --workers."
    how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    return f"a worker process died ({how}). If it does so again, halve the input to see why."


def answers_in_order[T, R](
    items: Iterable[T],
    work: Callable[[T], R],
    make: Callable[[], Callable[[T], R]],
    workers: int,
) -> Iterator[R]:
    """Works on items in parallel and gives the answers in the order of the items.

    Args:
        items: Read only as far ahead as keeps the workers busy.
        work: Called with each item, in a worker.
        make: Makes `work` again in a worker that cannot be forked; it must be picklable.
        workers: Number of processes.

    Yields:
        Answers.

    Raises:
        InputError: The first error in the order of the items, or a worker died.
    """
    global _work
    # Forked workers inherit what `work` holds, such as a tokenizer that is slow to load.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    _work = work
    strangers = set(multiprocessing.active_children())
    processes: set[multiprocessing.process.BaseProcess] = set()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (make,))
    pending: deque[Future] = deque()

    def answer() -> R:
        found = pending.popleft().result()
        if isinstance(found, _Fault):
            raise InputError(found.message)
        return found

    try:
        reading = iter(items)
        while True:
            try:
                item = next(reading)
            except StopIteration:
                break
            except InputError:
                # An error in an earlier item comes first, as it would with one worker.
                while pending:
                    yield answer()
                raise
            pending.append(pool.submit(_answer, item))
            if len(processes) < workers:
                processes.update(set(multiprocessing.active_children()) - strangers)
            if len(pending) >= workers * ITEMS_PER_WORKER:
                yield answer()
        while pending:
            yield answer()
    except BrokenProcessPool as error:
        pool.shutdown(wait=True)
        raise InputError(_death(processes)) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _work = None
