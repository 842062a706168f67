"""`megatron-dwm convert export` on legacy `mp_rank_*` checkpoints (`--ckpt-format torch`).

The files are made here: a model is cut into tensor-parallel shards and pipeline stages as the
trainer cuts it, by code of the test's own. A real one is read in tests/functional.
"""

import os

import pytest
import torch

from megatron_dwm.cli.convert.command import main
from megatron_dwm.conversion import (
    TorchDistCheckpoint,
    find_checkpoint,
    iter_hf_tensors,
)
from tests import tiny_hf_models

COLUMNS = ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1")
ROWS = ("linear_proj.weight", "linear_fc2.weight")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Returns the tensors of a model and its import, by name."""
    write = tiny_hf_models.cached(tmp_path_factory.mktemp)

    def make(name):
        folder, tensors = write(name)
        run = folder / "imported"
        if not run.exists():
            words = ["--hf-path", str(folder), "--megatron-path", str(run)]
            assert main(["import", *words, "--make-vocab-size-divisible-by", "64"]) == 0
        return tensors, TorchDistCheckpoint(find_checkpoint(run))

    return make


def shard(name, tensor, rank, tp, swiglu):
    """Returns what one tensor-parallel rank holds of a tensor."""
    if "layer_norm_" in name or "layernorm" in name:
        return tensor
    if "linear_fc1" in name and swiglu:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    if any(part in name for part in COLUMNS):
        return tensor.chunk(tp)[rank]
    return tensor.chunk(tp, 1)[rank] if name.endswith(ROWS) else tensor


def legacy(checkpoint, folder, tp, pp, chunks=1, local_norms=False, change=None):
    """Writes a checkpoint as `tp` x `pp` ranks with `chunks` virtual stages each would."""
    args, layers = checkpoint.args, checkpoint.args.num_layers
    per_chunk = layers // (pp * chunks)
    for rank in range(tp):
        for stage in range(pp):
            state = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
            for chunk in range(chunks):
                first = (chunk * pp + stage) * per_chunk
                model = {}
                for key in checkpoint.tensors:
                    stored = checkpoint.load(key)
                    if key.startswith("decoder.layers."):
                        for number in range(per_chunk):
                            name = key.replace("layers.", f"layers.{number}.")
                            if local_norms:
                                name = name.replace(
                                    "self_attention.linear_qkv.layer_norm_", "input_layernorm."
                                ).replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
                            model[name] = stored[first + number]
                    elif key.startswith("embedding."):
                        if stage == chunk == 0:
                            model[key] = stored
                    elif stage == pp - 1 and chunk == chunks - 1:
                        model[key] = stored
                tied = not args.untie_embeddings_and_output_weights
                if tied and pp > 1 and stage == pp - 1 and chunk == chunks - 1:
                    # The copy that the last stage of a tied model computes its logits with.
                    model["output_layer.weight"] = checkpoint.load(
                        "embedding.word_embeddings.weight"
                    )
                model = {
                    name: shard(name, tensor, rank, tp, args.swiglu).clone()
                    for name, tensor in model.items()
                }
                model["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
                state["model" if chunks == 1 else f"model{chunk}"] = model
            state["optimizer"] = {"exp_avg": torch.zeros(1000)}
            if change is not None:
                change(rank, stage, state)
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            path = folder / "iter_0000007" / name
            path.mkdir(parents=True)
            torch.save(state, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def export(run, out):
    return main(["export", "--megatron-path", str(run), "--hf-path", str(out)])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    ("tp", "pp", "chunks"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 4, 1), (2, 2, 2)]
)
def test_every_layout_gives_the_same_model(tmp_path, imported, name, tp, pp, chunks):
    tensors, checkpoint = imported(name)
    run = legacy(checkpoint, tmp_path / "run", tp, pp, chunks, local_norms=tp == 2)
    assert export(run, tmp_path / "out") == 0
    found = dict(iter_hf_tensors(tmp_path / "out"))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def _other_norm(rank, stage, state):
    if rank == 1:
        state["model"]["decoder.final_layernorm.weight"] += 1


def _no_args(rank, stage, state):
    del state["args"]


def _old(rank, stage, state):
    state["checkpoint_version"] = 1.0


def _experts(rank, stage, state):
    state["args"].num_experts = 8


def _no_model(rank, stage, state):
    del state["model"]


def _extra(rank, stage, state):
    state["model"]["decoder.layers.0.adapter.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_norm, "decoder.final_layernorm.weight differs between tensor-parallel ranks"),
        (_no_args, "carries no training arguments"),
        (_old, "checkpoint_version 1.0"),
        (_experts, "legacy checkpoint with --num-experts 8; only dense ones"),
        (_no_model, "model_optim_rng.pt holds no model"),
        (_extra, "decoder.layers.0.adapter.weight (2,) is unknown"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, imported, capsys, change, named):
    _, checkpoint = imported("llama")
    args = vars(checkpoint.args).copy()
    run = legacy(checkpoint, tmp_path / "run", 2, 1, change=change)
    vars(checkpoint.args).clear()
    vars(checkpoint.args).update(args)
    capsys.readouterr()
    assert export(run, tmp_path / "out") == 2
    message = capsys.readouterr().err.rpartition("\r")[2].splitlines()
    assert named in message[-1] and message[-1].startswith("megatron-dwm convert export: error: ")
    assert not (tmp_path / "out").exists()


def test_missing_ranks_are_named(tmp_path, imported, capsys):
    _, checkpoint = imported("qwen2")
    run = legacy(checkpoint, tmp_path / "run", 2, 2)
    lost = run / "iter_0000007" / "mp_rank_01_000"
    (lost / "model_optim_rng.pt").unlink()
    lost.rmdir()
    assert export(run, tmp_path / "out") == 2
    assert "lacks model_optim_rng.pt of tensor rank 1, pipeline rank 0" in capsys.readouterr().err
    (run / "iter_0000007" / "mp_rank_00_000_001").mkdir()
    assert export(run, tmp_path / "out") == 2
    assert "is the folder of an expert-parallel rank" in capsys.readouterr().err


class _Touch:
    """Pickles to a call that leaves a folder behind when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_the_files_is_executed(tmp_path, imported):
    """A call inside a legacy file is refused or inert, and never made."""
    _, checkpoint = imported("gpt2")
    trace = tmp_path / "trace"

    def add(rank, stage, state):
        state["bad"] = _Touch(str(trace))

    export(legacy(checkpoint, tmp_path / "run", 1, 1, change=add), tmp_path / "out")
    assert not trace.exists()
    os.mkdir(trace)
    assert trace.exists(), "the trace would be seen"


def test_other_readers_still_ask_for_torch_dist(tmp_path, imported):
    """Only the export reads legacy folders; whoever opens them otherwise is told what to do."""
    from megatron_dwm.conversion import ConversionError

    _, checkpoint = imported("gpt2")
    run = legacy(checkpoint, tmp_path / "run", 1, 1)
    with pytest.raises(ConversionError, match="--ckpt-convert-format torch_dist"):
        find_checkpoint(run)
