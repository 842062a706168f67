"""The command `probe`: checks the meta-gradient of a saved run at its next step.

The run is started again with its own script and flags, and loads its checkpoint through the stock
trainer. At the first training step the meta-gradient is compared with brute force, and the process
ends. Nothing is written into the run's folder: all writing is switched off before Megatron
validates the arguments.

torchrun exits with 1 whenever a rank does not exit with 0. One process needs no torchrun, and its
exit code is the command's own.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_dwm.core.ranks import stand_alone
from megatron_dwm.errors import DWMError, in_short
from megatron_dwm.files.json_files import json_text
from megatron_dwm.files.streams import output_to_stderr
from megatron_dwm.hosts.megatron_lm.probe_session import ProbeDone

STDOUT = "-"

# Arguments that make a run write, and the value that stops it. The probe takes no step that would
# reach the other intervals of the trainer.
_SILENT: dict[str, Any] = {
    "save": None,
    "save_interval": None,
    "non_persistent_save_interval": None,
    "non_persistent_global_ckpt_dir": None,
    "save_params_interval": None,
    "save_activations_interval": None,
    "save_tokens_per_expert_interval": None,
    "save_wgrads_interval": None,
    "save_dgrads_interval": None,
    "save_config_filepath": None,
    "ckpt_convert_format": None,
    "ckpt_convert_save": None,
    "logits_save_dir": None,
    "async_save": False,
    "log_progress": False,
    "tensorboard_dir": None,
    "wandb_project": "",
    "enable_one_logger": False,
    "enable_ft_package": False,
    "config_logger_dir": "",
    "moe_routing_trace_path": None,
    "profile": False,
    "use_pytorch_profiler": False,
    "record_memory_history": False,
    "result_rejected_tracker_filename": None,
}
# How a run that resumes from its own checkpoint loads it.
_RESUME: dict[str, Any] = {
    "finetune": False,
    "pretrained_checkpoint": None,
    "no_load_optim": None,
    "no_load_rng": None,
    "exit_on_missing_checkpoint": True,
    "skip_train": False,
    "exit_interval": None,
    "exit_duration_in_mins": None,
    "inprocess_restart": False,
}


@dataclass
class Request:
    """What the user asked for, paths absolute.

    Attributes:
        run: the folder that `--save` named.
        iteration: iteration of the checkpoint.
        samples: number of samples to compare.
        json: file for the results, `-` for standard output instead of the text, or None.
        script: path to use instead of the saved one, or None.
        flags: more flags, after the saved ones.
    """

    run: str
    iteration: int
    samples: int
    json: str | None
    script: str | None
    flags: list[str]

    @property
    def folder(self) -> str:
        """The checkpoint itself."""
        return os.path.join(self.run, f"iter_{self.iteration:07d}")

    @property
    def without_optimizer(self) -> bool:
        """Whether the checkpoint was saved with `--no-save-optim`."""
        from megatron.core import dist_checkpointing

        saved = dist_checkpointing.load_common_state_dict(self.folder).get("args")
        return bool(getattr(saved, "no_save_optim", False))


def probe(request: Request) -> int:
    """Compares, and prints the result.

    Returns:
        0: the correlation reaches `--dwm-verify-correlation` and the magnitude is not wrong; 1: one
        of them fails; 2: no comparison, for a reason that one line on standard error names.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        command = command_of(request)
        return _report(request, _run(request, command), first)
    except DWMError as error:
        return _failed(str(error), first or error.this_rank_only)
    except SystemExit as error:
        if error.code == 2:  # argparse or attach() said why
            return 2
        return _failed(f"the run's script ended by itself, with code {error.code}", first)
    except Exception as error:
        traceback.print_exc()
        return _failed(
            f"the run could not be loaded or stepped: {in_short(error)}",
            True,
        )


def _failed(message: str, prints: bool) -> int:
    if prints:
        print(f"megatron-dwm probe: error: {message}", file=sys.stderr, flush=True)
    return 2


# --------------------------------------------------------------------------- what to start


def command_of(request: Request) -> dict[str, Any]:
    """Returns the command to start, as `session.started_as` describes it.

    Raises:
        DWMError: the checkpoint has no DWM, or does not say how the run was started.
    """
    from megatron_dwm.checkpoint import state as checkpoint

    try:
        run = checkpoint.saved_run(request.folder)
    except Exception as error:  # a damaged or foreign checkpoint may raise anything
        raise DWMError(
            f"{request.folder} cannot be read as a torch_dist checkpoint: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    if run is None:
        raise DWMError(
            f"{request.folder} holds no weighting model; give a run with a learned --dwm"
        )
    command = run.get("command")
    if command is None:
        if request.script is None or not request.flags:
            raise DWMError(
                f"{request.folder} does not say how the run was started; give its script and "
                "flags: --script SCRIPT -- FLAGS"
            )
        command = {"args": [], "folder": os.getcwd(), "launched": False}
    script = request.script or command["script"]
    if not os.path.isfile(script):
        raise DWMError(
            f"the run's script {script} does not exist; say where it is: --script SCRIPT"
        )
    return {**command, "script": script, "args": [*command["args"], *request.flags]}


# ------------------------------------------------------------------------------------- the run


def _run(request: Request, command: dict[str, Any]) -> ProbeDone:
    """Starts the run's script; its first training step raises `ProbeDone`."""
    from megatron.training import arguments

    from megatron_dwm.hosts.megatron_lm import session
    from megatron_dwm.hosts.megatron_lm.attach import attach
    from megatron_dwm.hosts.megatron_lm.probe_session import ProbeSession
    from megatron_dwm.hosts.rebind import rebound

    stand_alone()
    if os.path.isdir(command["folder"]):
        os.chdir(command["folder"])
    script = command["script"]
    sys.argv = [script, *command["args"]]
    sys.path.insert(0, os.path.dirname(script))

    def parse_args(stock: Any, *args: Any, **kwargs: Any) -> Any:
        return _altered(stock(*args, **kwargs), request)

    with contextlib.ExitStack() as stack:
        stack.enter_context(rebound(arguments, "parse_args", (), parse_args))
        stack.enter_context(
            rebound(session, "Session", (), lambda stock: ProbeSession(request.samples))
        )
        if command["launched"]:
            stack.enter_context(attach(add_arguments=True))
        # The trainer's own output is not part of the result.
        stack.enter_context(output_to_stderr())
        try:
            runpy.run_path(script, run_name="__main__")
        except ProbeDone as done:
            return done
    raise DWMError(f"{script} ended without a training step")


def _altered(args: Any, request: Request) -> Any:
    """Returns parsed arguments that load the checkpoint and write nothing."""
    for name, value in {**_SILENT, **_RESUME}.items():
        if hasattr(args, name):
            setattr(args, name, value)
    args.load, args.ckpt_step = request.run, request.iteration
    if request.without_optimizer:
        args.no_load_optim = True
    return args


# ----------------------------------------------------------------------------------- the report


def _report(request: Request, done: ProbeDone, first: bool) -> int:
    """Prints the table on the first rank, and returns the exit code."""
    from megatron_dwm.hosts.megatron_lm.verification import drowned, passes, warnings

    found, threshold = done.found, done.config.verify_correlation
    if found is None:
        raise DWMError(
            f"the step after iteration {request.iteration} cannot be compared: the optimizer has "
            "no state of an earlier step (--no-save-optim?), or the trainer skipped the step"
        )
    passed = passes(found, threshold)
    if not first:
        return 0 if passed else 1
    figures = {
        "checkpoint": request.folder,
        "iteration": request.iteration,
        "estimator": done.config.estimator,
        **vars(found),
        "magnitude": found.magnitude,
        "threshold": threshold,
        "passed": passed,
        "drowned_in_noise": drowned(found, threshold),
    }
    if request.json == STDOUT:
        print(json_text(figures), flush=True)
        return 0 if passed else 1
    print("\n".join(_table(request, done)), flush=True)
    for words in warnings(found, threshold, done.config.estimator):
        print(words, flush=True)
    if request.json is not None:
        with open(request.json, "w") as file:
            file.write(json_text(figures))
    return 0 if passed else 1


def _table(request: Request, done: ProbeDone) -> Iterator[str]:
    found = done.found
    yield f"meta-gradient after iteration {request.iteration} of {request.run}"
    yield f"estimator {done.config.estimator}, lookahead {done.config.lookahead}"
    if done.rewound:
        yield "the run is complete: its last batch is used again"
    yield f"{'sample':>8} {'weight':>10} {'estimated':>14} {'measured':>14}"
    rows = zip(found.samples, found.weights, found.estimated, found.measured, strict=True)
    for sample, weight, estimated, measured in rows:
        yield f"{sample:8d} {weight:10.4f} {estimated:14.6e} {measured:14.6e}"
    yield (
        f"correlation {found.correlation:.4f}   magnitude {found.magnitude:.4g}   "
        f"relative error {found.relative_error:.3e}   noise of brute force {found.noise:.3e}"
    )
