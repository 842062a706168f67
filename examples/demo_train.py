"""`pretrain_dwm.py`, plus the processor time of its training steps.

Wall-clock time says little on a machine that does other work at the same time. A step's processor
time is that of its rank, over all threads; waiting for other ranks, or for a processor, does not
count. Evaluation and saving are left out. Every rank prints its own:

    processor time of steps 11 to 20 on rank 0 (s): 1.234
"""

from __future__ import annotations

import sys
import time
from typing import Any

import pretrain_dwm
from megatron.training import get_args, training

from megatron_dwm.hosts.rebind import rebound


class ProcessorTime:
    """Adds up the processor time of this rank's steps, and prints it every log interval."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0

    def __call__(self, train_step: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the trainer's step, including weighting and meta step."""
        start = time.process_time()
        result = train_step(*args, **kwargs)
        self.seconds += time.process_time() - start
        self.steps += 1
        run = get_args()
        done = run.curr_iteration + 1
        if done % run.log_interval == 0:
            line = (
                f"processor time of steps {done - self.steps + 1} to {done} on rank {run.rank} "
                f"(s): {self.seconds:.3f}\n"
            )
            # Line and line end in one write, because other ranks write to the same pipe.
            sys.stdout.write(line)
            sys.stdout.flush()
            self.steps, self.seconds = 0, 0.0
        return result


def timed_pretrain(*args: Any, **kwargs: Any) -> None:
    """Megatron's `pretrain` with timed training steps, around what the weighting has rebound."""
    with rebound(training, "train_step", (), ProcessorTime()):
        stock_pretrain(*args, **kwargs)


if __name__ == "__main__":
    stock_pretrain, pretrain_dwm.pretrain = pretrain_dwm.pretrain, timed_pretrain
    pretrain_dwm.main()
