"""Seeded damages to a checkpoint: each is noticed, or changes nothing that a load would read.

The checkpoint is written by `torch.distributed.checkpoint` in one process, with the files and
names that Megatron's has. What Megatron wrote is damaged in
tests/functional/test_dwm_conversion.py.
What this file does NOT exercise: disks that fail, and two changes that fit each other.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import pickle
import random
import re

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint

from megatron_dwm.checkpoint.health import (
    _read_index,
    common_state,
    iterations_of,
    last_whole,
    problems_of,
    tracked,
)
from megatron_dwm.cli.convert.command import main as convert
from megatron_dwm.conversion import ConversionError

MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def write(folder, iteration=5, **more):
    """Writes one checkpoint into a run folder and returns its folder."""
    torch.manual_seed(3)
    shapes = {
        "embedding.word_embeddings.weight": (16, 6),
        "decoder.layers.mlp.linear_fc1.weight": (2, 8, 6),
        "decoder.final_layernorm.weight": (6,),
    }
    state = {}
    for name, shape in shapes.items():
        for prefix in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "dwm."):
            state[prefix + name] = torch.rand(shape)
    state["dwm.score.weight"] = torch.rand(1, 6).bfloat16()
    common = {"args": argparse.Namespace(num_layers=2, hidden_size=6), "iteration": iteration}
    common |= more
    state["common_state/shard_0_1"] = [common]
    checkpoint = folder / f"iter_{iteration:07d}"
    planner = dist_checkpoint.DefaultSavePlanner(flatten_state_dict=False)
    dist_checkpoint.save(state, checkpoint_id=checkpoint, planner=planner, no_dist=True)
    (checkpoint / "metadata.json").write_text(json.dumps(MARKER))
    _store_names_twice(checkpoint / ".metadata")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return checkpoint


def _store_names_twice(path):
    """Writes the index as Megatron's writer does, whose ranks send names of their own."""
    index = pickle.loads(path.read_bytes())
    index.storage_data = {
        dataclasses.replace(key, fqn="".join(list(key.fqn))): info
        for key, info in index.storage_data.items()
    }
    path.write_bytes(pickle.dumps(index))


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path)


def changed(data, rng):
    """Returns the data with one byte changed, and where."""
    at = rng.randrange(len(data))
    other = bytearray(data)
    other[at] ^= rng.randrange(1, 256)
    return bytes(other), at


def test_whole_checkpoint_has_no_problems(checkpoint):
    assert problems_of(checkpoint) == problems_of(checkpoint, deep=True) == []
    assert common_state(checkpoint)["iteration"] == 5


def test_every_changed_byte_of_the_index_is_noticed_or_harmless(checkpoint):
    """Harmless: the records that are read from it are equal."""
    path = checkpoint / ".metadata"
    whole, rng, noticed = path.read_bytes(), random.Random(1), 0
    expected = _read_index(path)
    for _ in range(600):
        data, at = changed(whole, rng)
        path.write_bytes(data)
        if problems_of(checkpoint):
            noticed += 1
            continue
        found = _read_index(path)
        assert found.state_dict_metadata == expected.state_dict_metadata, at
        assert found.storage_data == expected.storage_data, at
    assert noticed > 450


def test_every_changed_byte_of_the_weights_is_noticed_by_deep_or_harmless(checkpoint):
    """Harmless: every item is read as the same values."""
    (path,) = checkpoint.glob("*.distcp")
    whole, rng, noticed, shallow = path.read_bytes(), random.Random(2), 0, 0
    items = _read_index(checkpoint / ".metadata").storage_data.items()
    for _ in range(400):
        data, at = changed(whole, rng)
        path.write_bytes(data)
        shallow += not problems_of(checkpoint)
        if problems_of(checkpoint, deep=True):
            noticed += 1
            continue
        (info,) = (i for _, i in items if i.offset <= at < i.offset + i.length)
        part = slice(info.offset, info.offset + info.length)
        read = [torch.load(io.BytesIO(b[part]), weights_only=False) for b in (whole, data)]
        same = torch.equal(*read) if isinstance(read[0], torch.Tensor) else read[0] == read[1]
        assert same, at
    assert noticed > 150
    assert shallow > noticed, "without deep no tensor is read"


def test_every_changed_bit_of_the_marker_is_noticed_or_harmless(checkpoint):
    path = checkpoint / "metadata.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            assert problems_of(checkpoint) or json.loads(data) == MARKER, (at, bit)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c, shard: shard.unlink(), r"__0_0.distcp is missing"),
        (lambda c, shard: shard.write_bytes(shard.read_bytes()[:-1]), r"truncated: \d+ bytes, \d+"),
        (
            lambda c, shard: shard.write_bytes(shard.read_bytes() + b"x"),
            "longer than when it was written",
        ),
        (lambda c, shard: shard.write_bytes(b""), "truncated: 0 bytes"),
        (lambda c, shard: (c / ".metadata").unlink(), "index of the tensors, is missing"),
        (lambda c, shard: (c / ".metadata").write_bytes(b""), r"\.metadata is damaged"),
        (lambda c, shard: (c / "metadata.json").unlink(), "the save was not finished"),
        (lambda c, shard: (c / "metadata.json").write_text("[]"), "not a JSON object"),
        (lambda c, shard: c.rename(c.with_name("iter_0000007")), "is not there"),
    ],
)
def test_damage_is_named(checkpoint, damage, said):
    damage(checkpoint, checkpoint / "__0_0.distcp")
    problems = problems_of(checkpoint)
    assert len(problems) == 1 and re.search(said, problems[0])


def test_folder_of_another_iteration_is_noticed(checkpoint):
    renamed = checkpoint.rename(checkpoint.with_name("iter_0000007"))
    assert problems_of(renamed) == ["the common state is of iteration 5, not iter_0000007"]


def test_finetune_may_take_a_folder_of_another_iteration(checkpoint):
    renamed = checkpoint.rename(checkpoint.with_name("iter_0000099"))
    assert problems_of(renamed) and problems_of(renamed, any_iteration=True) == []


def test_marker_of_a_later_version_may_say_more(checkpoint):
    path = checkpoint / "metadata.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "written_by": "a later version"}))
    assert problems_of(checkpoint) == []
    path.write_text(json.dumps({**value, "written_by": "a later version", "common_backend": "x"}))
    assert "metadata.json" in problems_of(checkpoint)[0]


def test_an_index_that_asks_for_all_memory_is_damage(checkpoint):
    """LONG_BINPUT with a large number makes the unpickler reserve that many entries."""
    path = checkpoint / ".metadata"
    path.write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    assert problems_of(checkpoint) and "damaged" in problems_of(checkpoint)[0]


def test_manifest_catches_what_sizes_do_not(checkpoint):
    """`--verify-integrity`: a flipped byte of a tensor, by its file's SHA-256."""
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()
    }
    manifest = checkpoint / "integrity.json"
    manifest.write_text(json.dumps({"algorithm": "sha256", "files": digests}))
    assert problems_of(checkpoint) == problems_of(checkpoint, deep=True) == []
    digests[".metadata"] = "0" * 64
    manifest.write_text(json.dumps({"algorithm": "sha256", "files": digests}))
    assert problems_of(checkpoint) == [
        ".metadata is not what integrity.json says (SHA-256 differs)"
    ]
    manifest.write_text("{")
    assert "integrity.json is damaged" in problems_of(checkpoint)[0]


def test_legacy_folders_are_opened(tmp_path):
    path = tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": {"w": torch.arange(100.0)}}, path)
    folder = tmp_path / "iter_0000005"
    assert problems_of(folder) == problems_of(folder, deep=True) == []
    data = bytearray(path.read_bytes())
    data[data.find(torch.arange(100.0).numpy().tobytes()[40:80])] ^= 1
    path.write_bytes(data)
    assert problems_of(folder) == []
    assert "CRC-32" in problems_of(folder, deep=True)[0]
    path.write_bytes(data[:-100])
    assert "mp_rank_00/model_optim_rng.pt is damaged" in problems_of(folder)[0]


def test_last_whole_iteration_is_found(tmp_path):
    for iteration in (2, 4, 6):
        write(tmp_path, iteration)
    (tmp_path / "iter_0000006" / "metadata.json").unlink()
    (tmp_path / "iter_x").mkdir()
    assert iterations_of(tmp_path) == [2, 4, 6]
    assert last_whole(tmp_path) == 4
    assert last_whole(tmp_path, before=4) == 2
    assert last_whole(tmp_path, before=2) is None


def test_inspect_names_weight_files_that_are_missing(tmp_path, capsys):
    """A run that drew documents by weight resumes with the files that its checkpoint names."""
    stages = {"data/web": [(0, "aa"), (40, "bb")]}
    sampling = {"sampling": {"stages": stages, "rules": {}}, "shape": None}
    write(tmp_path, dwm=sampling)
    (tmp_path / "dwm_weights").mkdir()
    (tmp_path / "dwm_weights" / "aa.weights").touch()
    assert convert(["inspect", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "dwm_weights/bb.weights is missing" in text and "aa.weights" not in text
    (tmp_path / "dwm_weights" / "bb.weights").touch()
    assert convert(["inspect", str(tmp_path)]) == 0
    assert "no DWM, 2 weight file(s)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "seven", "7\n8", "-1", "٧"])
def test_tracker_must_hold_a_number(tmp_path, text):
    assert tracked(tmp_path) is None
    path = tmp_path / "latest_checkpointed_iteration.txt"
    path.write_text("7\n")
    assert tracked(tmp_path) == "iter_0000007"
    path.write_text("release")
    assert tracked(tmp_path) == "release"
    path.write_text(text)
    with pytest.raises(ConversionError, match="must hold an iteration or 'release'"):
        tracked(tmp_path)
