"""`attach()`: a context in which Megatron's trainer trains with the data weighting model.

Four functions are rebound: `train_step` (passes A to E), `setup_model_and_optimizer` (the DWM is
built, and loaded, right after the LLM), `generate_state_dict` (the DWM's state joins the
checkpoint) and `build_train_valid_test_data_iterators` (documents drawn by weight). Without `--dwm`
all four are the stock functions. A fifth function, which attaches the losses of multi-token
prediction, passes them on unchanged, and also to the code that weighs or measures them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from megatron_dwm.errors import DWMError
from megatron_dwm.hosts.rebind import check_version, rebound


class _Runs:
    attached = 0  # times that this process has attached; the same on every rank
    active = False


_PATIENCE = 3.0  # seconds that other ranks give rank 0 to report an error


def attach(add_arguments: bool = False) -> contextlib.AbstractContextManager[None]:
    """Attaches the data weighting model to Megatron's trainer; does nothing if nested.

    Args:
        add_arguments: also add the `--dwm-*` flags to Megatron's parser; for scripts that do
            not call `add_dwm_args` themselves.

    Raises:
        SystemExit: with code 2 after one line on standard error, for anything a user can fix.
    """
    return _attached(add_arguments, launched=False)


def attach_to_script() -> contextlib.AbstractContextManager[None]:
    """Like `attach(add_arguments=True)`, for a script that does not attach by itself.

    Checkpoints record this, for restarting the run.
    """
    return _attached(add_arguments=True, launched=True)


@contextlib.contextmanager
def _attached(add_arguments: bool, launched: bool) -> Iterator[None]:
    if _Runs.active:
        # The launcher may also start a script that attaches by itself.
        yield
        return
    _Runs.attached += 1
    try:
        check_version()
        with contextlib.ExitStack() as stack:
            _rebind_trainer(stack, add_arguments, launched)
            _Runs.active = True
            stack.callback(setattr, _Runs, "active", False)
            yield
    except DWMError as error:
        if error.this_rank_only or _mine_to_say(str(error)):
            print(f"megatron_dwm: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _mine_to_say(message: str) -> bool:
    """Returns whether this rank is the one to print a message.

    Most errors occur on all ranks, and one line is enough: rank 0's. An error that rank 0 does not
    see is printed by the first rank that does. The ranks agree through their rendezvous store.
    """
    rank = int(os.environ.get("RANK", "0"))
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return rank == 0 or os.environ.get("LOCAL_RANK") == "0"
    try:
        store = distributed.distributed_c10d._get_default_store()
        # Unique to this start: a process may run several times, and an elastic job restarts.
        start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_Runs.attached}"
        key = f"megatron_dwm/error/{start}/{hashlib.sha256(message.encode()).hexdigest()}"
        if rank > 0:
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end and not store.check([key]):
                time.sleep(0.05)
        return store.add(key, 1) == 1
    except RuntimeError:  # the process that hosts the store has ended
        return True


def _rebind_trainer(stack: contextlib.ExitStack, add_arguments: bool, launched: bool) -> None:
    from megatron.training import arguments, checkpointing, training

    from megatron_dwm.hosts.megatron_lm.mtp_losses import interposed
    from megatron_dwm.hosts.megatron_lm.session import Session

    session = Session()
    session.command["launched"] = launched
    stack.push(session.end_log)
    if add_arguments:
        stack.enter_context(
            rebound(arguments, "parse_args", ("extra_args_provider",), _parse_with_dwm_flags)
        )
    stack.enter_context(
        rebound(
            training,
            "setup_model_and_optimizer",
            ("model_type", "model_provider_func"),
            session.setup_model_and_optimizer,
        )
    )
    stack.enter_context(
        rebound(
            training,
            "train_step",
            (
                "forward_step_func",
                "data_iterator",
                "model",
                "optimizer",
                "opt_param_scheduler",
                "config",
                "forward_backward_func",
                "iteration",
            ),
            session.train_step,
        )
    )
    stack.enter_context(
        rebound(
            training,
            "build_train_valid_test_data_iterators",
            ("build_train_valid_test_datasets_provider",),
            session.build_data_iterators,
        )
    )
    stack.enter_context(
        rebound(
            checkpointing,
            "generate_state_dict",
            ("args", "model", "optimizer", "optim_sd_kwargs", "model_sd_kwargs"),
            session.generate_state_dict,
        )
    )
    stack.enter_context(interposed())


def _parse_with_dwm_flags(
    original: Any, extra_args_provider: Any = None, *args: Any, **kwargs: Any
) -> Any:
    from megatron_dwm.config.flags import add_dwm_args

    def provider(parser: Any) -> Any:
        if extra_args_provider is not None:
            parser = extra_args_provider(parser)
        return add_dwm_args(parser)

    return original(provider, *args, **kwargs)
