#!/usr/bin/env python
"""Trains a small byte-level Llama on weighted data, in its own loop over Megatron-Core.

    python examples/own_loop.py --train good.txt noise.txt --meta target.txt [--steps 300]
    torchrun --nproc-per-node 2 examples/own_loop.py ...

It does not use Megatron-LM's trainer: the model, its optimizer, the data and the step are this
script's own, and `OwnLoop` weighs the samples of each step. Every file of --train is a domain, and
all have the same share of the samples. At the end it prints the loss on --meta's last tenth, which
is kept out of the meta set, and each domain's mean weight over the last tenth of the steps. A
second call with the same --save resumes the first one.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dwm.hosts import cpu

cpu.install()  # on a machine with a GPU it does nothing

import torch  # noqa: E402
from megatron.core import dist_checkpointing, mpu  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.num_microbatches_calculator import (  # noqa: E402
    get_num_microbatches,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dwm import DWMConfig  # noqa: E402
from megatron_dwm.hosts.own_loop import OwnLoop, StepOutcome  # noqa: E402

SEQUENCE, MICRO_BATCH, BATCH = 96, 8, 32


class Bytes(torch.utils.data.Dataset):
    """A text file in pieces of `SEQUENCE` bytes, each with the next byte.

    Args:
        text: text of the file.
        domain: its number.
    """

    def __init__(self, text: bytes, domain: int = 0) -> None:
        self.data, self.domain = torch.frombuffer(bytearray(text), dtype=torch.uint8), domain

    def __len__(self) -> int:
        return (len(self.data) - 1) // SEQUENCE

    def __getitem__(self, index: int) -> dict[str, Any]:
        piece = self.data[index * SEQUENCE : (index + 1) * SEQUENCE + 1].long()
        return {"tokens": piece[:-1], "labels": piece[1:], "dataset_id": self.domain}


def micro_batches(datasets: list[Bytes], seed: int, first_step: int) -> Iterator[dict[str, Any]]:
    """Yields this rank's micro-batches endlessly; a step's are a function of its number."""
    step, rank, ranks = first_step, mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        domains = torch.randint(len(datasets), (BATCH,), generator=generator)
        places = torch.rand(BATCH, generator=generator, dtype=torch.float64)
        samples = [
            datasets[d][int(p * len(datasets[d]))] for d, p in zip(domains, places, strict=True)
        ]
        for start in range(rank * MICRO_BATCH, BATCH, ranks * MICRO_BATCH):
            yield torch.utils.data.default_collate(samples[start : start + MICRO_BATCH])
        step += 1


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """Returns the per-token losses `[b, s]`, and the loss function for them."""
    batch = {k: v.to(cpu.device()) for k, v in next(data_iterator).items()}
    positions = torch.arange(SEQUENCE, device=cpu.device()).expand_as(batch["tokens"])
    losses = model(batch["tokens"], positions, None, labels=batch["labels"])
    return losses, partial(loss_func, torch.ones_like(losses))


def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """Returns the sum of the losses, the number of tokens, and the report."""
    total, tokens = (losses * mask).sum(), mask.sum().int()
    return total, tokens, {"loss": (total / tokens).detach()}


def build(lr: float) -> tuple[Any, Any, Any]:
    """Returns the model in Megatron-Core's DDP, its optimizer, and the pipeline schedule."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=192,
        num_attention_heads=4,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=cpu.is_cpu(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=256,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(cpu.device())
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=lr, weight_decay=0.1, clip_grad=1.0), [wrapped]
    )
    return wrapped, optimizer, get_forward_backward_func()


def train_step(
    model: Any, optimizer: Any, schedule: Any, forward_step: Any, data_iterator: Any
) -> StepOutcome:
    """Takes one optimizer step on a batch; the loss is the mean of the reported losses."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    reports = schedule(
        forward_step_func=forward_step,
        data_iterator=data_iterator,
        model=[model],
        num_microbatches=get_num_microbatches(),
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    updated, grad_norm, _ = optimizer.step()
    loss = torch.stack([report["loss"] for report in reports]).mean()
    torch.distributed.all_reduce(loss)
    loss /= torch.distributed.get_world_size()
    return StepOutcome({"loss": loss}, not updated, grad_norm)


@torch.no_grad()
def held_out_loss(model: Any, text: bytes) -> float:
    """Returns the loss per byte on a text, the same on every rank."""
    data = Bytes(text)
    batches = torch.utils.data.DataLoader(data, batch_size=64)
    totals = [0.0, 0]
    for batch in batches:
        losses, _ = forward_step(iter([batch]), model)
        totals[0] += losses.sum().item()
        totals[1] += losses.numel()
    return totals[0] / totals[1]


def settings(policy: str, steps: int) -> DWMConfig:
    """Returns the weighting's settings: such a short run starts weighting early."""
    config = DWMConfig(enabled=True, policy=policy, warmup_steps=steps // 10)
    if policy == "learned":
        # A whole micro-batch on each rank.
        ranks = mpu.get_data_parallel_world_size()
        config.meta_batch_size = max(16, MICRO_BATCH * ranks)
    return config


def start_ranks() -> None:
    """Initialises the process group, with a single rank without torchrun."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29571")
    rank = int(os.environ["RANK"])
    if not cpu.is_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    torch.distributed.init_process_group("gloo" if cpu.is_cpu() else "nccl")
    mpu.initialize_model_parallel()
    init_num_microbatches_calculator(
        rank, None, BATCH, MICRO_BATCH, mpu.get_data_parallel_world_size()
    )


def main() -> dict[str, Any]:
    """Trains, and returns what it prints at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", nargs="+", type=Path, required=True, help="text files, one per domain")
    add("--meta", type=Path, required=True, help="text that the model should be good at")
    add("--policy", default="learned", help="as --dwm-policy; none: the loop without weights")
    add("--steps", type=int, default=300)
    add("--stop", type=int, help="stop after this step, as if time were up")
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=1)
    add("--save", type=Path, help="folder of the checkpoint and of dwm_log.jsonl")
    args = parser.parse_args()

    start_ranks()
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed)
    model, optimizer, schedule = build(args.lr)
    datasets = [Bytes(path.read_bytes(), k) for k, path in enumerate(args.train)]
    target = args.meta.read_bytes()
    cut = len(target) * 9 // 10
    own_step = partial(train_step, model, optimizer, schedule)

    loop = None
    if args.policy != "none":
        loop = OwnLoop(
            settings(args.policy, args.steps),
            [model],
            optimizer,
            forward_step,
            micro_batch_size=MICRO_BATCH,
            seq_length=SEQUENCE,
            steps=args.steps,
            meta_datasets=[Bytes(target[:cut])],
            pipeline_schedule=schedule,
            folder=None if args.save is None else str(args.save),
            domains=[path.stem for path in args.train],
        )
    done = 0 if args.save is None else load(args.save, model, optimizer, loop)
    iterator = micro_batches(datasets, args.seed, done)
    losses, weights = [], []
    try:
        for step in range(done, args.steps if args.stop is None else args.stop):
            if loop is None:
                losses.append(own_step(forward_step, iterator).losses["loss"].item())
                continue
            found, record = loop.step(own_step, iterator)
            losses.append(found.losses["loss"].item())
            if step >= args.steps * 9 // 10 and record.weights is not None:
                weights.append((record.domains.cpu(), record.weights.cpu()))
        if args.save is not None:
            save(args.save, model, optimizer, loop, done + len(losses))
    finally:
        if loop is not None:
            loop.close()
    out: dict[str, Any] = {"losses": losses, "held_out": held_out_loss(model, target[cut:])}
    if weights:
        domains, values = (torch.cat(parts) for parts in zip(*weights, strict=True))
        for k, path in enumerate(args.train):
            out.setdefault("weights", {})[path.stem] = values[domains == k].mean().item()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(out))
    return out


def sharded(model: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
    """Returns the loop's own sharded state."""
    state = {"model": model.module.sharded_state_dict()}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading)
    return state


def save(folder: Path, model: Any, optimizer: Any, loop: OwnLoop | None, done: int) -> None:
    """Saves the run, with its weighting in the same checkpoint, in a new folder per call."""
    state = {**sharded(model, optimizer, loading=False), "done": done}
    if loop is not None:
        state.update(loop.sharded_state_dict())
    path = folder / f"step_{done:07d}"
    path.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(path))


def load(folder: Path, model: Any, optimizer: Any, loop: OwnLoop | None) -> int:
    """Resumes the run from its last checkpoint; returns the number of steps done."""
    found = sorted(folder.glob("step_*"))
    if not found:
        return 0
    path = str(found[-1])
    state = dist_checkpointing.load(sharded(model, optimizer, loading=True), path)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    done = int(dist_checkpointing.load_common_state_dict(path)["done"])
    if loop is not None:
        loop.load(path, done)
    return done


if __name__ == "__main__":
    main()
