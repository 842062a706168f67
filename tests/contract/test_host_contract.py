"""What every trainer host must have and refuse; and what the loop of one's own checks of its user.

One rank. What hosts do is exercised by whole runs: tests/functional/test_own_loop.py, and the rest
of tests/functional for Megatron-LM's trainer.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dwm import DWMConfig, DWMError
from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.num_microbatches_calculator import (  # noqa: E402
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)

from megatron_dwm.checkpoint import stages  # noqa: E402
from megatron_dwm.hosts import own_loop  # noqa: E402
from megatron_dwm.hosts.base import TrainerHost  # noqa: E402
from megatron_dwm.hosts.megatron_lm.build import MegatronLM  # noqa: E402
from megatron_dwm.hosts.own_loop import OwnLoop, StepOutcome  # noqa: E402
from tests.contract.real_step import optimizer_of, wrapped  # noqa: E402

HOSTS = [MegatronLM, OwnLoop]
ATTRIBUTES = set(TrainerHost.__annotations__)


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_has_the_seam_s_methods_and_sets_its_attributes(host: type) -> None:
    for name, method in inspect.getmembers(TrainerHost, inspect.isfunction):
        if not name.startswith("_"):
            found = inspect.signature(getattr(host, name))
            assert list(found.parameters) == list(inspect.signature(method).parameters), name
    source = inspect.getsource(host.__init__)  # type: ignore[misc]
    assert all(f"self.{name}" in source for name in ATTRIBUTES)


class Samples(torch.utils.data.Dataset):
    """Two samples of two tokens."""

    def __init__(self, length: int = 2) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([index, index])}


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    next(data_iterator)
    losses = model(torch.ones(2, 6)).square()
    return losses, lambda output: (output.sum(), torch.tensor(6), {"loss": output.sum().detach()})


@pytest.fixture
def parts(one_rank: Any) -> Any:
    """A model in DDP, its optimizer, and the calculator of a batch of 4 in micro-batches of 2."""
    model = wrapped()
    model.config.finalize_model_grads_func = finalize_model_grads
    init_num_microbatches_calculator(0, None, 4, 2, 1)
    yield SimpleNamespace(model=model, optimizer=optimizer_of(model, clip_grad=1.0))
    unset_num_microbatches_calculator()


def loop_of(parts: Any, policy: str = "linupper", **changes: Any) -> OwnLoop:
    wanted = {"micro_batch_size": 2, "seq_length": 3, "steps": 10, **changes}
    config = DWMConfig(enabled=True, policy=policy)
    return OwnLoop(config, [parts.model], parts.optimizer, forward_step, **wanted)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"micro_batch_size": 4}, "micro_batch_size is 4"),
        ({"policy": "learned"}, "give meta_datasets"),
        (
            {"policy": "learned", "meta_datasets": [Samples(0)]},
            r"meta_datasets\[0\] has no samples",
        ),
        (
            {"policy": "learned", "meta_datasets": [Samples()], "meta_weights": [1.0, 2.0]},
            r"meta_weights is \[1.0, 2.0\] for 1",
        ),
    ],
)
def test_what_an_own_loop_is_given_is_checked(
    parts: Any, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DWMError, match=named):
        loop_of(parts, **changes)


@pytest.mark.parametrize(
    ("where", "setting", "value", "named"),
    [
        ("config", "context_parallel_size", 2, "--context-parallel-size 2"),
        ("config", "mtp_num_layers", 1, "--mtp-num-layers"),
        ("config", "fp8", "e4m3", "--fp8 is not supported with a meta set"),
        ("config", "cuda_graph_impl", "local", "--cuda-graph-impl local"),
        ("ddp_config", "num_distributed_optimizer_instances", 2, "instances 2"),
        ("config", "finalize_model_grads_func", None, "has no finalize_model_grads_func"),
    ],
)
def test_what_megatron_lm_s_flags_are_refused_for_is_refused_of_an_own_loop(
    parts: Any, where: str, setting: str, value: Any, named: str
) -> None:
    setattr(getattr(parts.model, where), setting, value)
    with pytest.raises(DWMError, match=named):
        loop_of(parts, policy="learned", meta_datasets=[Samples()])


def test_a_model_without_ddp_is_named(parts: Any) -> None:
    parts.model = parts.model.module
    with pytest.raises(DWMError, match="is a Linear; wrap the model"):
        loop_of(parts)


def test_a_missing_calculator_is_named(parts: Any) -> None:
    unset_num_microbatches_calculator()
    with pytest.raises(DWMError, match="init_num_microbatches_calculator first"):
        loop_of(parts)


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (None, "returned NoneType"),
        (StepOutcome({}), "no grad_norm, but the optimizer clips at 1.0"),
        (StepOutcome({}, grad_norm=1.0), "0 of 2 micro-batches"),
    ],
)
def test_a_step_that_is_not_what_was_agreed_is_refused(
    parts: Any, returned: Any, named: str
) -> None:
    batches = iter([Samples()[0], Samples()[1]])
    with pytest.raises(DWMError, match=named):
        loop_of(parts).step(lambda forward_step, iterator: returned, batches)


def test_a_frozen_loop_takes_each_stage_s_snapshot_once_and_none_over_a_checkpoint(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(stages.snapshots, "load_snapshot", lambda *a: taken.append(a[2]) or "")
    monkeypatch.setattr(own_loop.checkpoint, "load", lambda *a: "")
    monkeypatch.setattr(
        own_loop.dist_checkpointing, "check_is_distributed_checkpoint", lambda folder: True
    )
    loop = loop_of(parts)
    config = dataclasses.replace(
        loop.weighting.config, schedule="frozen", load="somewhere", policy="learned"
    )
    loop.weighting.config = config
    for step in range(4):  # 10 steps in 5 stages
        loop._stages.take(step)
    assert taken == [0, 1]
    loop.load("a checkpoint", 5)
    loop._stages.take(loop.iteration)
    assert (loop.iteration, taken) == (5, [0, 1])
    loop._stages.take(6)
    assert taken == [0, 1, 3]
