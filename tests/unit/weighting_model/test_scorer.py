"""The weighting model: micro-batches at once, a rank's gradients, snapshots to start from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.checkpoint.snapshots import find_snapshot  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.weighting_model.scorer import Scorer, micro_batches_at_once  # noqa: E402


def config(**changes):
    values = {
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 704,
        "num_attention_heads": 4,
        "pipeline_model_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "recompute_granularity": None,
    }
    return SimpleNamespace(**{**values, **changes})


LLM = {"num_layers": 12, "hidden_size": 768, "ffn_hidden_size": 2112, "num_attention_heads": 12}


@pytest.mark.parametrize(
    ("llm", "dwm", "expected"),
    [
        ({}, {}, 9),
        ({}, {"num_layers": 12, "hidden_size": 768, "ffn_hidden_size": 2112}, 1),
        ({}, {"ffn_hidden_size": 2112}, 3),
        ({}, {"num_attention_heads": 12}, 3),
        ({"pipeline_model_parallel_size": 2}, {}, 1),
        ({"recompute_granularity": "full"}, {}, 1),
        ({"tensor_model_parallel_size": 4}, {}, 9),
        # Each rank has a quarter of the LLM's activations, and all of the DWM's.
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, {}, 2),
    ],
)
def test_no_more_memory_than_the_llm(llm, dwm, expected):
    assert micro_batches_at_once(config(**{**LLM, **llm}), config(**dwm)) == expected


@pytest.mark.parametrize(
    ("limit", "count", "expected"), [(9, 8, 8), (5, 8, 4), (4, 6, 3), (1, 7, 1)]
)
def test_batches_are_equal(limit, count, expected):
    assert Scorer._together(SimpleNamespace(together=limit), count) == expected


def test_snapshot_of_the_stage_or_the_last_but_never_another_for_a_torn_one(tmp_path):
    for stage in (1, 2, 3):
        folder = tmp_path / f"dwm_stage_{stage:03d}"
        folder.mkdir()
        if stage != 2:
            (folder / "metadata.json").write_text("{}")
    assert find_snapshot(str(tmp_path), 0).endswith("dwm_stage_001")
    assert find_snapshot(str(tmp_path), 7).endswith("dwm_stage_003")
    with pytest.raises(DWMError, match="dwm_stage_002 has no metadata.json"):
        find_snapshot(str(tmp_path), 1)


@pytest.mark.parametrize(("sharded", "bad"), [(False, {0, 1}), (True, {1})])
def test_a_rank_looks_at_the_gradients_that_it_has_reduced(sharded, bad):
    """Rank 1 of two: with a share of its own, the first half of each bucket is not reduced here."""
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    for half in (0, 1):
        data = torch.ones(8)
        data[4 * half + 2] = float("nan")
        buffer = SimpleNamespace(
            grad_data=data,
            buckets=[SimpleNamespace(grad_data=data)],
            data_parallel_group=group,
            ddp_config=SimpleNamespace(use_distributed_optimizer=sharded),
        )
        ddp = SimpleNamespace(buffers=[buffer], expert_parallel_buffers=[])
        found = Scorer._bad_gradient(SimpleNamespace(ddp=ddp))
        assert bool(found) == (half in bad)
