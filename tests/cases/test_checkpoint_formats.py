"""Checkpoints of other formats and layers, and snapshots that are replaced.

Formats: runs of one rank go on from checkpoints of `--ckpt-format torch`; the truth is the stock
trainer's own run. Layers: Transformer Engine is not needed here; layers stand in for its own that
keep, as they do, an extra state where the local ones keep none. Snapshots: a run is killed at every
step of replacing one, with and without a file system that can exchange two folders.

NOT exercised: Transformer Engine itself; several ranks.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core import dist_checkpointing, mpu  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from megatron_dwm.checkpoint import snapshots  # noqa: E402
from megatron_dwm.checkpoint import state as state_module  # noqa: E402
from megatron_dwm.core.ranks import start_ranks  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.scoring import model_loading  # noqa: E402
from megatron_dwm.weighting_model.transformer import (  # noqa: E402
    DataWeightingModel,
    EmbeddingShape,
    dwm_transformer_config,
)
from tests.functional.harness import DWM, MOCK, TINY, Run, run_all  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MARKER = "metadata.json"


# --------------------------------------------------------------------------- formats


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    tiny = [*TINY, *MOCK]
    uniform, learned = [*tiny, "--dwm", "--dwm-policy", "uniform"], [*tiny, *DWM]
    old, load = ["--ckpt-format", "torch"], ["--load", str(folder / "old")]
    new, convert = ["--ckpt-format", "torch_dist"], ["--ckpt-convert-format", "torch_dist"]

    def save(name):
        return ["--save", str(folder / name), "--save-interval", "2"]

    def into(name):
        return [*convert, "--ckpt-convert-save", str(folder / name)]

    converted = ["--load", str(folder / "converted/torch_dist")]
    runs = [
        Run("first", [*tiny, *old, *save("old"), "--exit-interval", "2"]),
        Run("stock", [*tiny, *old, *load]),
        Run("uniform", [*uniform, *old, *load]),
        Run("detected", [*uniform, *new, *load, "--auto-detect-ckpt-format"]),
        Run("learned", [*learned, *old, *load]),
        Run("convert", [*learned, *old, *load, *into("converted")]),
        Run("after", [*learned, *new, *converted, *save("later")]),
        Run("lossy", [*learned, *new, "--load", str(folder / "later"), *into("lossy")]),
    ]
    return run_all(1, runs, folder)


@pytest.mark.parametrize("name", ["uniform", "detected"])
def test_uniform_weights_go_on_as_the_stock_trainer_does(results, name):
    assert len(results.losses("stock")) == 2
    assert results.losses(name) == results.losses("stock")


@pytest.mark.parametrize("name", ["learned", "after"])
def test_a_weighting_model_starts_where_the_format_holds_none(results, name):
    said = results.succeeded(name)[0]["stdout"]
    assert len(results.losses(name)) == 2
    assert "holds no weighting model; a fresh one starts" in said


def test_a_conversion_that_would_lose_the_weighting_model_is_refused(results):
    assert results["convert"][0]["code"] == 0, "there is none to lose"
    result = results["lossy"][0]
    assert result["code"] == 2
    errors = [line for line in result["stderr"].splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "--ckpt-convert-format torch_dist: the converted checkpoint would lack" in errors[0]
    assert not (results.folder / "lossy").exists()


# --------------------------------------------------------------------------- layers


@pytest.fixture(scope="module")
def groups():
    """Joins a process group of one."""
    start_ranks()
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield ProcessGroupCollection.use_mpu_process_groups()
    mpu.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def with_extra_state(module):
    """Makes a module keep an extra state, as the modules of Transformer Engine do."""
    kind = type(module)
    states = {
        "get_extra_state": lambda self: torch.zeros(0, dtype=torch.uint8),
        "set_extra_state": lambda self, state: None,
    }
    module.__class__ = type(f"Stateful{kind.__name__}", (kind,), states)


def weighting_model(groups, stateful, seed):
    torch.manual_seed(seed)
    llm = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        transformer_impl="local",
    )
    model = DataWeightingModel(
        config=dwm_transformer_config(llm, 2, like_llm=True),
        embedding=EmbeddingShape(vocab_size=64, max_sequence_length=32),
        pooling="mean",
        pg_collection=groups,
        pre_process=True,
        post_process=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    if stateful:
        for layer in model.decoder.layers:
            with_extra_state(layer.self_attention.core_attention)
        with_extra_state(model.decoder.final_layernorm)
    return model


def sharded(model, groups):
    return model.sharded_state_dict(prefix="dwm.", metadata={"dp_cp_group": groups.dp_cp})


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def stored(tmp_path, groups, stateful, **common):
    """Saves a weighting model; returns the folder and its parameters."""
    model = weighting_model(groups, stateful, seed=1)
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    dist_checkpointing.save({"dwm": {"model": sharded(model, groups), **common}}, str(folder))
    return folder, parameters(model)


BOTH_WAYS = [(False, True), (True, False), (False, False), (True, True)]


@pytest.mark.parametrize(("saved", "loaded"), BOTH_WAYS)
def test_a_weighting_model_is_resumed_with_other_layers(tmp_path, groups, saved, loaded):
    folder, truth = stored(tmp_path, groups, saved)
    model = weighting_model(groups, loaded, seed=2)
    scorer = SimpleNamespace(module=model, weights_changed=lambda: None)
    step = SimpleNamespace(scorer=scorer)
    state = {"model": sharded(model, groups)}
    original, state_module.sharded_state = state_module.sharded_state, lambda *a, **k: state
    try:
        state_module.load_sharded_state(step, str(folder), with_optimizer=False)
    finally:
        state_module.sharded_state = original
    found = parameters(model)
    assert all(torch.equal(found[name], value) for name, value in truth.items())


@pytest.mark.parametrize(("saved", "loaded"), BOTH_WAYS)
def test_a_weighting_model_scores_with_other_layers(tmp_path, groups, saved, loaded):
    folder, truth = stored(tmp_path, groups, saved)
    model = weighting_model(groups, loaded, seed=2)
    model_loading._load(model, SimpleNamespace(folder=str(folder), sharding={}), groups)
    found = parameters(model)
    assert all(torch.equal(found[name], value) for name, value in truth.items())


def test_a_weight_that_is_missing_is_not_passed_over(tmp_path, groups):
    model = weighting_model(groups, False, seed=1)
    state = {k: v for k, v in sharded(model, groups).items() if "linear_fc1.weight" not in k}
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    dist_checkpointing.save({"dwm": {"model": state}}, str(folder))
    with pytest.raises(DWMError, match=r"linear_fc1\.weight"):
        model_loading._load(model, SimpleNamespace(folder=str(folder), sharding={}), groups)


def test_damaged_shards_are_one_line(tmp_path, groups):
    folder, _ = stored(tmp_path, groups, False)
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    model = weighting_model(groups, False, seed=2)
    with pytest.raises(DWMError, match="cannot be loaded") as error:
        model_loading._load(model, SimpleNamespace(folder=str(folder), sharding={}), groups)
    assert "\n" not in str(error.value)


def language_model(groups, stateful):
    """Returns the state of a language model's layers, as the trainer asks for it."""
    model = weighting_model(groups, stateful, seed=1)
    return model.sharded_state_dict(prefix="", metadata={"dp_cp_group": groups.dp_cp})


@pytest.mark.parametrize(("saved", "loaded"), BOTH_WAYS)
@pytest.mark.parametrize("strictness", ["assume_ok_unexpected", "log_unexpected"])
def test_what_megatron_cannot_load_is_refused_before(tmp_path, groups, saved, loaded, strictness):
    """Megatron's own load says which of them; the error names the way out, which works."""
    from megatron_dwm.hosts.megatron_lm.load_check import check_extra_states

    dist_checkpointing.save(language_model(groups, saved), str(tmp_path))
    run = argparse.Namespace(
        load="run",
        transformer_impl="transformer_engine" if loaded else "local",
        dist_ckpt_strictness=strictness,
    )
    request = language_model(groups, loaded)
    try:
        dist_checkpointing.load(request, str(tmp_path), strict=strictness)
        loads = True
    except CheckpointException:
        loads = False
    if loads:
        check_extra_states(run, str(tmp_path))
    else:
        assert strictness == "assume_ok_unexpected"
        with pytest.raises(DWMError, match="--dist-ckpt-strictness log_unexpected"):
            check_extra_states(run, str(tmp_path))
    assert loads is not (loaded and not saved and strictness == "assume_ok_unexpected")


def test_a_norm_that_has_no_state_with_transformer_engine_either_is_no_reason(monkeypatch):
    """Mamba's own, in the layers of a hybrid model whose other norms have one."""
    from megatron_dwm.hosts.megatron_lm import load_check

    names = ["decoder.layers.0.mixer.norm.weight", "decoder.layers.0.norm.weight"]
    names += ["decoder.layers.0.norm._extra_state/shard_0_1", "decoder.final_norm.weight"]
    states = {"decoder.final_norm._extra_state/shard_0_1"}
    run = argparse.Namespace(
        load="run",
        transformer_impl="transformer_engine",
        dist_ckpt_strictness="assume_ok_unexpected",
    )
    monkeypatch.setattr(
        load_check, "load_sharded_metadata", lambda _: dict.fromkeys([*names, *states])
    )
    load_check.check_extra_states(run, "folder")
    monkeypatch.setattr(load_check, "load_sharded_metadata", lambda _: dict.fromkeys(names))
    with pytest.raises(DWMError, match="saved without Transformer Engine"):
        load_check.check_extra_states(run, "folder")


ORDERED = {"use_distributed_optimizer": True, "transformer_impl": "local"}
FUSED = {"transformer_impl": "transformer_engine"}


@pytest.mark.parametrize(
    ("saved", "run", "refused"),
    [
        ({}, FUSED, "--transformer-impl"),
        (FUSED, {}, "--transformer-impl"),
        ({}, {"moe_grouped_gemm": True}, "--moe-grouped-gemm"),
        (FUSED, FUSED, ""),
        ({"dist_ckpt_optim_fully_reshardable": True}, FUSED, ""),
        ({"use_distributed_optimizer": False}, FUSED, ""),
        ({}, {**FUSED, "use_distributed_optimizer": False}, ""),
        ({}, {**FUSED, "no_load_optim": True}, ""),
        ({}, {**FUSED, "finetune": True}, ""),
    ],
)
def test_weights_that_lie_in_the_order_of_other_layers_are_refused(
    monkeypatch, saved, run, refused
):
    """Megatron would load them one for another; test_transformer_engine.py has real runs."""
    from megatron_dwm.hosts.megatron_lm import load_check

    defaults = {**ORDERED, "moe_grouped_gemm": False}
    stored = argparse.Namespace(**{**defaults, **saved})
    monkeypatch.setattr(load_check, "common_state", lambda folder: {"args": stored})
    plain = {"load": "run", "no_load_optim": None, "finetune": False}
    built = argparse.Namespace(**{**defaults, **plain, **run})
    if not refused:
        load_check.check_order(built, "run")
        return
    with pytest.raises(DWMError, match=f"{refused} .* --dist-ckpt-optim-fully-reshardable"):
        load_check.check_order(built, "run")


# --------------------------------------------------------------------------- snapshots


class Killed(BaseException):
    """Stands for the end of the process."""


def write_snapshot(folder, value):
    """Writes a snapshot as Megatron does: its marker comes last."""
    os.makedirs(folder, exist_ok=True)
    Path(folder, "value").write_text(value)
    Path(folder, MARKER).write_text("{}")


def value_of(run):
    """Returns what the snapshot of a run holds, as the next run finds it."""
    return Path(snapshots.find_snapshot(str(run), stage=0), "value").read_text()


def one_rank(monkeypatch):
    """Stands for a process group of one."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda found, src: None)


def kill_at(monkeypatch, number, *places):
    """Ends the process before call `number` of any of these functions."""
    left = [number]

    def wrap(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    for module, name in places:
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-steps"])
@pytest.mark.parametrize("number", range(8))
def test_a_kill_at_any_step_leaves_a_whole_snapshot(tmp_path, monkeypatch, exchange, number):
    folder = tmp_path / "dwm_stage_001"
    write_snapshot(folder, "old")
    one_rank(monkeypatch)
    monkeypatch.setattr(snapshots, "sharded_state", lambda *args, **kwargs: {})

    def save(state, target):
        Path(target, "value").write_text("half")
        os.listdir(target)
        write_snapshot(target, "new")

    monkeypatch.setattr(dist_checkpointing, "save", save)
    with monkeypatch.context() as patches:
        if not exchange:
            swap = pytest.importorskip("megatron_dwm.files.folder_swap")
            patches.setattr(swap, "_exchange", lambda one, other: False)
        places = [(os, "rename"), (os, "makedirs"), (os, "listdir"), (shutil, "rmtree")]
        kill_at(patches, number, *places)
        step = SimpleNamespace(scorer=object())
        try:
            snapshots.save_snapshot(step, str(folder))
            done = True
        except Killed:
            done = False
    assert value_of(tmp_path) in (("new",) if done else ("old", "new"))
    # The next save is not hindered by what was left.
    snapshots.save_snapshot(step, str(folder))
    assert value_of(tmp_path) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dwm_stage_001"]


def test_a_save_that_fails_leaves_the_snapshot_of_before(tmp_path, monkeypatch):
    """A full disk, say."""
    write_snapshot(tmp_path / "dwm_stage_001", "old")
    one_rank(monkeypatch)
    monkeypatch.setattr(snapshots, "sharded_state", lambda *args, **kwargs: {})

    def save(state, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dist_checkpointing, "save", save)
    with pytest.raises(OSError, match="No space"):
        snapshots.save_snapshot(SimpleNamespace(scorer=object()), str(tmp_path / "dwm_stage_001"))
    assert value_of(tmp_path) == "old"


REPLACING = """
import shutil, sys
from pathlib import Path
from megatron_dwm.files import folder_swap

folder = sys.argv[1]
for number in range(100000):
    new = folder_swap.beside(folder)
    shutil.rmtree(new, ignore_errors=True)
    Path(new).mkdir()
    Path(new, "value").write_text(str(number) * 100)
    Path(new, "metadata.json").write_text("{}")
    folder_swap.swap_in(folder)
    print(number, flush=True)
"""


def test_a_real_kill_leaves_a_whole_snapshot(tmp_path):
    folder = tmp_path / "dwm_stage_001"
    write_snapshot(folder, "old")
    for attempt in range(12):
        command = [sys.executable, "-c", REPLACING, str(folder)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(0.002 * attempt)
            process.send_signal(signal.SIGKILL)
        value = value_of(tmp_path)
        number = value[: len(value) // 100]
        assert value == number * 100
        assert sorted(path.name for path in folder.iterdir()) == [MARKER, "value"]
