"""Real Megatron optimizers around a tiny model on one rank, and the derivative of their steps."""

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core import optimizer as megatron_optimizer  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dwm.core import optimizers as optimizer_view  # noqa: E402
from megatron_dwm.meta_gradient.pull_back import InnerStep, trainable_parameters  # noqa: E402
from tests.contract.stand_in_fused_adam import FusedAdam  # noqa: E402

SIZE = 6 * 3 + 3  # parameters of `Linear`


class Linear(MegatronModule):
    def __init__(self, config):
        super().__init__(config=config)
        self.linear = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x)


def wrapped(dtype=torch.float32, **ddp_options):
    """A tiny model in Megatron's DDP."""
    bf16 = dtype == torch.bfloat16
    config = TransformerConfig(
        num_layers=1,
        hidden_size=6,
        num_attention_heads=1,
        bf16=bf16,
        params_dtype=dtype,
        use_cpu_initialization=True,
    )
    torch.manual_seed(0)
    module = Linear(config).to(device=cpu.device(), dtype=dtype)
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False
    ddp_config = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **ddp_options})
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=module)


def optimizer_of(ddp, dtype=torch.float32, distributed=False, **options):
    config = megatron_optimizer.OptimizerConfig(
        lr=0.01,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        **{"optimizer": "adam", "weight_decay": 0.0, **options},
    )
    return megatron_optimizer.get_megatron_optimizer(config, [ddp])


def precision_aware_of(ddp, dtype, monkeypatch, keeps_weights=True, dtypes=None, **options):
    """Megatron's distributed optimizer around the stand-in for Transformer Engine's FusedAdam.

    The configuration asks for Transformer Engine when it is made, so it is set after that.
    """
    fields = {
        "use_precision_aware_optimizer": True,
        "use_precision_aware_optimizer_no_fp8_or_ds_fp8": keeps_weights,
        **(dtypes or {}),
    }
    make = megatron_optimizer.OptimizerConfig

    def with_fields(**kwargs):
        config = make(**kwargs)
        for name, value in fields.items():
            assert hasattr(config, name)
            setattr(config, name, value)
        return config

    monkeypatch.setattr(megatron_optimizer, "OptimizerConfig", with_fields)
    monkeypatch.setattr(megatron_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    optimizer = optimizer_of(ddp, dtype, distributed=True, **options)
    monkeypatch.undo()
    return optimizer


def accumulate(ddp, optimizer, seed=1):
    """One backward pass into `main_grad`, reduced; zeroed first as the trainer does it."""
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    parameter = next(ddp.module.parameters())
    x = torch.randn(5, 6, generator=generator).to(parameter)
    ddp(x).float().square().sum().backward()
    ddp.finish_grad_sync()


def write(ddp, flat, add=False):
    """Sets the gradient buffers to a flat vector, or adds it."""
    parameters = trainable_parameters([ddp])
    parts = flat.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        part = part.view_as(p.main_grad)
        p.main_grad.copy_(p.main_grad + part if add else part)


def read(ddp):
    return torch.cat([p.main_grad.view(-1).float() for p in trainable_parameters([ddp])])


class RealStep:
    """The third step of a real optimizer, and how it changes when its gradient is moved.

    Args:
        build: returns a fresh (DDP model, Megatron optimizer), the same at each call.
    """

    def __init__(self, build):
        self.build = build
        generator = torch.Generator().manual_seed(7)
        noise, h = torch.randn(2, SIZE, generator=generator).to(cpu.device())
        self.h = h
        # Partly along G, where clipping by the global norm bites.
        _, self.grad, *_ = self.step(None)
        self.direction = noise + self.grad * noise.norm() / self.grad.norm()

    def step(self, amount):
        ddp, optimizer = self.build()
        for t in range(3):
            accumulate(ddp, optimizer, seed=t)
            if t == 2 and amount is not None:
                write(ddp, self.direction * amount, add=True)
            grad, lrs = read(ddp), optimizer_view.learning_rates(optimizer)
            _, norm, _ = optimizer.step()
        return ddp, grad, optimizer, lrs, norm

    def moved(self, amount):
        """`<h, theta+>` in float64 and the gradient, when it is moved by `amount`."""
        ddp, grad, optimizer, _, _ = self.step(amount)
        parameters = trainable_parameters([ddp])
        parts = self.h.double().split([p.numel() for p in parameters])
        of_parameter = {id(p): part for p, part in zip(parameters, parts, strict=True)}
        total = 0.0
        for shard in optimizer_view.shards(optimizer):
            weights = shard.main_param
            if isinstance(shard.optimizer.optimizer, FusedAdam):
                weights = shard.optimizer.optimizer.weights(weights)
            part = of_parameter[id(shard.model_param)][shard.start : shard.end]
            total += part.dot(weights.detach().view(-1).double()).item()
        return total, grad

    def measured(self, amount=0.02):
        """The derivative along the direction that the buffers could hold, and that direction."""
        (up, grad_up), (down, grad_down) = self.moved(amount), self.moved(-amount)
        return (up - down) / (2 * amount), (grad_up - grad_down) / (2 * amount)

    def pulled_back(self, change=lambda inner: None):
        """v of h, with the captured step changed before it is pulled back."""
        ddp, _, optimizer, lrs, norm = self.step(None)
        inner = InnerStep.capture(optimizer, lrs, norm)
        change(inner)
        write(ddp, self.h)
        inner.pull_back([ddp], torch.device("cpu"))
        return read(ddp)

    def check(self, clipped, rel, controls):
        """Compares, and sees that each change of the captured step spoils the comparison."""
        expected, direction = self.measured()
        found = (self.pulled_back() @ direction).item()
        assert found == pytest.approx(expected, rel=rel)
        assert (self.h @ direction).item() != pytest.approx(expected, rel=0.5)
        if clipped:
            controls = [*controls, without_projection]
        for change in controls:
            wrong = (self.pulled_back(change) @ direction).item()
            assert wrong != pytest.approx(expected, rel=0.05), change.__name__


def without_projection(inner):
    assert inner.clip[0] < 1.0 and inner.clip[1] > 0.0
    inner.clip = (inner.clip[0], 0.0)


def without_gradient(inner):
    """Leaves out the second term of Adam's Jacobian."""
    inner.entries = [(shard, torch.zeros_like(grad)) for shard, grad in inner.entries]


def as_plain_sgd(inner):
    for shard, _ in inner.entries:
        shard.group["nesterov"] = False
        shard.optimizer.config.optimizer = "sgd"


def as_other_decay(inner):
    for shard, _ in inner.entries:
        shard.optimizer.config.decoupled_weight_decay = True
