"""Trains a tiny GPT with Megatron's stock trainer and keeps the logits of a fixed batch.

    torchrun ... _tiny_pretrain.py OUT.pt <Megatron's flags>
    LOGITS=OUT.pt torchrun ... _tiny_pretrain.py <Megatron's flags>

After the last iteration the model reads `probe_tokens`, and tokens `[b, s]` and logits
`[b, s, V]`, gathered over tensor-parallel ranks, go to OUT.pt. It needs nothing of Megatron's
repository but the wheel.
"""

import contextlib
import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dwm.hosts import cpu  # noqa: E402

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_tensor_model_parallel_region,
)
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from tests.functional.torch_norms import torch_norms  # noqa: E402

MODEL = []
# Ids are drawn below this, so that every vocabulary of the tests holds them.
NUM_IDS = 200


class RandomTokens(torch.utils.data.Dataset):
    """Sequences of random tokens, the same on every rank."""

    def __init__(self, size, seq_length):
        generator = torch.Generator().manual_seed(7)
        self.rows = torch.randint(0, NUM_IDS, (size, seq_length + 1), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"tokens": self.rows[index][:-1], "labels": self.rows[index][1:]}


def probe_tokens(batch_size, seq_length):
    """Returns the fixed batch `[b, s]` whose logits are compared."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, NUM_IDS, (batch_size, seq_length), generator=generator)


def datasets(sizes):
    """Provides training data only; every rank builds it."""
    args = get_args()
    return RandomTokens(sizes[0], args.seq_length), None, None


datasets.is_distributed = True


def positions(tokens):
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def loss_func(output):
    losses = output.float()
    tokens = torch.tensor(losses.numel(), dtype=torch.int)
    total = losses.sum()
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(iterator, model):
    """Megatron's forward step; keeps the model for the probe."""
    MODEL[:] = [model]
    batch = next(iterator)
    tokens = batch["tokens"]
    return model(tokens, positions(tokens), None, labels=batch["labels"]), loss_func


def forward_probe(tokens, iterator, model):
    return model(tokens, positions(tokens), None), lambda logits, non_loss_data: logits


def save_logits(path):
    """Runs the probe through the pipeline and saves what the last stage gives."""
    args = get_args()
    tokens = probe_tokens(args.micro_batch_size, args.seq_length)
    MODEL[0].eval()
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=partial(forward_probe, tokens),
            data_iterator=None,
            model=MODEL,
            num_microbatches=1,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if parallel_state.is_pipeline_last_stage():
        logits = gather_from_tensor_model_parallel_region(outputs[0])
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        if first and parallel_state.get_data_parallel_rank() == 0:
            torch.save({"tokens": tokens, "logits": logits}, path)


def main():
    logits_path = os.environ.get("LOGITS") or sys.argv.pop(1)
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    with torch_norms() if args.sequence_parallel else contextlib.nullcontext():
        pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    save_logits(logits_path)


if __name__ == "__main__":
    main()
