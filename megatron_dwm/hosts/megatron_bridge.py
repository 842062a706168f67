"""Megatron-Bridge's trainer as a host: weighting for its `pretrain`, by a callback.

    with weighted(DWMConfig(enabled=True, meta_data_path=["meta_text_document"])) as weighting:
        pretrain(config, forward_step, callbacks=[weighting])

Its callbacks begin and end the weighting (`on_train_start`, `on_train_end`). They hand over no data
iterator and cannot run anything around a step, and `on_checkpoint_save` comes when the files are
written. So two functions are rebound while `weighted()` is active, with their signatures checked,
and restored after it: `train_step`, and `generate_state_dict`, by which the weighting's state joins
the checkpoint. Validation takes the forward step as it was given, so it is not weighted.

Megatron-Bridge is imported by `weighted()` only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

from megatron_dwm.config import DWMConfig, flag
from megatron_dwm.config.validation import raise_all
from megatron_dwm.core.agreement import on_each_rank
from megatron_dwm.data.index import DatasetError, read_index
from megatron_dwm.errors import DWMError
from megatron_dwm.hosts.blend import blend_of
from megatron_dwm.hosts.own_loop import OwnLoop, StepOutcome
from megatron_dwm.hosts.rebind import check_version, rebound
from megatron_dwm.logs.sinks import Sinks, open_sinks

__all__ = ["weighted"]

SUPPORTED = ((0, 6), (0, 7))
_RANGE = "megatron-bridge>=0.6,<0.7"
TRAIN_STEP = (
    "forward_step_func",
    "data_iterator",
    "model",
    "optimizer",
    "scheduler",
    "global_state",
    "pg_collection",
    "forward_backward_func",
    "p2p_communicator",
)
STATE_DICT = ("ckpt_cfg", "model", "optimizer", "optim_sd_kwargs", "model_sd_kwargs")
EVENTS = ("on_train_start", "on_train_end")
_MOCK_META_SAMPLES = 4096


@contextlib.contextmanager
def weighted(config: DWMConfig, meta_datasets: list[Any] | None = None) -> Iterator[Any]:
    """Within it, Megatron-Bridge's `pretrain` weighs its steps.

    Args:
        config: settings; the fields are the flags `--dwm-*`. Of the policies those that need no
            separate model.
        meta_datasets: map-style data sets of the meta set, on every rank, whose samples are what
            the training data's are; default: `config.meta_data_path`, read as Megatron-Bridge reads
            its own indexed data, and mock data where the run trains on mock data.

    Yields:
        The callback to hand to `pretrain`, by itself or in a `CallbackManager`.

    Raises:
        DWMError: Megatron-Bridge is missing or not one that is supported; later, within `pretrain`:
            the callback was not handed over, or the run cannot be weighted.
    """
    check_version()
    callbacks, train, checkpointing = _imported()
    kind: Any = type("Weighting", (_Session, callbacks.Callback), {})
    session = kind(config, meta_datasets, checkpointing)
    with contextlib.ExitStack() as stack:
        stack.callback(session.close)
        stack.enter_context(rebound(train, "train_step", TRAIN_STEP, session.train_step))
        stack.enter_context(
            rebound(checkpointing, "generate_state_dict", STATE_DICT, session.generate_state_dict)
        )
        yield session


def _imported() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Returns the modules of Megatron-Bridge that hold callbacks, the step and checkpoints.

    Raises:
        DWMError: it is missing or cannot be imported, or is not one that is supported.
    """
    try:
        version = importlib.import_module("megatron.bridge.package_info").__version__
    except ImportError as error:
        raise DWMError(
            f"Megatron-Bridge cannot be imported ({error}); install {_RANGE}, by which this was "
            "tested, or put a checkout's src/ on PYTHONPATH"
        ) from error
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise DWMError(f"Megatron-Bridge {version} was found; megatron_dwm supports {_RANGE}")
    names = ("callbacks", "train", "checkpointing")
    try:
        found = [importlib.import_module(f"megatron.bridge.training.{name}") for name in names]
    except ImportError as error:
        raise DWMError(
            f"Megatron-Bridge {version} was found, but its trainer cannot be imported: {error}; "
            "install what it depends on"
        ) from error
    callbacks, train, checkpointing = found
    missing = [name for name in EVENTS if name not in callbacks.VALID_EVENTS]
    if missing:
        raise DWMError(
            f"Megatron-Bridge {version} has no callback {' and no '.join(missing)}; megatron_dwm "
            f"supports {_RANGE}"
        )
    return callbacks, train, checkpointing


class _Session:
    """One `weighted()`: the callback, and what the rebound functions do."""

    def __init__(
        self, config: DWMConfig, meta_datasets: list[Any] | None, checkpointing: Any
    ) -> None:
        self.config, self.meta_datasets = config, meta_datasets
        self.checkpointing = checkpointing
        self.loop: BridgeLoop | None = None

    def on_train_start(self, context: Any) -> None:
        """Builds the weighting, and loads it where the trainer has loaded a checkpoint."""
        self.close()
        self.loop = BridgeLoop(self.config, context, self.meta_datasets)
        step, settings = context.state.train_state.step, context.state.cfg.checkpoint
        if step and settings.load and not settings.finetune:
            self.loop.load(self._folder(settings.load, step), step)
        self.loop.iteration = step

    def on_train_end(self, context: Any) -> None:
        """Writes what waits for the log."""
        self.close()

    def close(self) -> None:
        """Ends the weighting of a run, if there is one."""
        loop, self.loop = self.loop, None
        if loop is not None:
            loop.close()

    def train_step(
        self,
        stock: Any,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        global_state: Any,
        pg_collection: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        """Runs the modified step around the trainer's own."""
        if self.loop is None:
            raise DWMError(
                "weighted() is active, but pretrain was not given its callback: "
                "with weighted(...) as weighting: pretrain(..., callbacks=[weighting])"
            )
        self.loop.weighting.forward_step.forward_step = forward_step_func
        rest = (model, optimizer, scheduler, global_state, pg_collection, *args)
        results: list[tuple] = []

        def own_step(forward_step: Any, iterator: Any) -> StepOutcome:
            results.append(stock(forward_step, iterator, *rest, **kwargs))
            losses, skipped, _, _, _, grad_norm, *_ = results[-1]
            return StepOutcome(losses, bool(skipped), grad_norm)

        self.loop.step(own_step, data_iterator)
        return results[-1]

    def generate_state_dict(self, stock: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adds the weighting's state to what the trainer saves; loading is done by itself."""
        state = stock(*args, **kwargs)
        loading = (kwargs.get("optim_sd_kwargs") or {}).get("is_loading", False)
        if self.loop is not None and not loading:
            metadata = (kwargs.get("model_sd_kwargs") or {}).get("metadata")
            state.update(self.loop.sharded_state_dict(metadata))
        return state

    def _folder(self, load: str, step: int) -> str:
        """Returns the folder of the checkpoint that was loaded."""
        inner = self.checkpointing.get_checkpoint_name(load, step, release=False)
        whole = dist_checkpointing.check_is_distributed_checkpoint
        return load if whole(load) and not whole(inner) else inner


class BridgeLoop(OwnLoop):
    """The steps of Megatron-Bridge's trainer; a `TrainerHost`.

    Args:
        config: settings.
        context: what its callbacks get (`CallbackContext`), at the start of training.
        meta_datasets: as for `weighted`.

    Raises:
        DWMError: settings, model or optimizer that cannot be weighted.
    """

    where = "Megatron-Bridge's trainer"

    def __init__(
        self, config: DWMConfig, context: Any, meta_datasets: list[Any] | None = None
    ) -> None:
        state = context.state
        self.run, self.trackers = state.cfg, (state.tensorboard_logger, state.wandb_logger)
        on_each_rank(functools.partial(raise_all, self._run_problems(config)))
        weights = None
        if meta_datasets is None and config.uses_meta_set:
            meta_datasets, weights = on_each_rank(functools.partial(self._meta_of, config))
        super().__init__(
            config,
            context.model,
            context.optimizer,
            _not_set,
            micro_batch_size=self.run.train.micro_batch_size,
            seq_length=self.run.model.seq_length,
            steps=self.run.train.train_iters,
            meta_datasets=meta_datasets,
            meta_weights=weights,
            folder=self.run.checkpoint.save,
            log_interval=self.run.logger.log_interval,
        )

    def settings(self) -> list[Any]:
        """As `OwnLoop.settings`."""
        return [*super().settings(), self.run.dist, self.run.checkpoint]

    def unfit(self, config: DWMConfig) -> Iterator[tuple[str, str]]:
        """As `OwnLoop.unfit`; data sets are named by their paths here."""
        for setting, way in super().unfit(config):
            if not setting.startswith(flag("meta_data_path")):
                yield setting, way

    def open_sinks(self, interval: int) -> Sinks:
        """As `OwnLoop.open_sinks`; the trainer's own TensorBoard and Weights & Biases too."""
        return open_sinks(self._folder, self.iteration, *self.trackers, interval, print)

    def _run_problems(self, config: DWMConfig) -> list[str]:
        """Returns a line for each of the trainer's settings under which steps are not weighted."""
        run = self.run
        refused = {
            "dist.use_decentralized_pg": (
                run.dist.use_decentralized_pg,
                "extra passes use Megatron-Core's global process groups; leave it out",
            ),
            "model.virtual_pipeline_model_parallel_size": (
                run.model.virtual_pipeline_model_parallel_size,
                "virtual stages share one data iterator there; use 1 stage a rank",
            ),
            "dataset.dataloader_type batch": (
                run.dataset.dataloader_type == "batch",
                "it gives whole batches, not micro-batches; use single or cyclic",
            ),
            "peft": (run.peft, "frozen parameters were not tried; train all of them"),
            "checkpoint.ckpt_format": (
                run.checkpoint.save and run.checkpoint.ckpt_format != "torch_dist",
                "it cannot hold the weighting's state; use torch_dist",
            ),
        }
        found = [
            f"{name} in {self.where} is not supported with weighting: {way}"
            for name, (given, way) in refused.items()
            if given
        ]
        return [*config.problems(), *found]

    def _meta_of(self, config: DWMConfig) -> tuple[list[Any], list[float] | None]:
        """Returns the data sets of `meta_data_path` and their weights, or a mock one."""
        data = self.run.dataset
        if not isinstance(data, GPTDatasetConfig):
            raise DWMError(
                f"the run's dataset is a {type(data).__name__}, of which no meta set is built; "
                "give weighted() meta_datasets"
            )
        prefixes, weights = blend_of(config.meta_data_path, flag("meta_data_path"))
        if not prefixes and not data.mock:
            raise DWMError(
                f"policy {config.policy} learns from a meta set: give meta_data_path in the "
                "DWMConfig, or weighted() meta_datasets, or take a policy that needs none, such as "
                "linupper"
            )
        for prefix in prefixes:
            try:
                read_index(prefix)
            except DatasetError as error:
                raise DWMError(f"{flag('meta_data_path')}: {error}") from None
        wanted: list[str | None] = [*prefixes] or [None]
        sets = [_dataset(data, config.seed, prefix) for prefix in wanted]
        return sets, weights if len(prefixes) > 1 else None


def _dataset(data: Any, seed: int, prefix: str | None) -> Any:
    """Builds one pass over a data set, or a mock one, with the settings of the run's own data."""
    config = GPTDatasetConfig(
        random_seed=seed + (data.random_seed if prefix is None else 0),
        sequence_length=data.sequence_length,
        blend=None if prefix is None else ([prefix], None),
        split="1,0,0",
        tokenizer=data.tokenizer,
        path_to_cache=data.path_to_cache,
        mmap_bin_files=data.mmap_bin_files,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.create_attention_mask,
        allow_ambiguous_pad_tokens=data.allow_ambiguous_pad_tokens,
    )
    kind = MockGPTDataset if prefix is None else GPTDataset
    sizes = [_MOCK_META_SAMPLES if prefix is None else None, None, None]
    # On every rank, as Megatron-Bridge builds its own.
    return BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()[0]


def _not_set(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the trainer's forward step is set before the first step")
