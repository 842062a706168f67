"""Megatron-Bridge: what is relied on in it, and what its `pretrain` does with the adapter.

Skipped where it cannot be imported, unless MEGATRON_BRIDGE names a checkout of it;
`tools/test_bridge.sh` installs what it takes. Its own trainer runs a tiny GPT, on one and two ranks
(`bridge_cases.py`), with Transformer Engine's Python classes beside it, as it imports them.

Not exercised here: GPUs, bf16, overlapped communication, context and expert parallelism, and models
with layers of Transformer Engine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm import DWMConfig, DWMError
from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.hosts import megatron_bridge  # noqa: E402
from tests.functional.harness import ROOT, environment, free_port  # noqa: E402

CHECKOUT = os.environ.get("MEGATRON_BRIDGE", "")
LAYOUTS = ("dp2", "dp2 sharded", "tp2", "pp2")


def found_at() -> str:
    """Returns the folder to put on the path, empty where it is on it."""
    if CHECKOUT:
        inner = Path(CHECKOUT, "src")
        return str(inner if inner.is_dir() else CHECKOUT)
    if importlib.util.find_spec("megatron.bridge") is None:
        pytest.skip("Megatron-Bridge is not installed: run tools/test_bridge.sh CHECKOUT")
    return ""


def results(ranks: int, out: Path, variables: dict[str, str]) -> list[dict[str, Any]]:
    path = [found_at(), os.environ.get("PYTHONPATH", "")]
    wanted = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OUT": str(out), **variables}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(free_port()), "tests/contract/bridge_worker.py"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**wanted),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{k}.json").read_text()) for k in range(ranks)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    found_at()
    variables = request.getfixturevalue("transformer_engine")
    return results(1, tmp_path_factory.mktemp("one"), variables)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    found_at()
    variables = request.getfixturevalue("transformer_engine")
    return results(2, tmp_path_factory.mktemp("two"), variables)


def case(found: dict[str, Any], name: str) -> dict[str, Any]:
    assert "failed" not in found[name], found[name].get("failed")
    return found[name]


def test_without_megatron_bridge_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test that runs everywhere: None in `sys.modules` is how Python says "not there"."""
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    with pytest.raises(DWMError, match=r"cannot be imported .*install megatron-bridge>=0\.6,<0\.7"):
        with megatron_bridge.weighted(DWMConfig(enabled=True)):
            pass


def test_what_is_relied_on_is_there(one: dict[str, Any]) -> None:
    found = case(one, "signatures")
    assert tuple(found["train_step"]) == megatron_bridge.TRAIN_STEP
    assert [n for n in found["state_dict"] if n in megatron_bridge.STATE_DICT] == [
        *megatron_bridge.STATE_DICT
    ]
    assert {*megatron_bridge.EVENTS} <= {*found["events"]}
    assert {"state", "model", "optimizer"} <= {*found["context"]}
    assert found["called_by_its_global"]


def test_uniform_weights_are_stock_training(one: dict[str, Any]) -> None:
    stock, uniform = case(one, "stock"), case(one, "uniform")
    assert len(stock["steps"]) == 6
    assert (uniform["steps"], uniform["digest"]) == (stock["steps"], stock["digest"])


def test_meta_steps_leave_the_model_alone_while_the_gate_is_closed(one: dict[str, Any]) -> None:
    stock, gated = case(one, "stock"), case(one, "gated")
    assert gated["digest"] == stock["digest"]


def test_the_head_learns_and_its_weights_reach_the_model(one: dict[str, Any]) -> None:
    head = case(one, "head")
    assert [line.get("meta_loss", 0) > 0 for line in head["log"]] == [False, *[True] * 5]
    assert any(line["max_weight"] > 1 for line in head["log"])
    assert head["digest"] != case(one, "stock")["digest"]


def test_a_meta_set_of_indexed_data(one: dict[str, Any]) -> None:
    log = case(one, "indexed")["log"]
    assert [line.get("meta_loss", 0) > 0 for line in log] == [False, *[True] * 5]


@pytest.mark.parametrize("name", ["uniform", "gated", "head", "no callback", "form model"])
def test_the_trainer_s_functions_are_put_back(one: dict[str, Any], name: str) -> None:
    found = case(one, name)
    assert found["rebound"] and found["restored"]


def test_a_resumed_run_takes_the_same_steps(one: dict[str, Any]) -> None:
    head, resumed = case(one, "head"), case(one, "resumed")
    assert resumed["steps"] == head["steps"][4:]
    assert resumed["digest"] == head["digest"]
    weights = [[line["max_weight"] for line in case(one, n)["log"]] for n in ("head", "resumed")]
    assert weights[1] == weights[0][4:]


def test_the_stock_trainer_loads_such_a_checkpoint(one: dict[str, Any]) -> None:
    assert len(case(one, "stock from it")["steps"]) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("another signature", "train_step takes model, but forward_step_func, data_iterator"),
        ("another version", "was found; megatron_dwm supports megatron-bridge>=0.6,<0.7"),
        ("no callback", "pretrain was not given its callback"),
        ("form model", "--dwm-form is model in Megatron-Bridge's trainer"),
        ("no such data", "--dwm-meta-data-path: "),
        ("no meta set", "give meta_data_path in the DWMConfig, or weighted() meta_datasets"),
        ("whole batches", "dataset.dataloader_type batch"),
    ],
)
def test_what_cannot_work_is_said(one: dict[str, Any], name: str, said: str) -> None:
    assert said in case(one, name)["error"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks(two: list[dict[str, Any]], layout: str) -> None:
    for found in two:
        stock, uniform = case(found, f"{layout} stock"), case(found, f"{layout} uniform")
        assert (uniform["steps"], uniform["digest"]) == (stock["steps"], stock["digest"])
        assert case(found, f"{layout} head")["digest"] != stock["digest"]
    log = case(two[1], f"{layout} head")["log"]
    assert [line.get("meta_loss", 0) > 0 for line in log] == [False, *[True] * 5]
