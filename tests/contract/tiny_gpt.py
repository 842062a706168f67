"""A tiny GPT in Megatron's DDP, run by Megatron's schedule over m micro-batches of b samples.

With its per-sample gradients as the truth for `<v, g_i>`: a loop that takes for every sample a
forward and a backward pass of its own share of the loss (masked tokens / tokens of the micro-batch
/ m), with the dropout masks of the real pass.
"""

from __future__ import annotations

import functools

import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.pipeline_parallel.schedules import (  # noqa: E402
    forward_backward_no_pipelining,
)
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dwm.core.contexts import without_auxiliary_losses  # noqa: E402
from megatron_dwm.core.random_states import restore_random_states  # noqa: E402
from megatron_dwm.meta_gradient.ghost import recording as ghost  # noqa: E402

B, S, VOCAB, M = 3, 8, 48, 2

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {**FULL, "recompute_method": "block"}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


def local_spec(options):
    """Returns the specification of Megatron's own layers."""
    return get_gpt_layer_local_spec(
        num_experts=options.get("num_moe_experts"),
        qk_layernorm=options.get("qk_layernorm", False),
        normalization=options["normalization"],
    )


class Run:
    """A tiny GPT, its micro-batches, and the trainer's pass over them.

    Args:
        options: settings of the `TransformerConfig`.
        groups: process groups.
        freeze: names of parameters that are not trained.
        kind: the configuration's class.
        spec: a layer's specification, from the options.
    """

    def __init__(self, options, groups, freeze=(), kind=TransformerConfig, spec=local_spec):
        tied = options["normalization"] == "LayerNorm"
        # A bias of all keys alike has no gradient without rotary embeddings.
        rope = not tied or options.get("qk_layernorm", False)
        defaults = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        self.config = kind(
            num_layers=2,
            hidden_size=24,
            num_attention_heads=4,
            ffn_hidden_size=40,
            use_cpu_initialization=True,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            **{**defaults, **options},
        )
        gpt = GPTModel(
            self.config,
            spec(options),
            vocab_size=VOCAB,
            max_sequence_length=S,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope" if rope else "learned_absolute",
        ).to(cpu.device())
        generator = torch.Generator().manual_seed(0)
        for name, parameter in gpt.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            is_norm = name.endswith(("norm.weight", "layer_norm_weight"))
            parameter.data.copy_(noise + (1.0 if is_norm else 0.0))
            parameter.requires_grad_(name not in freeze)
        self.model = [
            DistributedDataParallel(
                self.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt
            )
        ]
        self.config.finalize_model_grads_func = self.finalize
        self.finalized, self.groups = 0, groups
        self.parameters = {n: p for n, p in gpt.named_parameters() if p.requires_grad}
        self.batches = []
        for _ in range(M):
            ids = torch.randint(0, VOCAB, (B, S + 1), generator=generator)
            mask = (torch.rand(B, S, generator=generator) > 0.3).float()
            mask[:, 0] = 1.0
            batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "mask": mask}
            self.batches.append({k: v.to(cpu.device()) for k, v in batch.items()})
        self.rng = megatron_random._get_all_rng_states()
        self.v = {n: torch.randn(p.shape, generator=generator) for n, p in self.parameters.items()}

    def finalize(self, *args, **kwargs):
        self.finalized += 1

    @staticmethod
    def losses(model, batch):
        positions = torch.arange(S, device=cpu.device()).expand(B, S)
        mask = torch.ones(1, 1, S, S, dtype=torch.bool, device=cpu.device()).triu(1)
        return model(batch["tokens"], positions, mask, labels=batch["labels"])

    def forward_step(self, iterator, model):
        batch = next(iterator)

        def loss_func(mask, output):
            total = (output.float() * mask).sum()
            return total, mask.sum().to(torch.int), {"lm loss": total.detach()}

        return self.losses(model, batch), functools.partial(loss_func, batch["mask"])

    def schedule(self):
        """The trainer's forward and backward passes of one step."""
        restore_random_states(self.rng)
        forward_backward_no_pipelining(
            forward_step_func=self.forward_step,
            data_iterator=iter(self.batches),
            model=self.model,
            num_microbatches=M,
            seq_length=S,
            micro_batch_size=B,
            forward_only=False,
        )

    def ghost(self):
        return ghost.Ghost(self.model, self.config, self.groups, B, cpu.device())

    def write(self, v):
        """Puts v where the meta step has it: into the gradient buffers."""
        for name, parameter in self.parameters.items():
            parameter.main_grad.copy_(v[name])

    def gradient(self):
        return {n: p.main_grad.clone() for n, p in self.parameters.items()}

    def estimate(self, v):
        self.write(v)

        def direction(parameter):
            return getattr(parameter, "main_grad", None)

        return ghost.estimate(self.ghost(), direction, M, self.model, self.schedule)

    def train(self, v):
        """Records the trainer's own pass, with weight gradients."""
        of_parameter = {id(p): v[n].to(cpu.device()) for n, p in self.parameters.items()}
        self.model[0].zero_grad_buffer()
        with self.ghost().recording(lambda p: of_parameter.get(id(p)), M) as total:
            self.schedule()
            return total()

    def per_sample_gradients(self):
        """One forward and backward for each sample: the truth, without auxiliary losses."""
        with without_auxiliary_losses(self.config):
            return self._per_sample_gradients()

    def _per_sample_gradients(self):
        found = []
        restore_random_states(self.rng)
        for batch in self.batches:
            before = megatron_random._get_all_rng_states()
            for i in range(B):
                restore_random_states(before)
                self.model[0].zero_grad_buffer()
                mask = batch["mask"]
                share = (self.losses(self.model[0], batch)[i] * mask[i]).sum() / mask.sum() / M
                torch.autograd.backward(share)  # as the schedules do
                found.append(self.gradient())
        return found


def products(gradients, v):
    sums = [sum((g[n].double().cpu() * v[n].double()).sum() for n in v) for g in gradients]
    return torch.stack(sums)


def error(found, expected):
    expected = expected.cpu()
    return ((found.cpu() - expected).abs().max() / expected.abs().max()).item()


def only(v, name):
    return {n: d if n == name else torch.zeros_like(d) for n, d in v.items()}
