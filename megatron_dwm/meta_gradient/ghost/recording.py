"""Per-sample influence from hooks on layers' inputs and output gradients: exact, in one pass.

`c_i = <v, g_i>` is summed layer by layer, by the rule of each (`layer_rules`), in one forward and
backward of the step's micro-batches without weight gradients (the arithmetic of 3 forwards), or
during the training pass itself if v is known before it (that of one more forward).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.utils import unwrap_model

from megatron_dwm.core import collectives
from megatron_dwm.core.contexts import configs_of, without_auxiliary_losses, without_gradients
from megatron_dwm.core.further_losses import has_further_losses, without_further_losses
from megatron_dwm.errors import DWMError
from megatron_dwm.meta_gradient.ghost import attention, experts, fused
from megatron_dwm.meta_gradient.ghost.layer_rules import rule_of
from megatron_dwm.meta_gradient.ghost.rule import Call, Direction, GhostRule


class Ghost:
    """The layers of the LLM on this rank, with their rules.

    Args:
        model: DDP-wrapped model chunks.
        config: the LLM's `TransformerConfig`.
        groups: the LLM's process groups.
        micro_batch_size: b.
        device: where results are summed.

    Raises:
        DWMError: a trained parameter of this rank has no rule; it is named.
    """

    def __init__(
        self,
        model: list[Any],
        config: Any,
        groups: Any,
        micro_batch_size: int,
        device: torch.device,
    ) -> None:
        uncovered = uncovered_parameters(model)
        if uncovered:
            raise DWMError(refusal(uncovered), this_rank_only=True)
        self.config, self.groups, self.device = config, groups, device
        self.micro_batch_size = micro_batch_size
        self.chunks: list[torch.nn.Module] = unwrap_model(model)
        # (number of the chunk, name, module, rule)
        self.layers: list[tuple[int, str, torch.nn.Module, GhostRule]] = []
        self.calls: list[int] = []  # number of calls of each layer in a pass
        self.names: dict[int, str] = {}
        for number, chunk in enumerate(self.chunks):
            self.names.update((id(p), name) for name, p in chunk.named_parameters())
            for name, module in chunk.named_modules():
                rule = rule_of(module)
                if rule is not None and _takes_part(module):
                    self.layers.append((number, name, module, rule))
                    self.calls.append(_calls_in_a_pass(config, chunk, name))

    def share(self, parameter: torch.nn.Parameter) -> float:
        """Returns how much a replicated parameter's term counts on this tensor-parallel rank.

        This follows Megatron's `finalize_model_grads`: parameters for which each rank sees only a
        part of the gradient are summed (or averaged) over tensor-parallel ranks; the others have
        equal gradients on all of these ranks and count on the first only.
        """
        tp = self.groups.tp
        if not getattr(parameter, "allreduce", True):
            return 1.0  # of an expert, which this rank alone has, or a part of it
        if tp.size() == 1 or getattr(parameter, "tensor_model_parallel", False):
            return 1.0
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            return 1.0 / tp.size()
        if self.config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
            return 1.0
        name = self.names[id(parameter)]
        if self.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name):
            return 1.0
        return 1.0 if tp.rank() == 0 else 0.0

    @contextlib.contextmanager
    def recording(self, v: Direction, num_microbatches: int) -> Iterator[Callable[[], Any]]:
        """A context in which passes of the LLM are recorded.

        Args:
            v: the direction of each parameter, None for those that are not trained.
            num_microbatches: m.

        Yields:
            A function that returns this rank's part of `<v, d loss / d theta>` for each local
            sample, `[m * b]` float32, with `loss` as the schedule differentiates it.

        Raises:
            DWMError: (from the function) a layer took part in the loss in a way that the hooks did
                not see, so the sum would lack its terms.
        """
        shape = (sum(self.calls), num_microbatches, self.micro_batch_size)
        handles: list[Any] = []
        if not any(p.requires_grad for chunk in self.chunks for p in chunk.parameters()):
            # Without weight gradients the backward pass would end before it reached the first
            # layers.
            for module in (m for chunk in self.chunks for m in chunk.modules()):
                if isinstance(module, VocabParallelEmbedding | torch.nn.Embedding):
                    handles.append(module.register_forward_hook(_begin_graph))
        found = torch.zeros(shape, dtype=torch.float32, device=self.device)
        foreign: dict[tuple[int, int], tuple[torch.Tensor, Any]] = {}
        rows = experts.Rows()
        for chunk in self.chunks:
            handles += rows.hooks(chunk)
            handles += fused.hooks(chunk, handles)
        passes, seen = [0] * len(self.chunks), [0] * len(self.layers)
        for row, (_, _, module, rule) in enumerate(self.layers):
            hook = self._hook(row, rule, v, found, foreign, seen, num_microbatches, rows, handles)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for number, chunk in enumerate(self.chunks):
            handles.append(chunk.register_forward_pre_hook(_counter(passes, number)))

        def total() -> torch.Tensor:
            self._check(passes, seen, num_microbatches)
            local = found.double().sum(0)
            return (local + _handed_over(foreign, local)).float().view(-1)

        try:
            yield total
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, passes: list[int], seen: list[int], num_microbatches: int) -> None:
        """Raises unless every layer took part as often as it should in each pass of its chunk."""
        for (number, name, module, _), calls, count in zip(
            self.layers, self.calls, seen, strict=True
        ):
            if count != calls * passes[number] or not count:
                raise DWMError(
                    f"--dwm-estimator ghost: layer '{name}' ({type(module).__name__}) was seen "
                    f"{count} times in {passes[number]} micro-batches, so its parameters' part of "
                    "the meta-gradient is not known; use --dwm-estimator finite_difference",
                    this_rank_only=True,
                )
        # The trainer's rerun machine may repeat all of the step's passes.
        rerun = get_rerun_state_machine().get_mode() != RerunMode.DISABLED
        for count in passes:
            if count != num_microbatches and (not rerun or count % num_microbatches):
                raise DWMError(
                    f"--dwm-estimator ghost: the model ran {count} times in {num_microbatches} "
                    "micro-batches, so it is not known which samples it was given; use "
                    "--dwm-estimator finite_difference",
                    this_rank_only=True,
                )

    def _hook(
        self,
        row: int,
        rule: GhostRule,
        v: Direction,
        found: torch.Tensor,
        foreign: dict[tuple[int, int], tuple[torch.Tensor, Any]],
        seen: list[int],
        num_microbatches: int,
        rows: experts.Rows,
        handles: list[Any],
    ) -> Callable[..., None]:
        """Returns a forward hook that attaches the layer's formula to its output's gradient.

        Micro-batches reach a layer in order, forward and backward, so a counter tells which one it
        is; a layer that is called several times in a pass has a row for each call. The first
        forward of a recomputed layer runs without gradients and does not count. If the trainer's
        rerun machine repeats the step's passes, the last ones count.
        """
        calls, of_pass = 0, self.calls[row]
        first = sum(self.calls[:row])

        def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal calls
            output = output[0] if isinstance(output, tuple) else output
            if not torch.is_grad_enabled() or not isinstance(output, torch.Tensor):
                return  # not a tensor: a fused implementation that does not show it
            if not output.requires_grad:
                return
            inputs = tuple(_detached(value) for value in args)
            named = {name: _detached(value) for name, value in kwargs.items()}
            x = inputs[0] if inputs else next(iter(named.values()))
            samples = rows.of(module) or rule.samples(module)
            call = Call(module, x, _weight_of(module, args, kwargs), samples, inputs, named)
            k, place = calls // of_pass % num_microbatches, first + calls % of_pass
            calls += 1

            def record(grad: torch.Tensor) -> None:
                problem = samples.problem(grad, self.micro_batch_size)
                if problem is not None:
                    raise DWMError(
                        f"--dwm-estimator ghost: layer '{self.layers[row][1]}' has an output of "
                        f"{problem}; use --dwm-estimator finite_difference",
                        this_rank_only=True,
                    )
                with torch.no_grad():
                    terms = rule.formula(call, grad, v, self.share)
                group = getattr(samples, "replicas", None)
                if group is None:
                    found[place, k] = terms
                else:
                    foreign[place, k] = terms, group
                seen[row] += 1

            # Removed with the others: a graph may outlive the step (that of an MoE layer's
            # probabilities does, in its dispatcher), and would keep v and the layers' inputs alive.
            node, number = output.grad_fn, output.output_nr
            if self.config.recompute_granularity == "selective" and node is not None:
                # A hook that recomputes the layer's input may still be added to this tensor.
                handles.append(
                    node.register_prehook(
                        lambda grads: None if grads[number] is None else record(grads[number])
                    )
                )
            else:
                handles.append(output.register_hook(record))

        return hook


def _handed_over(
    foreign: dict[tuple[int, int], tuple[torch.Tensor, Any]], like: torch.Tensor
) -> torch.Tensor:
    """Returns what the experts of all ranks found for this rank's samples, `[m, b]` float64.

    Args:
        foreign: by layer and micro-batch `[ep b]` terms of all replicas' samples, and their group.
        like: a tensor of the result's shape.
    """
    if not foreign:
        return torch.zeros_like(like)
    group = next(group for _, group in foreign.values())
    total = like.new_zeros(like.size(0), group.size(), like.size(1))
    for (_, k), (terms, _) in foreign.items():
        total[k] += terms.double().view(group.size(), -1)
    return collectives.sum_over_experts(total, group)[:, group.rank()]


def _calls_in_a_pass(config: Any, chunk: torch.nn.Module, name: str) -> int:
    """Returns the number of times that a layer runs in one forward pass of its chunk.

    This is once, except in a chunk with layers for multi-token prediction: each of them embeds the
    shifted tokens again, and predicts with the output layer.
    """
    if not has_further_losses(config):
        return 1
    if name == "output_layer":
        return 1 + config.mtp_num_layers
    if name.split(".")[0] == "embedding" and getattr(chunk, "mtp_process", False):
        return int(chunk.pre_process) + config.mtp_num_layers
    return 1


def _takes_part(module: torch.nn.Module) -> bool:
    """Returns whether a layer has trained parameters, or is passed some (tied embeddings)."""
    if isinstance(module, ColumnParallelLinear) and getattr(module, "weight", None) is None:
        return True
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _weight_of(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Returns the weight of a layer's call, which may be passed in (tied embeddings)."""
    given = args[1] if len(args) > 1 else kwargs.get("weight")
    if isinstance(module, ColumnParallelLinear) and given is not None:
        return given
    return getattr(module, "weight", None)


def _begin_graph(module: Any, args: tuple, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _counter(passes: list[int], number: int) -> Callable[..., None]:
    def count(*_: Any) -> None:
        passes[number] += torch.is_grad_enabled()

    return count


@contextlib.contextmanager
def frozen_parameters(model: list[Any], config: Any) -> Iterator[None]:
    """A context in which backward passes compute and reduce no weight gradients."""
    parameters = [p for chunk in model for p in chunk.parameters()]
    names = ("finalize_model_grads_func", "grad_sync_func")
    kept = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, None)
    try:
        with without_gradients(parameters):
            yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def estimate(
    ghost: Ghost,
    v: Direction,
    num_microbatches: int,
    model: list[Any],
    run: Callable[[], None],
    with_further: bool = True,
) -> torch.Tensor:
    """Returns `<v, d loss / d theta>` of each local sample by a separate pass.

    Args:
        ghost: the layers.
        v: the direction of each parameter.
        num_microbatches: m.
        model: DDP-wrapped chunks, with the parameters at which gradients are taken.
        run: runs the trainer's forward and backward over the step's micro-batches.
        with_further: whether the losses of multi-token prediction count.

    Returns:
        `[m * b]` float32, complete on every rank of the model-parallel group; `loss` as the
        schedule differentiates it, before DDP or the global token count scale it.
    """
    configs = configs_of(model)
    with (
        frozen_parameters(model, ghost.config),
        without_auxiliary_losses(*configs),
        contextlib.nullcontext() if with_further else without_further_losses(*configs),
        ghost.recording(v, num_microbatches) as total,
    ):
        run()
        local = total()
    return collectives.sum_over_model_parallel(local, ghost.groups.mp)


def uncovered_parameters(model: list[Any]) -> list[str]:
    """Returns the trained parameters of this rank that no rule covers, each with the reason."""
    found = []
    for chunk in unwrap_model(model):
        reasons = {f"{name}.": _reason_against(module) for name, module in chunk.named_modules()}
        reasons = {prefix: why for prefix, why in reasons.items() if why is not None}
        for prefix, module in chunk.named_modules():
            known = rule_of(module) is not None
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{prefix}.{name}" if prefix else name
                if not parameter.requires_grad:
                    continue
                why = next((why for p, why in reasons.items() if full.startswith(p)), None)
                if why is not None or not known:
                    found.append(not_covered(full, type(module).__name__, why))
    return found


def not_covered(parameter: str, layer: str, why: str | None) -> str:
    """Returns the text for a parameter that no rule covers.

    Args:
        parameter: its name.
        layer: class of its layer.
        why: what rules out the module that it is in, see `reason_against`; None: nothing.
    """
    return f"the parameter {parameter} ({f'of a {layer}' if why is None else why})"


def in_experts(why: str) -> str:
    """Returns the full text of what rules out a mixture-of-experts layer."""
    return (
        "in a mixture-of-experts layer, where tokens are no longer in the order of the samples: "
        f"{why}"
    )


def _reason_against(module: torch.nn.Module) -> str | None:
    """Returns why no parameter inside a module is covered, whatever its layer."""
    kind = type(module).__name__
    if kind.endswith("MoELayer"):
        why = experts.reason_against(module)
        return why and in_experts(why)
    why = fused.reason_against(module)
    if why is None and rule_of(module) is not None:
        why = attention.reason_against(module)
    return why and f"of a {kind}: {why}"


def refusal(uncovered: list[str]) -> str:
    """Returns the error for parameters that are not covered."""
    more = f" and {len(uncovered) - 1} more" if len(uncovered) > 1 else ""
    return (
        f"--dwm-estimator ghost does not cover {uncovered[0]}{more}; use "
        "--dwm-estimator finite_difference"
    )
