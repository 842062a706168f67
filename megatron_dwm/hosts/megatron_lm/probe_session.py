"""A session that compares at the first training step and ends the script there."""

from __future__ import annotations

from typing import Any

from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args

from megatron_dwm.core.trainee import StepOutcome, Trainee
from megatron_dwm.core.trainer_state import refusal as step_refusal
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts.megatron_lm.build import outcome
from megatron_dwm.hosts.megatron_lm.session import Session
from megatron_dwm.hosts.megatron_lm.verification import probed_step
from megatron_dwm.step import probe


class ProbeDone(BaseException):
    """Ends the script at its first training step; carries the comparison, None if there is none.

    Not an `Exception`, so that a script that catches those ends too.
    """

    def __init__(self, found: Any, config: Any, iteration: int, rewound: bool) -> None:
        super().__init__()
        self.found, self.config = found, config
        self.iteration, self.rewound = iteration, rewound


class ProbeSession(Session):
    """Takes the place of `Session` in the probe command.

    Args:
        samples: number of samples to compare.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, self.rewound = samples, False

    def setup_model_and_optimizer(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads like a resumed run; a complete run is set back by one batch of data.

        A larger `--train-iters` is not an option: it would change the data order, the learning rate
        and the stages.
        """
        found = super().setup_model_and_optimizer(stock, *args, **kwargs)
        run = get_args()
        if self.step is None or self.step.meta_data is None:
            raise DWMError(
                "this run takes no meta steps (--dwm-policy uniform, --dwm-schedule frozen or no "
                "--dwm), so that there is no meta-gradient to compare"
            )
        reason = step_refusal(found[1])
        if reason is not None:
            raise DWMError(f"the probe takes steps and undoes them: {reason}")
        if run.iteration >= run.train_iters:
            self.rewound = True
            run.iteration = run.train_iters - 1
            batch = get_current_global_batch_size()
            run.consumed_train_samples -= batch
            # The learning rate of that step, too: a complete run may end at 0.
            scheduler = found[2]
            scheduler.num_steps = max(0, scheduler.num_steps - batch)
            scheduler.step(increment=0)
        return found

    def train_step(
        self,
        stock: Any,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Any,
        iteration: int | None = None,
        **kwargs: Any,
    ) -> tuple:
        """Compares at the first step and ends the script there."""
        assert self.step is not None
        rest = (model, optimizer, opt_param_scheduler, config, forward_backward_func)
        wrapped = self.step.forward_step
        wrapped.forward_step = forward_step_func
        trainee = Trainee(model, optimizer, config, forward_backward_func, data_iterator)
        done = get_args().curr_iteration if iteration is None else iteration

        def stock_step(iterator: Any) -> StepOutcome:
            return outcome(stock(wrapped, iterator, *rest, iteration=iteration, **kwargs))

        _, probed = probed_step(self.step, stock_step, trainee, opt_param_scheduler, done)
        found = probe.verify(probed, self.samples) if probed.ready() else None
        raise ProbeDone(found, self.step.config, done, self.rewound)
