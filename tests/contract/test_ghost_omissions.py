"""The ghost estimator never leaves out a term in silence: it names the layer, or is not chosen.

On small modules of plain torch: layers that the hooks do not see once in each pass, models that run
more often than there are micro-batches, and what `choose_estimator` does with a layer that is not
known. tests/unit/meta_gradient/test_ghost_layers.py has which parameters are covered at all.
What these tests do not exercise: a weight that is used by its own layer, once, and elsewhere too;
no hook sees that, and `--dwm-verify-meta-gradient` is there to find out.
"""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.meta_gradient.estimators import choose_estimator  # noqa: E402
from megatron_dwm.meta_gradient.ghost import recording as ghost  # noqa: E402

B = 3


class Odd(torch.nn.Module):
    """Two linear layers, of which the second is used in the way that `use` says."""

    def __init__(self, use):
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.use = use

    def forward(self, x):
        return self.use(self.two, self.one(x))


class Wanted:
    """A `Direction` that can be referred to weakly."""

    def __init__(self, call):
        self.call = call

    def __call__(self, parameter):
        return self.call(parameter)


def record(model, groups, m, runs=1, micro_batch_size=B, calls=1, v=torch.ones_like):
    """Records m micro-batches, each its forward (or `calls` of them) and backward in turn."""
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    layers = ghost.Ghost([model], config, groups, micro_batch_size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(5, B, 4, generator=generator) for _ in range(m)]
    with layers.recording(v, m) as total:
        for _ in range(runs):
            for x in inputs:
                sum(model(x).tanh().sum() for _ in range(calls)).backward()
        return total()


class TestOmissions:
    @pytest.mark.parametrize("m", [1, 2, 3])
    @pytest.mark.parametrize(
        ("use", "words"),
        [
            (lambda layer, x: F.linear(x, layer.weight, layer.bias), "seen 0 times in"),
            (lambda layer, x: layer(layer(x)), "'two' (Linear) was seen"),
            (lambda layer, x: layer(x).detach() + x, "seen 0 times in"),
        ],
        ids=["bypassed", "called-twice", "cut-off"],
    )
    def test_a_layer_that_the_hooks_do_not_see_once_is_named(self, groups, m, use, words):
        with pytest.raises(DWMError, match="layer 'two'") as caught:
            record(Odd(use), groups, m)
        assert words in str(caught.value)
        assert "--dwm-estimator finite_difference" in str(caught.value)
        assert record(Odd(lambda layer, x: layer(x)), groups, m).shape == (m * B,)

    @pytest.mark.parametrize("m", [1, 2, 3])
    def test_a_model_that_is_run_twice_in_a_micro_batch(self, groups, m):
        with pytest.raises(DWMError, match=f"ran {2 * m} times in {m} micro-batches"):
            record(Odd(lambda layer, x: layer(x)), groups, m, calls=2)

    def test_a_graph_that_outlives_the_step_keeps_nothing_of_it(self, groups):
        """As an MoE layer's probabilities have; the directions are as large as the model."""
        outputs, kept = [], []

        def keep(layer, x):
            outputs.append(layer(x))
            return outputs[-1]

        def direction(parameter):
            v = torch.ones_like(parameter)
            kept.append(weakref.ref(v))
            return v

        def step():
            wanted = Wanted(direction)
            kept.append(weakref.ref(wanted))
            record(Odd(keep), groups, 2, v=wanted)

        step()
        gc.collect()
        assert outputs[0].grad_fn is not None and len(kept) > 4
        assert not any(alive() for alive in kept)

    @pytest.mark.parametrize("m", [1, 2])
    def test_passes_that_the_rerun_machine_takes_again_count_once(self, groups, m):
        """Only where it may: without the machine, twice as many passes are an error."""
        torch.manual_seed(0)
        model, machine = Odd(lambda layer, x: layer(x)), get_rerun_state_machine()
        once, mode = record(model, groups, m), machine.mode
        with pytest.raises(DWMError, match="the model ran"):
            record(model, groups, m, runs=2)
        machine.mode = RerunMode.VALIDATE_RESULTS
        try:
            assert torch.equal(record(model, groups, m, runs=2), once)
            with pytest.raises(DWMError, match="layer 'two'"):
                record(Odd(lambda layer, x: layer(layer(x))), groups, m, runs=2)
        finally:
            machine.mode = mode

    def test_samples_in_another_dimension_are_named_with_their_shape(self, groups):
        with pytest.raises(DWMError, match=r"\[5, 3, 4\], not 4 samples in dimension 1"):
            record(Odd(lambda layer, x: layer(x)), groups, 1, micro_batch_size=4)


class TestChoice:
    def test_what_is_not_covered(self, groups):
        """Automatic: finite difference with the reason; asked for or needed: an error."""
        model = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.PReLU())]
        name, why = choose_estimator(DWMConfig(), model)
        assert name == "finite_difference" and "1.weight (of a PReLU)" in why
        with pytest.raises(DWMError, match=r"does not cover the parameter 1\.weight"):
            choose_estimator(DWMConfig(estimator="ghost"), model)
        with pytest.raises(DWMError, match=r"1\.weight .*--dwm-lookahead next"):
            choose_estimator(DWMConfig(lookahead="current"), model)
        model[0][1].requires_grad_(False)
        assert choose_estimator(DWMConfig(lookahead="current"), model)[0] == "ghost"

    def test_finite_difference_is_taken_as_asked(self, groups):
        name, why = choose_estimator(DWMConfig(estimator="finite_difference"), None)
        assert name == "finite_difference" and "--dwm-estimator" in why
