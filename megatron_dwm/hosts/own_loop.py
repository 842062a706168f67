"""A host for your own training loop over Megatron-Core, without Megatron-LM's trainer.

The loop keeps its step, as a function of a forward step and a data iterator, and passes it on:

    loop = OwnLoop(DWMConfig(enabled=True), [ddp], optimizer, forward_step, meta_datasets=[meta],
                   micro_batch_size=4, seq_length=512, steps=10000)
    for _ in range(10000):
        outcome, record = loop.step(train_step, data_iterator)

where `train_step(forward_step, data_iterator)` zeroes the gradients, runs the schedule over the
step's micro-batches, steps the optimizer and returns a `StepOutcome`. `examples/own_loop.py` is a
complete example. The loop must first set up Megatron-Core's parallel state and the number of
micro-batches (`init_num_microbatches_calculator`), and the model's `TransformerConfig` must have
`finalize_model_grads_func`, with which the schedule reduces gradients: the passes over the meta set
have no other way to do it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_dwm.checkpoint import snapshots
from megatron_dwm.checkpoint import state as checkpoint
from megatron_dwm.checkpoint.stages import StageSnapshots
from megatron_dwm.config import DWMConfig, flag
from megatron_dwm.config.validation import raise_all
from megatron_dwm.core.agreement import on_each_rank
from megatron_dwm.core.further_losses import has_further_losses
from megatron_dwm.core.trainee import RunShape, StepOutcome, Trainee
from megatron_dwm.data.meta_dataset import MetaData, default_meta_batch_size, meta_batch_unit
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts import cpu
from megatron_dwm.hosts.base import assemble
from megatron_dwm.hosts.unsupported import unsupported
from megatron_dwm.logs.sinks import Sinks, open_sinks
from megatron_dwm.logs.weight_log import WeightLog
from megatron_dwm.step.record import StepRecord
from megatron_dwm.step.train_step import DWMTrainStep
from megatron_dwm.weighting_model.scorer import Scorer

__all__ = ["OwnLoop", "OwnStep", "StepOutcome"]

# `train_step(forward_step, data_iterator)`.
type OwnStep = Callable[[Any, Any], StepOutcome]


class OwnLoop:
    """Weights the steps of your own training loop; a `TrainerHost`.

    Args:
        config: settings; the fields are the flags `--dwm-*`. Policies that need no separate model
            are supported.
        model: the language model's chunks on this rank, wrapped in Megatron-Core's DDP.
        optimizer: its Megatron-Core optimizer.
        forward_step: `(data_iterator, model) -> (per-token losses [b, s], loss_func)`.
        micro_batch_size: b.
        seq_length: s.
        steps: number of steps of the whole run.
        meta_datasets: map-style data sets of the meta set, whose samples have the form of the
            loop's own; empty on ranks that read no data, or if the policy uses no meta set.
        meta_weights: sampling weight of each; None for a single one.
        groups: process groups; default: Megatron-Core's global ones.
        pipeline_schedule: a schedule as returned by `get_forward_backward_func()`, the default.
        folder: folder for `dwm_log.jsonl` and a snapshot of the weighting after each stage; or
            None.
        log_interval: steps between lines on the console; 0: none.
        domains: names of the data sets, by the loader's `dataset_id`, for the log.

    Raises:
        DWMError: settings, model or optimizer that cannot be weighted.
    """

    # How messages name it.
    where = "your own training loop"

    def __init__(
        self,
        config: DWMConfig,
        model: list[Any],
        optimizer: Any,
        forward_step: Callable[..., Any],
        *,
        micro_batch_size: int,
        seq_length: int,
        steps: int,
        meta_datasets: list[Any] | None = None,
        meta_weights: list[float] | None = None,
        groups: Any = None,
        pipeline_schedule: Callable[..., Any] | None = None,
        folder: str | None = None,
        log_interval: int = 0,
        domains: list[str] | None = None,
    ) -> None:
        self.model, self.optimizer, self.steps = model, optimizer, steps
        self.transformer_config = get_model_config(model[0])
        self.groups = groups or ProcessGroupCollection.use_mpu_process_groups()
        self.shape = RunShape(
            micro_batch_size=micro_batch_size,
            seq_length=seq_length,
            decoder_seq_length=None,
            per_token=self.transformer_config.calculate_per_token_loss,
            device=cpu.device(),
        )
        self.iteration = 0
        self._meta, self._meta_weights = list(meta_datasets or []), meta_weights
        self._schedule = pipeline_schedule or _default_schedule()
        on_each_rank(partial(raise_all, config.problems()))
        config = on_each_rank(partial(self._resolved, config.with_defaults()))
        self.weighting: DWMTrainStep = assemble(config, self)
        self.weighting.forward_step.forward_step = forward_step
        self._stages = StageSnapshots(self.weighting, self.say)
        self._folder = folder
        if config.load and config.learned and config.schedule != "frozen":
            self.say(snapshots.load_snapshot(self.weighting, config.load))
        # Opened at the first step, when it is known after which line an older log continues.
        self._open = partial(self._opened, log_interval, domains or [])
        self._log: WeightLog | None = None

    # ---------------------------------------------------------------- of every step

    def step(self, train_step: OwnStep, data_iterator: Any) -> tuple[StepOutcome, StepRecord]:
        """Takes the next training step, weighted.

        Args:
            train_step: the loop's own step; called once, with a forward step to use in place of the
                loop's and an iterator over the step's micro-batches.
            data_iterator: gives micro-batches; None on ranks without data, a list with virtual
                pipeline stages.

        Returns:
            What `train_step` returned, and what the weights were.

        Raises:
            DWMError: `train_step` did not use the forward step that it was given, or returned no
                `StepOutcome`, or too many steps were NaN or infinite.
        """
        trainee = Trainee(
            self.model, self.optimizer, self.transformer_config, self._schedule, data_iterator
        )
        self._stages.take(self.iteration)
        if self._log is None:
            self._log = self._open()

        def own_step(iterator: Any) -> StepOutcome:
            found = train_step(self.weighting.forward_step, iterator)
            self._check_outcome(found)
            return dataclasses.replace(found, own=found)

        outcome, record = self.weighting(own_step, trainee, self.iteration)
        used = len(self.weighting.influence.applied.by_micro_batch)
        if self.weighting.sees_losses and used != get_num_microbatches():
            raise DWMError(
                f"train_step has run {used} of {get_num_microbatches()} micro-batches through the "
                "forward step that it was given; use that one in place of your own",
                this_rank_only=True,
            )
        self.iteration += 1
        self._log.write(record)
        problem = self.weighting.bad_steps.problem(record.iteration)
        if problem is not None:
            self._log.flush()
            raise DWMError(problem)
        self._stages.keep(record.plan, self._folder)
        return outcome, record

    def _check_outcome(self, outcome: Any) -> None:
        if not isinstance(outcome, StepOutcome):
            raise DWMError(
                f"train_step returned {type(outcome).__name__}; it must return a StepOutcome: the "
                "losses by name, whether the optimizer skipped, and the gradient's norm",
                this_rank_only=True,
            )
        clip = getattr(getattr(self.optimizer, "config", None), "clip_grad", 0.0)
        if clip and outcome.grad_norm is None and not outcome.skipped:
            raise DWMError(
                f"train_step's StepOutcome has no grad_norm, but the optimizer clips at {clip}; "
                "give the second value that optimizer.step() returns",
                this_rank_only=True,
            )

    def close(self) -> None:
        """Writes pending log lines and closes the log."""
        if self._log is not None:
            self._log.close()

    # ---------------------------------------------------------------- checkpoints

    def sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the weighting's state for `dist_checkpointing.save`, under its own key.

        Call it on every rank; `{**your_state, **loop.sharded_state_dict()}` is one checkpoint.

        Args:
            metadata: what the model's own `sharded_state_dict` is given, if anything.
        """
        if self._log is not None:
            self._log.flush()
        return {checkpoint.KEY: checkpoint.state_for_saving(self.weighting, metadata)}

    def load(self, folder: str, iteration: int) -> None:
        """Loads the weighting from a checkpoint that was saved with its state.

        Args:
            folder: the checkpoint.
            iteration: steps that were done when it was saved.

        Raises:
            DWMError: it is not a checkpoint, or its weighting does not fit these settings.
        """
        if not dist_checkpointing.check_is_distributed_checkpoint(folder):
            raise DWMError(f"{folder} is not a checkpoint of megatron.core.dist_checkpointing")
        self.say(checkpoint.load(self.weighting, folder))
        self.iteration = iteration
        self._stages.resumed(iteration)

    # ---------------------------------------------------------------- as a TrainerHost

    def check(self, config: DWMConfig) -> None:
        """See `TrainerHost.check`."""
        problems = [f"{setting} in {self.where}: {way}" for setting, way in self.unfit(config)]
        raise_all(problems)
        if config.scores:
            problems += unsupported(config, _Settings(self.settings()))
        if config.scores and has_further_losses(self.transformer_config):
            problems.append(
                f"--mtp-num-layers in {self.where}: its losses are not weighted there; train "
                "without the extra layers, or with Megatron-LM's trainer"
            )
        if config.uses_meta_set and self.transformer_config.finalize_model_grads_func is None:
            problems.append(
                "the TransformerConfig has no finalize_model_grads_func, without which the passes "
                "over the meta set reduce no gradients; set it to "
                "megatron.core.distributed.finalize_model_grads"
            )
        raise_all(problems)

    def meta_data(self, config: DWMConfig) -> MetaData:
        """See `TrainerHost.meta_data`."""
        on_each_rank(partial(self._check_meta, config))
        assert config.meta_batch_size is not None
        return MetaData(
            datasets=self._meta,
            weights=self._meta_weights,
            batch_size=config.meta_batch_size,
            micro_batch_size=self.shape.micro_batch_size,
            dp_rank=self.groups.dp.rank(),
            dp_size=self.groups.dp.size(),
            seed=config.seed,
            reads_ahead=False,
        )

    def _check_meta(self, config: DWMConfig) -> None:
        # Tensor-parallel ranks other than the first, and inner pipeline stages, may read no data.
        outer = self.groups.pp.rank() in (0, self.groups.pp.size() - 1)
        if not self._meta and outer and self.groups.tp.rank() == 0:
            raise DWMError(
                f"policy {config.policy} learns from a meta set: give meta_datasets on every rank "
                "that reads data, or take a policy that needs none, such as linupper"
            )
        empty = [k for k, dataset in enumerate(self._meta) if not len(dataset)]
        if empty:
            raise DWMError(f"meta_datasets[{empty[0]}] has no samples; leave it out")
        weights = self._meta_weights
        if weights is not None and (len(weights) != len(self._meta) or not min(weights) > 0):
            raise DWMError(
                f"meta_weights is {weights} for {len(self._meta)} meta_datasets; give a weight "
                "above 0 for each, or none"
            )

    def scorer(self, config: DWMConfig) -> tuple[Scorer, dict[str, Any]]:
        """See `TrainerHost.scorer`: there is none, and `check` has said so."""
        raise DWMError(f"{self.where} has no separate weighting model; use the form head")

    def warm_start(self, scorer: Scorer, config: DWMConfig) -> Callable[[], None] | None:
        """See `TrainerHost.warm_start`."""
        return None

    def say(self, text: str) -> None:
        """See `TrainerHost.say`."""
        if torch.distributed.get_rank() == 0:
            print(text, flush=True)

    # ---------------------------------------------------------------- within

    def _resolved(self, config: DWMConfig) -> DWMConfig:
        """Returns the settings with the meta batch size: by default a quarter of the batch."""
        ranks_batch = self.shape.micro_batch_size * self.groups.dp.size()
        try:
            batch, count = get_current_global_batch_size(), get_num_microbatches()
        except AttributeError:
            raise DWMError(
                "the number of micro-batches is not known; call megatron.core."
                "num_microbatches_calculator.init_num_microbatches_calculator first"
            ) from None
        if batch != ranks_batch * count:
            raise DWMError(
                f"micro_batch_size is {self.shape.micro_batch_size}, on {self.groups.dp.size()} "
                f"data-parallel ranks with {count} micro-batches, but the global batch is {batch}; "
                "give the one of init_num_microbatches_calculator"
            )
        llm, sizes = self.transformer_config, (self.shape.micro_batch_size, self.groups.dp.size())
        unit = meta_batch_unit(*sizes)
        if llm.virtual_pipeline_model_parallel_size is not None:
            together = llm.microbatch_group_size_per_vp_stage
            unit = meta_batch_unit(*sizes, self.groups.pp.size(), together)
        size = config.meta_batch_size
        if size is None:
            size = default_meta_batch_size(batch, unit)
        if size % unit:
            raise DWMError(
                f"meta_batch_size is {size}; it must be a multiple of {unit}, the micro-batch size "
                "times the data-parallel size (and the pipeline's stages, if they are virtual)"
            )
        return dataclasses.replace(config, meta_batch_size=size)

    def _opened(self, interval: int, domains: list[str]) -> WeightLog:
        # A line that never comes is a line after more steps than there are.
        lines = interval or self.steps + 1
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        wanted = last and (self._folder is not None or interval)
        sinks = self.open_sinks(lines) if wanted else None
        return WeightLog(sinks, domains, lines, self.weighting.config.log_samples)

    # ---------------------------------------------------------------- for hosts built on it

    def settings(self) -> list[Any]:
        """Returns the objects that hold the run's settings, under Megatron-LM's names."""
        ddp_config = getattr(self.model[0], "ddp_config", None)
        if ddp_config is None:
            raise DWMError(
                f"model[0] is a {type(self.model[0]).__name__}; wrap the model's chunks in "
                "megatron.core.distributed.DistributedDataParallel"
            )
        return [self.transformer_config, ddp_config, getattr(self.optimizer, "config", None)]

    def open_sinks(self, interval: int) -> Sinks:
        """Opens where the log goes, on the rank that writes it.

        Args:
            interval: steps between console lines.
        """
        return open_sinks(self._folder, self.iteration, None, None, interval, print)

    def unfit(self, config: DWMConfig) -> Iterator[tuple[str, str]]:
        """Yields settings that this host does not support, and what to do."""
        if not config.enabled:
            yield "DWMConfig.enabled is False", "set it, or leave the weighting out"
        if config.sampling == "weights":
            yield (
                f"{flag('sampling')} is {config.sampling}",
                "the loop builds its own data iterators; draw by weight there",
            )
        if config.verify_meta_gradient is not None:
            yield f"{flag('verify_meta_gradient')} is given", "only Megatron-LM's trainer is probed"
        if config.meta_data_path:
            yield f"{flag('meta_data_path')} is given", "pass the data sets as meta_datasets"
        if config.document_weights:
            yield (
                f"{flag('document_weights')} is given",
                "only Megatron-LM's trainer tells which document a sample is from; leave it out",
            )
        if config.has_model:
            yield (
                f"{flag('form')} is model",
                "a separate model is built from Megatron-LM's arguments; use the form head",
            )


def _default_schedule() -> Callable[..., Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()


class _Settings:
    """The run's settings under Megatron-LM's names, from whichever object has them."""

    def __init__(self, sources: list[Any]) -> None:
        self._sources = sources

    def __getattr__(self, name: str) -> Any:
        for source in self._sources:
            if hasattr(source, name):
                return getattr(source, name)
        raise AttributeError(name)
