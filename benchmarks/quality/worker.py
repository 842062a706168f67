"""One run in a process of its own: the project's trainer, timed, with its losses as JSON.

    RANK=0 ... python worker.py RESULT FIRST SAMPLES [flags of examples/pretrain_dwm.py]

One thing is changed around the trainer: every evaluation during the run reads the same FIRST
samples of the validation data, and after the last step SAMPLES of them are read as well. Time is
that of training steps alone: processor time on a CPU, the GPU's own clock on a GPU.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from megatron_dwm.hosts import cpu  # noqa: E402 - the path must be set first

cpu.install()


class Clock:
    """Seconds of each training step, by kind."""

    def __init__(self) -> None:
        self.cuda = cpu.device().type == "cuda"
        self.steps: list[tuple[str, Any]] = []

    def __call__(self, kind: str, act: Any) -> Any:
        """Runs a step and keeps its time."""
        start = self._mark()
        result = act()
        self.steps.append((kind, (start, self._mark())))
        return result

    def _mark(self) -> Any:
        if not self.cuda:
            return time.process_time()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[tuple[str, float]]:
        """Returns kind and seconds of each step so far."""
        if not self.cuda:
            return [(kind, end - start) for kind, (start, end) in self.steps]
        import torch

        torch.cuda.synchronize()
        return [(kind, a.elapsed_time(b) / 1000) for kind, (a, b) in self.steps]


def kind_of(step: Any, iteration: int) -> str:
    """Returns what a step is: stock, warm-up, plain (weighted, no meta step) or meta."""
    if step is None:
        return "stock"
    plan = step.schedule.plan(iteration)
    if not plan.weighted:
        return "warm-up"
    return "meta" if plan.meta_step else "plain"


def main(result: str, first: int, samples: int, flags: list[str]) -> None:
    """Trains, and writes what was measured."""
    from megatron.training import get_args, training

    from megatron_dwm.hosts.megatron_lm.session import Session

    clock, curve = Clock(), []
    loaders: list[Any] = []
    final: list[float] = []
    found: list[Any] = []
    attached, evaluate = Session.train_step, training.evaluate
    sizes, loader_of = (
        training.get_train_valid_test_num_samples,
        training.build_pretraining_data_loader,
    )

    def train_step(self: Any, stock: Any, *args: Any, iteration: int, **kwargs: Any) -> tuple:
        def act() -> tuple:
            return attached(self, stock, *args, iteration=iteration, **kwargs)

        return clock(kind_of(self.step, iteration), act)

    def one_evaluation() -> tuple:
        train, _, test = sizes()
        return train, samples, test

    def kept_loader(*args: Any, **kwargs: Any) -> Any:
        loaders.append(loader_of(*args, **kwargs))
        return loaders[-1]

    def evaluated(count: int, forward_step: Any, iterator: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["eval_iters"] *= count // first
        # Loaders are built in the order training, validation, test.
        return evaluate(forward_step, type(iterator)(iter(loaders[1])), *args, **kwargs)

    def same_samples(*args: Any, **kwargs: Any) -> Any:
        done = len(clock.steps)
        if not curve or curve[-1]["step"] != done:
            spent = sum(seconds for _, seconds in clock.seconds())
            found.append(evaluated(first, *args, **kwargs))
            loss = found[-1][0]["lm loss"].item()
            curve.append({"step": done, "seconds": round(spent, 4), "loss": loss})
        if done == get_args().train_iters and not final:
            found.append(evaluated(samples, *args, **kwargs))
            final.append(found[-1][0]["lm loss"].item())
        return found[-1]

    Session.train_step = train_step  # type: ignore[method-assign]
    training.evaluate = same_samples
    training.get_train_valid_test_num_samples = one_evaluation
    training.build_pretraining_data_loader = kept_loader
    script = os.path.join(ROOT, "examples", "pretrain_dwm.py")
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    with open(result, "w") as file:
        json.dump({"curve": curve, "final": final[0], "steps": clock.seconds()}, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
