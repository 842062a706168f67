"""One run of the trainer with the weighting model: what the rebound functions do."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing, get_args, print_rank_0, print_rank_last
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_dwm.checkpoint import snapshots
from megatron_dwm.checkpoint import state as checkpoint
from megatron_dwm.checkpoint.stages import StageSnapshots
from megatron_dwm.config import DWMConfig, flag
from megatron_dwm.core.agreement import on_each_rank, on_first_rank
from megatron_dwm.core.trainee import StepOutcome, Trainee
from megatron_dwm.data import weights_seen
from megatron_dwm.data.weights_seen import DocumentWeightsSeen
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts import cpu
from megatron_dwm.hosts.base import assemble
from megatron_dwm.hosts.megatron_lm.build import MegatronLM, outcome, resolve_shapes
from megatron_dwm.hosts.megatron_lm.checks import check_arguments, check_data, training_prefixes
from megatron_dwm.hosts.megatron_lm.cut_short import forget_unfinished, mend_tracker
from megatron_dwm.hosts.megatron_lm.document_numbers import DocumentNumbers
from megatron_dwm.hosts.megatron_lm.load_check import check_checkpoint
from megatron_dwm.hosts.megatron_lm.verification import Verifier, log_fields
from megatron_dwm.logs.sinks import open_sinks
from megatron_dwm.logs.weight_log import WeightLog
from megatron_dwm.step.collector import Collector
from megatron_dwm.step.train_step import DWMTrainStep

if TYPE_CHECKING:
    from megatron_dwm.hosts.megatron_lm.weighted_sampling import Sampling


class Session:
    """State of one `attach()`; inert until a run with `--dwm` sets up its model."""

    def __init__(self) -> None:
        # Recorded now, because a script may consume arguments later.
        self.command = started_as()
        self.step: DWMTrainStep | None = None
        self.log: WeightLog | None = None
        self.verifier: Verifier | None = None
        self.sampling: Sampling | None = None
        self.stages: StageSnapshots | None = None
        self.stage_sampled: int | None = None
        self.documents: DocumentNumbers | None = None
        self.kept: Collector | None = None

    def setup_model_and_optimizer(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """Checks the arguments, lets the trainer build and load, then builds and loads the DWM."""
        # One attach() may see several runs; each starts without a DWM.
        self.end_log()
        self.step, self.verifier, self.stages = None, None, None
        self.sampling, self.stage_sampled, self.documents = None, None, None
        self.kept = None
        run = get_args()
        config = DWMConfig.from_args(run)
        if not config.enabled:
            _check_no_flags(config)
            return stock(*args, **kwargs)
        config = config.with_defaults()
        # Every rank looks for the folders and modules that the flags name.
        on_each_rank(partial(check_arguments, config, run))
        if not run.mock_data:
            on_first_rank(partial(check_data, config, run))
        on_first_rank(partial(mend_tracker, run, print_rank_0))
        on_first_rank(partial(check_checkpoint, run))
        config = on_each_rank(partial(resolve_shapes, config, run))
        model, optimizer, scheduler = stock(*args, **kwargs)
        if optimizer is None:
            print_rank_0("DWM: --skip-train is set, nothing is weighted")
            return model, optimizer, scheduler
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.step = assemble(config, MegatronLM(run, model, optimizer, groups))
        self.stages = StageSnapshots(self.step, print_rank_0)
        pending = self._load(config, run)
        self.verifier = Verifier(self.step, run, print_rank_last, pending)
        domains = [os.path.basename(p) for p in training_prefixes(run)]
        self.sampling = self._sampling(config, run)
        if config.needs.documents or config.document_weights:
            self.documents = DocumentNumbers(config, training_prefixes(run))
        if config.document_weights:
            self.kept = self._document_weights(run, groups)
            self.step.collector = self.kept
        sinks = None
        if run.rank == run.world_size - 1:
            sinks = open_sinks(
                folder=run.save,
                first_iteration=run.iteration,
                tensorboard=get_tensorboard_writer(),
                wandb=get_wandb_writer(),
                log_interval=run.log_interval,
                printer=print_rank_last,
            )
        if self.sampling is not None:
            domains = self.sampling.domain_names
        self.log = WeightLog(sinks, domains, run.log_interval, config.log_samples)
        print_rank_0(self._summary(config))
        return model, optimizer, scheduler

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
        """Runs the modified step, or the stock one when no DWM is attached."""
        rest = (model, optimizer, opt_param_scheduler, config, forward_backward_func)
        if self.step is None:
            return stock(forward_step_func, data_iterator, *rest, iteration=iteration, **kwargs)
        assert self.log is not None and self.verifier is not None and self.stages is not None
        wrapped = self.step.forward_step
        wrapped.forward_step = forward_step_func
        trainee = Trainee(model, optimizer, config, forward_backward_func, data_iterator)

        def stock_step(iterator: Any) -> StepOutcome:
            return outcome(stock(wrapped, iterator, *rest, iteration=iteration, **kwargs))

        done = get_args().curr_iteration if iteration is None else iteration
        self.stages.take(done)
        self._look_for_weights(done, data_iterator)
        trainee, found = self.verifier(stock_step, trainee, opt_param_scheduler, done)
        result, record = self.step(stock_step, trainee, done)
        self.log.write(record, log_fields(found))
        problem = self.step.bad_steps.problem(record.iteration)
        if problem is not None or _may_be_last(record.iteration):
            self.log.flush()
        if problem is not None:
            raise DWMError(problem)
        self.stages.keep(record.plan, get_args().save)
        return result

    def build_data_iterators(self, stock: Any, provider: Any) -> Any:
        """Builds the data iterators: documents drawn by weight, and numbers of documents."""
        with contextlib.ExitStack() as stack:
            if self.documents is not None:
                stack.enter_context(self.documents.in_batches())
            if self.sampling is None:
                return stock(provider)
            return self.sampling.build_data_iterators(stock, provider)

    def generate_state_dict(self, stock: Any, *args: Any, **kwargs: Any) -> dict:
        """Adds the DWM's state to what the trainer saves; loading is done by `_load`."""
        state = stock(*args, **kwargs)
        loading = (kwargs.get("optim_sd_kwargs") or {}).get("is_loading", False)
        run = get_args()
        if self.log is not None and not loading:
            # A run that continues from this checkpoint continues the log from here.
            self.log.flush()
        if self.step is not None and not loading and run.ckpt_format == "torch_dist":
            metadata = (kwargs.get("model_sd_kwargs") or {}).get("metadata")
            on_first_rank(partial(forget_unfinished, run, kwargs.get("iteration")))
            self._keep_document_weights(run, kwargs.get("iteration"))
            pending = self.verifier is not None and self.verifier.pending
            state[checkpoint.KEY] = checkpoint.state_for_saving(
                self.step,
                metadata,
                with_optimizer=not run.no_save_optim,
                run={"command": self.command, "verification_pending": pending},
                sampling=None if self.sampling is None else self.sampling.state_dict(),
            )
        return state

    def end_log(self, failure: type[BaseException] | None = None, *_: Any) -> None:
        """Writes pending log lines and closes the log.

        After a failure it writes only what needs no waiting: a device in a collective that the
        other ranks have left may never finish, and the error would not be seen.

        Args:
            failure: what ended the run early, if anything.
        """
        log, self.log = self.log, None
        if log is not None:
            whole = failure is None or issubclass(failure, SystemExit)
            log.close(wait=whole or cpu.is_idle())

    def _load(self, config: DWMConfig, run: Any) -> bool:
        """Loads the DWM; returns whether a verification was still due when it was saved."""
        assert self.step is not None and self.stages is not None
        pending = False
        if run.load and run.iteration > 0 and not run.finetune:
            folder = checkpointing.get_load_checkpoint_path_by_args(run)
            print_rank_0(checkpoint.load(self.step, folder, with_optimizer=not run.no_load_optim))
            pending = (checkpoint.saved_run(folder) or {}).get("verification_pending", False)
            self.stages.resumed(run.iteration)
            if self.step.meta_steps_taken or not config.load:
                return pending
        elif run.load and run.finetune and config.learned:
            print_rank_0("DWM: --finetune starts a fresh weighting model")
        if config.load and config.learned and config.schedule != "frozen":
            print_rank_0(snapshots.load_snapshot(self.step, config.load))
        return pending

    def _sampling(self, config: DWMConfig, run: Any) -> Sampling | None:
        """Returns the weighted sampling of the run, with the history of the checkpoint."""
        state = None
        if run.load and run.iteration > 0 and not run.finetune:
            folder = checkpointing.get_load_checkpoint_path_by_args(run)
            state = checkpoint.saved_sampling(folder)
        if config.sampling != "weights":
            if state is not None:
                raise DWMError(
                    f"the run in {run.load} draws documents by weight; resume it with "
                    "--dwm-sampling weights, or start over with --finetune"
                )
            return None
        sampling = on_each_rank(_sampling_class)(config, run, print_rank_0)
        if state is not None:
            sampling.load_state_dict(state)
        elif run.iteration > 0:
            print_rank_0(
                f"DWM: NOTE: the run in {run.load} did not draw documents by weight; documents "
                "that it has read count as unseen"
            )
        return sampling

    def _document_weights(self, run: Any, groups: Any) -> Collector | None:
        """Returns the collector of document weights, with those of the checkpoint; or None.

        Ranks that see losses and read data have one; the first of them continues the saved sums.
        """
        assert self.step is not None
        reads = groups.tp.rank() == 0 and groups.cp.rank() == 0
        mine = self.step.sees_losses and reads
        kept = None
        if mine:
            seen = DocumentWeightsSeen(training_prefixes(run))
            kept = Collector(seen, groups.dp.size())

        def resume() -> None:
            if kept is not None and groups.dp.rank() == 0 and run.iteration > 0:
                if run.load and not run.finetune:
                    kept.seen.load(run.load, run.iteration)

        on_each_rank(resume)
        return kept

    def _keep_document_weights(self, run: Any, iteration: int | None) -> None:
        """Writes the document weights, before the checkpoint that they belong to is complete."""
        if self.step is None or not self.step.config.document_weights or not run.save:
            return
        kept, done = self.kept, iteration if iteration is not None else run.curr_iteration

        def write() -> None:
            if kept is not None:
                kept.settle()
                kept.seen.save(run.save, done, run.rank, kept.ranks)

        on_first_rank(partial(weights_seen.make_room, run.save, done))
        on_each_rank(write)

    def _look_for_weights(self, iteration: int, data_iterator: Any) -> None:
        """Takes over changed weight files when a stage begins."""
        assert self.step is not None
        if self.sampling is None:
            return
        stage, known = self.step.schedule.plan(iteration).stage, self.stage_sampled
        self.stage_sampled = stage
        # This process read the files of its first stage when it built the data.
        if known is not None and stage != known:
            self.sampling.at_stage(data_iterator)

    def _summary(self, config: DWMConfig) -> str:
        assert self.step is not None
        if not config.scores:
            return "DWM: policy uniform, w = 1, no weighting model"
        schedule = self.step.schedule
        config = self.step.config
        if not config.learned:
            return f"DWM: policy {config.policy}"
        form = f"init {config.init}, {config.shape()}" if config.has_model else "form head"
        parts = [
            f"DWM: policy {config.policy}, {form}, rule {config.rule}, map {config.map}, gate "
            f"{config.gate}",
            f"schedule {config.schedule}, {schedule.stages} stages, "
            f"{schedule.meta_steps()} meta steps",
        ]
        if config.trains:
            parts.append(
                f"estimator {config.estimator}, lookahead {config.lookahead}, "
                f"jacobian {config.jacobian}, meta batch {config.meta_batch_size}"
            )
        return "; ".join(parts)


def _may_be_last(iteration: int) -> bool:
    """Whether the trainer may end here, or be resumed from here: then no line may stay pending.

    Weights & Biases is closed by the trainer before it returns, and the older checkpoint formats
    do not ask every rank for its state.
    """
    run = get_args()
    intervals = (run.exit_interval, run.save_interval)
    at = any(every and iteration % every == 0 for every in intervals)
    return at or iteration >= run.train_iters


def started_as() -> dict[str, Any]:
    """Returns how this process was started: what is needed to start the same run again.

    Returns:
        `script` (absolute path), `args`, `folder` (the working directory), and `launched`: whether
        the launcher attached the DWM because the script does not do so itself (set by `attach`).
    """
    return {
        "script": os.path.abspath(sys.argv[0]),
        "args": list(sys.argv[1:]),
        "folder": os.getcwd(),
        "launched": False,
    }


def _check_no_flags(config: DWMConfig) -> None:
    """Refuses DWM settings without --dwm, which would silently train without weights."""
    given = [
        flag(spec.name)
        for spec in dataclasses.fields(config)
        if getattr(config, spec.name) != spec.default
    ]
    if given:
        raise DWMError(f"{', '.join(given)} given without --dwm; add --dwm, or remove them")


def _sampling_class() -> type[Sampling]:
    """Imports it only when needed: drawing by weight needs the C++ engine, weighting does not."""
    from megatron_dwm.hosts.megatron_lm.weighted_sampling import Sampling

    return Sampling
