"""Runs the weighting model over a step's micro-batches with Megatron's pipeline schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from torch.nn.utils import get_total_norm

from megatron_dwm.config import DWMConfig
from megatron_dwm.core.agreement import agreed
from megatron_dwm.core.collectives import broadcast_from_first_tensor_rank
from megatron_dwm.weighting_model.transformer import DataWeightingModel

# Megatron matches saved parameter groups by, among others, their largest learning rate. These
# constants tell head and backbone apart whatever the learning rates are, so that those can be
# changed on resume.
_HEAD_MARK, _BACKBONE_MARK = 2.0, 1.0


@dataclass
class Update:
    """The outcome of a step of the DWM's optimizer.

    Attributes:
        updated: whether it was taken.
        grad_norm: gradient norm before clipping; NaN if the step was not taken.
        causes: what was NaN or infinite: `gradient`, `parameters`.
    """

    updated: bool
    grad_norm: float
    causes: list[str] = field(default_factory=list)


class Scorer:
    """The weighting model in its DDP wrapper, with its optimizer.

    Args:
        model: this rank's pipeline stage of the DWM.
        config: settings.
        pg_collection: the LLM's process groups.
        micro_batch_size: b.
        seq_length: s.
        device: where token ids are sent.
        together: maximum number of micro-batches scored as one batch, see `micro_batches_at_once`.
        sharded: whether the optimizer is Megatron's distributed one, of which each data-parallel
            rank holds a shard: 6 + 12 / DP bytes per parameter in bf16 instead of 18.
        gloo: whether Megatron's gloo groups exist, with which its state is gathered in host memory.
    """

    def __init__(
        self,
        model: DataWeightingModel,
        config: DWMConfig,
        pg_collection: Any,
        micro_batch_size: int,
        seq_length: int,
        device: torch.device,
        together: int = 1,
        sharded: bool = False,
        gloo: bool = False,
    ) -> None:
        self.groups, self.together, self.sharded = pg_collection, together, sharded
        self.micro_batch_size, self.seq_length, self.device = micro_batch_size, seq_length, device
        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        model.to(device=device, dtype=model.config.params_dtype)
        self.config = config
        self.transformer_config = model.config
        self.ddp = _wrapped(model, pg_collection, sharded)
        model.config.finalize_model_grads_func = _finalize_grads
        self.optimizer = build_optimizer(self.ddp, config, model.config, gloo and sharded)
        self.weights_changed()
        self.schedule = get_forward_backward_func(pp_size=pg_collection.pp.size(), vp_size=None)
        self.position_ids = torch.arange(seq_length, device=device).unsqueeze(0)

    @property
    def module(self) -> DataWeightingModel:
        """The weighting model without its wrapper."""
        return self.ddp.module

    @torch.no_grad()
    def weights_changed(self) -> None:
        """To be called after the weights were set from outside.

        It makes the data-parallel replicas equal, whatever each was built from, and copies the
        weights into the optimizer's own copies, which the next step would otherwise restore.
        """
        self.ddp.broadcast_params()
        self.optimizer.reload_model_params()

    @torch.no_grad()
    def scores(self, tokens: list[torch.Tensor] | None, num_microbatches: int) -> torch.Tensor:
        """Returns this rank's scores.

        Args:
            tokens: `[b, s]` ids of each micro-batch on ranks that read data, else None.
            num_microbatches: m.

        Returns:
            `[m * b]` float32 on last-stage ranks; zeros elsewhere.
        """
        found: list[torch.Tensor] = []

        def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, dict]:
            found.append(output.detach())
            return output.sum(), {}

        self._run(tokens, num_microbatches, loss_func, forward_only=True)
        if not self.module.post_process:
            return torch.zeros(num_microbatches * self.micro_batch_size, device=self.device)
        return torch.cat(found)

    def update(
        self,
        tokens: list[torch.Tensor] | None,
        num_microbatches: int,
        score_gradient: torch.Tensor,
    ) -> Update:
        """Takes one step of the DWM's optimizer along `-dL_meta/ds`.

        The surrogate loss `sum_i dL/ds_i * s_i` has the desired gradient. The schedule divides it
        by the number of micro-batches and DDP by the data-parallel size, which is undone here,
        because every sample's term counts once in the meta loss.

        If a gradient or a parameter is NaN or infinite on any rank, the DWM, including the
        optimizer's moments, stays as it was, on every rank.

        Args:
            tokens: as for `scores`.
            num_microbatches: m.
            score_gradient: `[m * b]` for this rank's samples, on last-stage ranks.

        Returns:
            The outcome, the same on every rank.
        """
        batches = num_microbatches // self._together(num_microbatches)
        scale = batches * self.groups.dp_cp.size()
        parts = iter((score_gradient * scale).view(batches, -1))

        def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, dict]:
            return (output * next(parts)).sum(), {}

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(tokens, num_microbatches, loss_func, forward_only=False)
        found = {"gradient": self._bad_gradient(), "parameters": self.bad_parameters()}
        causes = agreed(found, self.device)
        if causes:
            self.ddp.zero_grad_buffer()
            return Update(False, math.nan, causes)
        successful, grad_norm, _ = self.optimizer.step()
        return Update(bool(successful), float(grad_norm or 0.0))

    def bad_parameters(self) -> torch.Tensor:
        """Returns, as a scalar bool tensor, whether a parameter of this rank is not finite."""
        largest = get_total_norm(list(self.module.parameters()), norm_type=math.inf)
        return ~torch.isfinite(largest)

    def _bad_gradient(self) -> torch.Tensor:
        """Returns whether this rank's gradient, or the sum of its squares, is not finite.

        The sum is included because Adam's second moment would never recover from it.
        """
        buffers = [*self.ddp.buffers, *self.ddp.expert_parallel_buffers]
        return ~torch.isfinite(get_total_norm([part for b in buffers for part in _reduced(b)]))

    def _run(
        self,
        tokens: list[torch.Tensor] | None,
        num_microbatches: int,
        loss_func: Any,
        forward_only: bool,
    ) -> None:
        together = self._together(num_microbatches)
        batch_size = together * self.micro_batch_size
        starts = iter(range(0, num_microbatches, together))

        def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
            k = next(starts)
            ids = None
            if self.module.pre_process:
                ids = broadcast_from_first_tensor_rank(
                    None if tokens is None else torch.cat(tokens[k : k + together]),
                    (batch_size, self.seq_length),
                    self.groups.tp,
                    self.device,
                )
            return model(ids, self.position_ids), loss_func

        self.schedule(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[self.ddp],
            num_microbatches=num_microbatches // together,
            seq_length=self.seq_length,
            micro_batch_size=batch_size,
            forward_only=forward_only,
        )

    def _together(self, num_microbatches: int) -> int:
        """Returns the largest divisor of the number of micro-batches that `together` allows."""
        return next(k for k in range(self.together, 0, -1) if num_microbatches % k == 0)


def micro_batches_at_once(llm: Any, dwm: Any) -> int:
    """Returns how many micro-batches the DWM can process at once within the LLM's memory.

    The time of a small model on a small batch is all kernel launches. Activations of a layer grow
    with the hidden size and the width of the MLP, those of unfused attention with the heads; under
    sequence parallelism the LLM keeps a part of them on each rank, and the DWM all. The result is 1
    if the LLM recomputes its activations, so that they give no measure, and under pipeline
    parallelism, where micro-batches keep the stages busy.

    Args:
        llm: the LLM's `TransformerConfig`.
        dwm: the DWM's.
    """
    if llm.pipeline_model_parallel_size > 1 or llm.recompute_granularity is not None:
        return 1
    ranks = llm.tensor_model_parallel_size if llm.sequence_parallel else 1
    ratios = (
        llm.num_layers * getattr(llm, name) // (ranks * dwm.num_layers * getattr(dwm, name))
        for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads")
    )
    return max(1, min(ratios))


def _wrapped(model: DataWeightingModel, groups: Any, sharded: bool) -> DistributedDataParallel:
    """Returns the model in Megatron's DDP.

    Nothing is overlapped: the meta step's passes run one after the other, and readers of the
    weights (scores, snapshots, checkpoints) find them gathered.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=sharded
    )
    layout = None
    if sharded:
        # In one bucket, as without sharding: nothing is overlapped.
        layout = DistributedOptimizer.compute_full_param_layout(
            list(model.parameters()), None, groups.dp_cp.size(), config
        )
    return DistributedDataParallel(
        config=model.config, ddp_config=config, module=model, full_param_layout=layout
    )


def _reduced(buffer: Any) -> list[torch.Tensor]:
    """Returns this rank's part of a buffer's gradients after their reduction."""
    if not buffer.ddp_config.use_distributed_optimizer:
        return [buffer.grad_data]
    # After a reduce-scatter, the rest of the buffer holds unreduced parts of the other shards.
    group = buffer.data_parallel_group
    return [bucket.grad_data.chunk(group.size())[group.rank()] for bucket in buffer.buckets]


def build_optimizer(ddp: Any, config: DWMConfig, transformer: Any, gloo: bool = False) -> Any:
    """Returns the DWM's AdamW with two learning rates, head and backbone.

    Epsilon is tiny because the meta-gradient scales with the LLM's learning rate times its
    gradients; Adam's usual 1e-8 would damp it.

    Args:
        ddp: the wrapped model; its settings say whether the optimizer is sharded.
        config: settings.
        transformer: the model's config.
        gloo: whether a sharded optimizer's state can be gathered with gloo, whose groups may not
            exist.
    """
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=_BACKBONE_MARK,
        min_lr=_BACKBONE_MARK,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=1e-15,
        clip_grad=config.clip_grad,
        bf16=transformer.bf16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=ddp.ddp_config.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(
        optimizer_config,
        [ddp],
        config_overrides={
            **get_standard_config_overrides(optimizer_config),
            ParamKey(name="*score.weight"): {"max_lr": _HEAD_MARK, "min_lr": _HEAD_MARK},
        },
        use_gloo_process_groups=gloo,
    )
    set_hyperparameters(optimizer, config)
    return optimizer


def set_hyperparameters(optimizer: Any, config: DWMConfig) -> None:
    """Applies the settings, after building and after loading an older optimizer."""
    for group in optimizer.param_groups:
        head = group["max_lr"] == _HEAD_MARK
        group["lr"] = config.head_lr if head else config.backbone_lr
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (config.adam_beta1, config.adam_beta2)


def _finalize_grads(
    model: list[Any],
    num_tokens: Any = None,
    pg_collection: Any = None,
    force_all_reduce: bool = False,
) -> None:
    """Reduces the DWM's gradients over data-parallel ranks, to each rank's shard if sharded.

    Nothing else is needed: without sequence parallelism, replicated parameters see equal gradients
    on tensor-parallel peers, and the DWM has no tied embeddings.
    """
    for chunk in model:
        chunk.finish_grad_sync(force_all_reduce=force_all_reduce)
