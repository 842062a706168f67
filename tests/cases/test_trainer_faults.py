"""Faults found in runs of the trainer, one test a kind.

Right values are those of stock Megatron (its parser, its schedules) or of Python itself.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dwm.hosts import cpu
from megatron_dwm.hosts.cpu import stand_in

cpu.install()

from megatron.core.num_microbatches_calculator import (  # noqa: E402
    StepBatchsizeNumMicroBatchesCalculator,
)
from megatron.core.rerun_state_machine import get_rerun_state_machine  # noqa: E402

from megatron_dwm.core import agreement  # noqa: E402
from megatron_dwm.core import contexts as guards  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.hosts.megatron_lm import attach, checks  # noqa: E402
from tests.functional.harness import ROOT  # noqa: E402


def trainee(**config):
    """The parts of the LLM that the guards touch."""
    settings = {"timers": None, "recompute_granularity": "full", "num_moe_experts": 2, **config}
    shared = SimpleNamespace(**settings)
    chunk = SimpleNamespace(
        config=shared,
        ddp_config=SimpleNamespace(check_for_nan_in_grad=True),
        eval=lambda: None,
        train=lambda: None,
    )
    return SimpleNamespace(model=[chunk], config=shared)


@pytest.mark.parametrize("coefficient", [0.01, [0.01, 0.02]])
def test_balancing_types_of_moe_layers_may_be_a_list(coefficient) -> None:
    """Megatron zips several types with as many coefficients."""
    llm = trainee(moe_aux_loss_coeff=coefficient, moe_z_loss_coeff=1e-3)
    with guards.deterministic(llm):
        within = llm.config.moe_aux_loss_coeff
        assert type(within) is type(coefficient)
        assert within == ([0.0, 0.0] if isinstance(coefficient, list) else 0.0)
    assert llm.config.moe_aux_loss_coeff == coefficient


def test_quiet_within_quiet() -> None:
    """The outer one still holds when the inner one has ended."""
    machine, llm = get_rerun_state_machine(), trainee()
    before = machine.validate_result
    with guards.quiet(llm):
        with guards.quiet(llm):
            pass
        assert "validate_result" in vars(machine)
    assert "validate_result" not in vars(machine) and machine.validate_result == before


def run_arguments(**values):
    found = {
        "micro_batch_size": 2,
        "data_parallel_size": 2,
        "global_batch_size": 4,
        "virtual_pipeline_model_parallel_size": None,
        "step_batch_size_schedule": None,
        "eval_iters": 0,
    }
    return SimpleNamespace(**{**found, **values})


@pytest.mark.parametrize("schedule", ["0:64 250B:128 500B:256", "0:64,250B:2K"])
def test_default_meta_batch_follows_the_largest_batch_of_a_schedule(schedule: str) -> None:
    stock = StepBatchsizeNumMicroBatchesCalculator(2, 2, False, 1, schedule, 32)
    args = run_arguments(step_batch_size_schedule=schedule)
    assert checks.default_meta_batch(args) == stock.global_batch_size // 4


@pytest.mark.parametrize("share", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize("name", ["data_path", "train_data_path", "valid_data_path"])
def test_a_share_that_no_blend_can_have_is_named(name: str, share: str) -> None:
    args = run_arguments(**{name: ["0.5", "a", share, "b"]})
    (problem,) = checks._share_problems(args)
    assert problem.startswith(f"--{name.replace('_', '-')}: the share of b is {share};")
    assert checks._share_problems(run_arguments(**{name: ["0.5", "a", "2", "b"]})) == []
    assert checks._share_problems(run_arguments(**{name: ["a", "b", "c"]})) == []


def test_a_split_without_validation_data_is_named() -> None:
    args = run_arguments(data_path=["a"], split="100,0,0", eval_iters=5)
    (problem,) = checks._share_problems(args)
    assert "--split 100,0,0" in problem and "--eval-iters" in problem
    args.eval_iters = 0
    assert checks._share_problems(args) == []


def test_validation_data_that_is_not_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --eval-iters 0 nothing is evaluated, whatever --valid-data-path names."""
    blends = (None, [(["a"], None), (["b"], None), None])
    monkeypatch.setattr(checks, "get_blend_and_blend_per_split", lambda args: blends)
    assert checks.validation_prefixes(run_arguments(eval_iters=0, full_validation=False)) == []
    assert checks.validation_prefixes(run_arguments(eval_iters=1, full_validation=False)) == ["b"]


def test_every_refusal_names_a_way_out() -> None:
    for flag, why, way_out in checks.refusals():
        assert flag.startswith("--") and len(why.split()) > 2 and way_out


def test_packed_samples_of_the_data_loader_are_refused() -> None:
    assert "dataloader_inter_document_masking" in checks.REFUSED


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(stand_in, "_DRIVER_GPUS", str(tmp_path))
    monkeypatch.setattr(stand_in._State, "installed", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("MEGATRON_DWM_HOST", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(RuntimeError, match="torch finds none.*MEGATRON_DWM_HOST=cpu"):
        cpu.wanted()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cpu.wanted()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("MEGATRON_DWM_HOST", "cpu")
    assert cpu.wanted()


def test_a_script_in_a_checkout_finds_that_checkouts_megatron(tmp_path, repo_root) -> None:
    """As with python itself: the script's folder comes first, and before the host looks."""
    (tmp_path / "megatron" / "core" / "datasets").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "datasets" / "Makefile").write_text("all:\n")
    script = tmp_path / "pretrain.py"
    script.write_text(
        "import importlib.util\n"
        "from megatron_dwm.hosts.cpu import on_import\n"
        "print(*importlib.util.find_spec('megatron').submodule_search_locations)\n"
        "print('megatron.core.datasets.utils' in on_import.ON_IMPORT._pending)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "megatron_dwm.launch", str(script)],
        cwd=tmp_path.parent,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, pending = done.stdout.split("\n")[:2]
    assert first.split()[0] == str(tmp_path / "megatron")
    # A checkout has a Makefile, with which the trainer builds its helper: nothing is skipped.
    assert pending == "False"


def test_an_error_that_one_rank_sees_is_printed_by_that_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three ranks meet by a store; rank 0 speaks for all, or another where it says nothing."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(attach, "_PATIENCE", 0.2)

    def says(rank: int, message: str) -> bool:
        monkeypatch.setenv("RANK", str(rank))
        return attach._mine_to_say(message)

    assert [says(rank, "all see it") for rank in (0, 1, 2)] == [True, False, False]
    assert [says(rank, "not rank 0") for rank in (2, 1)] == [True, False]


class Ranks:
    """Three ranks in threads, with the collectives that agreements are made by.

    Args:
        patch: puts them in the place of torch's.
    """

    count = 3

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.barrier = threading.Barrier(self.count, timeout=20)
        self.rank, self.shared = threading.local(), {}
        patch.setattr(torch.distributed, "get_rank", lambda: self.rank.value)
        patch.setattr(torch.distributed, "get_world_size", lambda: self.count)
        patch.setattr(torch.distributed, "broadcast_object_list", self.broadcast)
        patch.setattr(torch.distributed, "all_gather_object", self.gather)

    def broadcast(self, found: list, src: int) -> None:
        if self.rank.value == src:
            self.shared["broadcast"] = list(found)
        self.barrier.wait()
        found[:] = self.shared["broadcast"]
        self.barrier.wait()

    def gather(self, found: list, mine: object) -> None:
        self.shared[self.rank.value] = mine
        self.barrier.wait()
        found[:] = [self.shared[rank] for rank in range(self.count)]
        self.barrier.wait()

    def all(self, agree: Any, call: Any) -> list:
        """Returns what an agreement on `call(rank)` returned, or raised, on each rank."""

        def on(rank: int) -> object:
            self.rank.value = rank
            try:
                return agree(lambda: call(rank))
            except Exception as error:
                return type(error), str(error)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(on, range(self.count)))


@pytest.mark.parametrize("failing", [None, 0, 1, 2])
def test_what_one_rank_raises_every_rank_raises(
    monkeypatch: pytest.MonkeyPatch, failing: int | None
) -> None:
    """And none waits; a rank other than 0 is named."""
    ranks, calls = Ranks(monkeypatch), []

    def call(rank: int) -> int:
        calls.append(rank)
        if rank == failing:
            raise OSError("a full disk")
        return 10 + rank

    found = ranks.all(agreement.on_each_rank, call)
    assert sorted(calls) == [0, 1, 2]
    if failing is None:
        assert found == [10, 11, 12]
    else:
        text = "a full disk" if failing == 0 else f"rank {failing}: a full disk"
        assert found == [(DWMError, text)] * 3
    calls.clear()
    found = ranks.all(agreement.on_first_rank, call)
    assert calls == [0]
    assert found == ([(DWMError, "a full disk")] if failing == 0 else [10]) * 3


def test_an_error_that_nobody_thought_of_is_told_with_its_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And printed whole where it is met."""

    def call(rank: int) -> None:
        raise KeyError("stages")

    for agree in (agreement.on_each_rank, agreement.on_first_rank):
        assert Ranks(monkeypatch).all(agree, call) == [(DWMError, "KeyError: 'stages'")] * 3
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("pp", "vp", "lost"), [(1, None, False), (2, None, False), (2, 2, True)])
def test_masks_of_documents_reach_every_stage_or_are_refused(pp, vp, lost) -> None:
    """Stages between the first and the last read no data; gradients were off by a third."""
    script = runpy.run_path(str(ROOT / "examples" / "pretrain_dwm.py"), run_name="not main")
    args = SimpleNamespace(
        reset_attention_mask=True,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
    )
    with pytest.raises(SystemExit, match="--reset-attention-mask") if lost else nullcontext():
        script["refuse_lost_masks"](args)
