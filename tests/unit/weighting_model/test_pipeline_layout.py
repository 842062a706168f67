"""Where the weighting model's layers lie, for any depth and any number of pipeline stages."""

import pytest

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.transformer.enums import LayerType  # noqa: E402
from megatron.core.transformer.pipeline_parallel_layer_layout import (  # noqa: E402
    PipelineParallelLayerLayout,
)

from megatron_dwm.weighting_model.transformer import pipeline_layout  # noqa: E402

SIZES = [(layers, stages) for layers in (1, 2, 3, 4, 7, 12) for stages in (2, 3, 4, 8)]


def test_one_stage_needs_no_layout():
    assert pipeline_layout(4, 1) is None


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (4, 2, [["embedding", "decoder", "decoder"], ["decoder", "decoder", "loss"]]),
        (3, 2, [["embedding", "decoder", "decoder"], ["decoder", "loss"]]),
        (1, 3, [["embedding", "decoder"], [], ["loss"]]),
        (2, 4, [["embedding", "decoder"], ["decoder"], [], ["loss"]]),
    ],
)
def test_layouts_by_hand(layers, stages, expected):
    """The remainder goes to the first stages; stages may be left with nothing to compute."""
    assert pipeline_layout(layers, stages) == expected


@pytest.mark.parametrize(("layers", "stages"), SIZES)
def test_every_layer_once_evenly_and_the_ends_at_the_ends(layers, stages):
    layout = pipeline_layout(layers, stages)
    counts = [stage.count("decoder") for stage in layout]
    assert len(layout) == stages
    assert sum(counts) == layers and max(counts) - min(counts) <= 1
    # Descending: a later stage never holds more, so that no layer is left to a short tail.
    assert counts == sorted(counts, reverse=True)
    assert layout[0][0] == "embedding" and layout[-1][-1] == "loss"
    assert sum(stage.count("embedding") + stage.count("loss") for stage in layout) == 2


@pytest.mark.parametrize(("layers", "stages"), SIZES)
def test_megatron_accepts_it_and_counts_the_same_layers(layers, stages):
    """Its own validation, and its own count of the layers that each stage builds."""
    layout = PipelineParallelLayerLayout(pipeline_layout(layers, stages), stages)
    layout.validate_layer_layout(num_layers=layers, mtp_num_layers=0)
    assert layout.virtual_pipeline_model_parallel_size == 1
    built = [
        layout.get_num_layers_to_build(layer_type=LayerType.decoder, vp_stage=0, pp_rank=stage)
        for stage in range(stages)
    ]
    assert sum(built) == layers
    offsets = [
        layout.get_layer_offset(layer_type=LayerType.decoder, vp_stage=0, pp_rank=stage)
        for stage in range(stages)
    ]
    assert offsets == [sum(built[:stage]) for stage in range(stages)]
