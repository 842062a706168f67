"""Plans a run of Megatron-LM's trainer from its flags, without building it or starting ranks."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer, vocab_size_with_padding
from megatron.training.arguments import parse_args, validate_args

from megatron_dwm.config.flags import add_dwm_args
from megatron_dwm.config.schema import DWMConfig
from megatron_dwm.config.validation import raise_all
from megatron_dwm.errors import DWMError, in_short
from megatron_dwm.hosts.megatron_lm.build import resolve_shapes
from megatron_dwm.hosts.megatron_lm.checks import argument_problems, final_batch
from megatron_dwm.hosts.megatron_lm.planned_model import (
    language_model,
    layout_of,
    weighting_model,
)
from megatron_dwm.meta_gradient.estimators import check_ahead, choose_lookahead, decide
from megatron_dwm.meta_gradient.ghost import experts
from megatron_dwm.meta_gradient.ghost.attention import DROPS_ATTENTION
from megatron_dwm.meta_gradient.ghost.layer_rules import is_known_by_name
from megatron_dwm.meta_gradient.ghost.recording import in_experts, not_covered
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import needs_gradient, refused_settings
from megatron_dwm.planning.model import (
    DIFFERENCE,
    GHOST_CURRENT,
    GHOST_NEXT,
    Batch,
    Matrix,
    Method,
    Model,
    Norm,
    Precision,
    Run,
    Weighting,
)
from megatron_dwm.planning.plan import plan_of
from megatron_dwm.policies.head import LIMIT
from megatron_dwm.step.plan import Schedule

# Some flags are allowed only on recent GPUs; the run is assumed to have them.
_HOPPER = (9, 0)


@dataclass
class Planned:
    """What the flags amount to.

    Attributes:
        run: the run, as the formulas take it.
        methods: possible ways to compute influence, the run's own first; empty: no meta steps.
        reason: why the run uses the first one.
        refused: the error lines with which the run would end; empty: it would start.
        left: flags that are known neither to Megatron nor to the weighting.
    """

    run: Run
    methods: list[Method]
    reason: str
    refused: list[str]
    left: list[str]

    def plan(self) -> dict[str, Any]:
        """Returns the whole plan as plain values."""
        return {
            **plan_of(self.run, self.methods),
            "chosen": self.reason,
            "refused": self.refused,
            "left_to_the_script": self.left,
        }


def planned(words: list[str], world_size: int) -> Planned:
    """Reads the flags of a run.

    Call `cpu.install()` before importing this module.

    Args:
        words: the script's flags.
        world_size: ranks of the run.

    Raises:
        DWMError: flags that Megatron refuses, settings that cannot work, or a model that cannot be
            planned.
    """
    with _started_as(words, world_size):
        return _planned(words)


def _planned(words: list[str]) -> Planned:
    args, left = _arguments(words)
    config = DWMConfig.from_args(args)
    if not config.enabled:
        raise DWMError("--dwm is missing, and without it the run is stock training; add --dwm")
    config = config.with_defaults()
    raise_all(config.problems())
    refused = argument_problems(config, args)
    vocabulary = _vocabulary(args)
    model = language_model(args, vocabulary)
    config = resolve_shapes(config, args)
    methods, reason, more = _methods(config, args, model)
    run = Run(
        model=model,
        layout=layout_of(args),
        batch=Batch(args.micro_batch_size, args.seq_length, final_batch(args), _meta_batch(config)),
        precision=_precision(args),
        weighting=_weighting(config, args, model, vocabulary),
        per_token=args.calculate_per_token_loss,
        mask_in_batches=args.create_attention_mask_in_dataloader,
        notes=tuple(_notes(config, args)),
    )
    return Planned(run, methods, reason, [*refused, *more], left)


# ------------------------------------------------------------------------------------ arguments


@contextlib.contextmanager
def _started_as(words: list[str], world_size: int) -> Iterator[None]:
    """Makes this process look like rank 0 of the run, on a GPU, to Megatron's parser."""
    given, before = sys.argv, dict(os.environ)
    capability = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_: _HOPPER  # type: ignore[assignment]
    logging.disable(logging.WARNING)
    sys.argv = ["plan", *words]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.cuda.get_device_capability = capability
        sys.argv = given
        os.environ.clear()
        os.environ.update(before)


def _arguments(words: list[str]) -> tuple[Any, list[str]]:
    """Returns Megatron's parsed and validated arguments, and the unknown flags.

    Raises:
        DWMError: with Megatron's own message.
    """
    parsers: list[Any] = []

    def provider(parser: Any) -> Any:
        parsers.append(add_dwm_args(parser))
        return parsers[-1]

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            args = parse_args(provider, ignore_unknown_args=True)
            left = [w for w in parsers[-1].parse_known_args(words)[1] if w.startswith("--")]
            unknown = [word for word in left if word.startswith("--dwm")]
            if unknown:
                raise DWMError(f"{unknown[0]}: no such flag; megatron-dwm train --help lists them")
            validate_args(args)
            # The trainer's own check, once the ranks have started.
            ConstantNumMicroBatchesCalculator(
                final_batch(args),
                args.micro_batch_size,
                args.data_parallel_size,
                args.decrease_batch_size_if_needed,
                rank=1,
            )
    except DWMError:
        raise
    except (Exception, SystemExit) as error:
        said = printed.getvalue().strip().splitlines()
        if isinstance(error, SystemExit) and said:
            reason = said[-1].split("error: ")[-1]
        elif isinstance(error, AssertionError):
            asserted = traceback.extract_tb(error.__traceback__)[-1].line
            reason = " ".join(str(error).split()) or str(asserted)
        else:
            reason = in_short(error)
        raise DWMError(f"Megatron refuses the flags: {reason}") from None
    return args, left


def _vocabulary(args: Any) -> int:
    """Returns the rows of the word embedding, as the trainer pads them.

    Raises:
        DWMError: the number of rows cannot be determined.
    """
    if args.padded_vocab_size:
        return int(args.padded_vocab_size)
    file = args.tokenizer_model or args.vocab_file
    null = (args.tokenizer_type or "").startswith("Null")
    if args.vocab_size and not null:
        return int(vocab_size_with_padding(args.vocab_size, args, logging_enabled=False))
    if null or (file and os.path.exists(file)):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                build_tokenizer(args)
        except Exception as error:
            raise DWMError(
                f"--tokenizer-type {args.tokenizer_type}: it cannot be built here "
                f"({in_short(error)}); give --padded-vocab-size N"
            ) from None
        return int(args.padded_vocab_size)
    found = f"--tokenizer-type {args.tokenizer_type}"
    if file:
        found = f"{'--tokenizer-model' if args.tokenizer_model else '--vocab-file'} {file}"
    raise DWMError(
        f"{found}: there is no such file here to count its vocabulary; give --padded-vocab-size N, "
        "or --vocab-size N"
    )


# ------------------------------------------------------------------------------------ what costs


def _meta_batch(config: DWMConfig) -> int:
    return config.meta_batch_size or 0


def _precision(args: Any) -> Precision:
    half = bool(args.bf16 or args.fp16)
    return Precision(
        parameter=2 if half else 4,
        gradient=4 if not half or args.accumulate_allreduce_grads_in_fp32 else 2,
        distributed=bool(args.use_distributed_optimizer),
        overlap_gather=bool(args.overlap_param_gather),
    )


def _weighting(config: DWMConfig, args: Any, model: Model, vocabulary: int) -> Weighting:
    steps = _steps(args)
    interval = config.meta_interval or 1
    share = 1 / interval if config.trains else 0.0
    if steps and config.trains:
        share = Schedule(config, steps).meta_steps() / steps
    taught = config.has_model and config.rule == "regression" and config.teacher == "head"
    taught = taught and config.trains
    head = 2 * args.hidden_size + 2 if taught or "head" in config.policies.split("+") else 0
    if config.learned and config.form == "head":
        head = 2 * args.hidden_size + 2
    dwm = None
    if config.has_model:
        dwm = weighting_model(config, args, model, vocabulary)
    regression = config.rule == "regression"
    return Weighting(
        weighs=config.scores,
        ahead=config.needs.influence_ahead,
        exact=config.jacobian == "exact",
        keeps_gradient=needs_gradient(args.optimizer) or args.clip_grad > 0,
        head=head,
        regression=min(head, LIMIT),
        dwm=dwm,
        updates=0 if dwm is None else 1 + regression * config.replay_steps,
        scorings=0 if dwm is None else regression * config.replay_steps,
        taught=taught,
        whole_batch=config.has_model and config.map == "softmax",
        share=share,
        interval=interval,
    )


def _steps(args: Any) -> int | None:
    if args.train_iters:
        return int(args.train_iters)
    if args.train_samples:
        return int(args.train_samples) // final_batch(args)
    return None


# ------------------------------------------------------------------------------------ estimators


def _methods(config: DWMConfig, args: Any, model: Model) -> tuple[list[Method], str, list[str]]:
    """Returns the ways to compute influence, why the first is used, and the run's refusals.

    The run's own method comes first; with `auto`, the other estimator follows.
    """
    if not config.uses_meta_set:
        return [], "no meta steps", []
    refused = []
    problem = refused_settings(args, config.jacobian)
    if problem is not None:
        refused.append(problem)
    uncovered = uncovered_parameters(args, model)
    try:
        estimator, reason = decide(config, uncovered, args)
        own = Method(estimator, choose_lookahead(config, estimator, args))
        check_ahead(config, estimator, reason)
    except DWMError as error:
        asked = GHOST_CURRENT if config.lookahead in ("current", "auto") else GHOST_NEXT
        return [asked, DIFFERENCE], "refused", [*refused, str(error)]
    if config.estimator != "auto" or not config.trains:
        return [own] if config.trains else [], reason, refused
    if estimator == "ghost":
        return [own, DIFFERENCE], reason, refused
    other = GHOST_NEXT if config.lookahead == "next" else GHOST_CURRENT
    return [own, other], reason, refused


def uncovered_parameters(args: Any, model: Model) -> list[str]:
    """Returns what `ghost.recording.uncovered_parameters` would find, over all ranks.

    Args:
        args: Megatron's.
        model: the language model.
    """
    against = _against_experts(args) if args.num_experts else None
    against = against and in_experts(against)
    drops = args.softmax_type == "learnable" and args.attention_dropout > 0
    attention = "DotProductAttention"
    if args.transformer_impl != "local":
        attention = f"TE{attention}"
    found = []
    for stage in model.stages:
        for number, layer in enumerate(stage.layers):
            if drops:
                name = f"decoder.layers.{number}.self_attention.core_attention.softmax_offset"
                found.append(not_covered(name, attention, f"of a {attention}: {DROPS_ATTENTION}"))
            parts: list[Matrix | Norm] = [*layer.norms, *layer.matrices]
            for part in parts:
                why = against if layer.routed and part.name.startswith("mlp.") else None
                if why is not None or not is_known_by_name(part.layer):
                    name = f"decoder.layers.{number}.{part.name}.weight"
                    found.append(not_covered(name, part.layer, why))
    return found


def _against_experts(args: Any) -> str | None:
    """Returns why an MoE layer's expert rows cannot be mapped to samples, as in `ghost.experts`."""
    grouped = args.moe_grouped_gemm and args.transformer_impl != "local"
    if grouped and args.use_transformer_engine_op_fuser:
        return "--use-transformer-engine-op-fuser"
    layout = layout_of(args)
    spread = experts.Spread(layout.tp, layout.etp, layout.ep, args.sequence_parallel)
    return experts.reason_by_settings(args, spread)


def _notes(config: DWMConfig, args: Any) -> Iterator[str]:
    """Yields notes on what the figures leave out."""
    if config.overhead_budget is not None:
        yield (
            f"--dwm-overhead-budget {config.overhead_budget} spaces meta steps by measured time; "
            "the plan takes them at the interval of --dwm-meta-interval"
        )
    if config.verify_meta_gradient:
        yield "--dwm-verify-meta-gradient repeats some steps; they are left out"
    if args.recompute_granularity == "selective":
        others = set(args.recompute_modules or []) - {"core_attn", "layernorm", "moe_act"}
        if others:
            yield f"recomputation of {', '.join(sorted(others))} is left out"
    if args.step_batch_size_schedule:
        yield f"--step-batch-size-schedule: steps are those of its end, {final_batch(args)} samples"
    if args.window_size:
        yield f"--window-size {args.window_size}: attention is counted over the full square"
    if args.softmax_type == "learnable":
        yield (
            "--softmax-type learnable: the offsets are left out, and so is the attention that "
            "ghost runs again for them"
        )
    if args.optimizer != "adam" or args.use_precision_aware_optimizer:
        which = f"--optimizer {args.optimizer}"
        if args.use_precision_aware_optimizer:
            which = "--use-precision-aware-optimizer"
        yield (
            f"{which}: the trainer's memory counts Adam's state in float32, 12 bytes per parameter "
            "in 16 bits, else 8"
        )
    if args.num_experts:
        yield "tokens are assumed to be spread evenly over experts"
    if args.fp8 or args.fp4:
        yield "matrix products in fp8 or fp4 are counted at the parameters' precision"
