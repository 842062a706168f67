"""The ghost estimator on Megatron's own modules: exact, and without traces.

A whole tiny GPT (`tiny_gpt.py`), with a backward pass for each sample as the truth. `<v, g_i>` is
compared for a random v, and again with v on one parameter at a time, so that no term can hide
behind the others.
What these tests do not exercise: more than one rank (tensor, sequence, pipeline and data
parallelism), Transformer Engine's layers (test_ghost_transformer_engine.py has those) and Apex's,
and bfloat16.
"""

import ast
import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402

from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.meta_gradient.estimators import choose_estimator  # noqa: E402
from megatron_dwm.meta_gradient.ghost import layer_rules as ghost_layers  # noqa: E402
from megatron_dwm.meta_gradient.ghost import recording as ghost  # noqa: E402
from tests.contract.model_settings import EXPERTS, GPT, LLAMA, SELECTIVE  # noqa: E402
from tests.contract.tiny_gpt import (  # noqa: E402
    BLOCK,
    DROPOUT,
    FULL,
    B,
    M,
    Run,
    error,
    only,
    products,
)

TOLERANCE = 1e-4

CASES = {
    "llama": LLAMA,
    "gpt": GPT,
    "add-qkv-bias": {**LLAMA, "add_qkv_bias": True},
    "qk-rmsnorm": {**LLAMA, "qk_layernorm": True},
    "qk-layernorm": {**GPT, "qk_layernorm": True},
    "full-recompute": {**LLAMA, **FULL},
    "full-recompute-of-one-layer": {**GPT, **BLOCK},
    "recompute-attention": {**GPT, **SELECTIVE},
    "recompute-norms-and-mlp": {
        **LLAMA,
        **SELECTIVE,
        "qk_layernorm": True,
        "recompute_modules": ["core_attn", "mlp", "layernorm"],
    },
    "dropout": {**GPT, **DROPOUT},
    "dropout-full-recompute": {**GPT, **DROPOUT, **FULL},
    "moe": {**LLAMA, **EXPERTS},
    "moe-top1-alltoall": {
        **LLAMA,
        **EXPERTS,
        "moe_router_topk": 1,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_pre_softmax": True,
    },
    "moe-sigmoid-groups-shared": {
        **LLAMA,
        **EXPERTS,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "moe_shared_expert_intermediate_size": 16,
    },
    "moe-expert-bias": {
        **LLAMA,
        **EXPERTS,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    },
    "softmax-offset": {**LLAMA, "softmax_type": "learnable"},
    "softmax-offset-recomputed": {**GPT, **SELECTIVE, "softmax_type": "learnable"},
    "moe-auxiliary-losses": {
        **GPT,
        **EXPERTS,
        "add_bias_linear": False,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.5,
        "moe_z_loss_coeff": 0.5,
    },
}


@pytest.fixture(autouse=True)
def no_fp8(monkeypatch):
    """Recomputing norms asks Transformer Engine whether FP8 is on; without it there is no name."""
    names = {
        "FP8GlobalStateManager": SimpleNamespace(is_fp8_enabled=lambda: False),
        "activation_recompute_forward": lambda **_: contextlib.nullcontext(),
        "fp8_autocast": lambda **_: contextlib.nullcontext(),
    }
    for name, value in names.items():
        if not hasattr(megatron_random, name):
            monkeypatch.setattr(megatron_random, name, value, raising=False)


# --------------------------------------------------------------------------- exactness


class TestExact:
    @pytest.mark.parametrize("name", CASES)
    def test_every_sample(self, groups, name):
        run = Run(CASES[name], groups)
        expected = products(run.per_sample_gradients(), run.v)
        found = run.estimate(run.v)
        assert found.shape == (M * B,) and found.dtype == torch.float32
        assert error(found, expected) <= TOLERANCE
        # Negative control: the samples in another order.
        assert error(found.roll(1), expected) > 0.05

    @pytest.mark.parametrize(
        "name",
        [
            "llama",
            "gpt",
            "add-qkv-bias",
            "qk-rmsnorm",
            "qk-layernorm",
            "softmax-offset",
        ],
    )
    def test_each_parameter_alone(self, groups, name):
        run, errors = Run(CASES[name], groups), {}
        gradients = run.per_sample_gradients()
        for parameter in run.v:
            v = only(run.v, parameter)
            expected = products(gradients, v)
            assert expected.abs().max() > 1e-5, parameter
            errors[parameter] = error(run.estimate(v), expected)
        assert max(errors.values()) <= TOLERANCE, errors

    def test_cases_hold_what_their_names_say(self, groups):
        """Of tied embeddings one parameter with two terms; heads' norms; no positions with rope."""
        names = {case: set(Run(CASES[case], groups).v) for case in ("llama", "gpt", "qk-rmsnorm")}
        positions = "embedding.position_embeddings.weight"
        assert "output_layer.weight" in names["llama"] and positions not in names["llama"]
        assert "output_layer.weight" not in names["gpt"] and positions in names["gpt"]
        assert len([n for n in names["qk-rmsnorm"] if "q_layernorm" in n]) == 2
        assert len([n for n in names["gpt"] if n.endswith("bias")]) == 2 * 6 + 1

    def test_dropout_needs_the_random_state_of_the_real_pass(self, groups):
        """Negative control of the two cases with dropout."""
        run = Run(CASES["dropout"], groups)
        expected = products(run.per_sample_gradients(), run.v)
        run.rng = megatron_random._get_all_rng_states()
        assert error(run.estimate(run.v), expected) > 0.01

    @pytest.mark.parametrize("name", ["llama", "gpt", "full-recompute", "recompute-norms-and-mlp"])
    def test_read_off_the_training_pass_whose_gradient_stays_bit_identical(self, groups, name):
        """`--dwm-lookahead current`: v is elsewhere, the pass makes its own gradients."""
        run = Run(CASES[name], groups)
        expected = products(run.per_sample_gradients(), run.v)
        run.model[0].zero_grad_buffer()
        run.schedule()
        plain = run.gradient()
        assert run.finalized == 1
        assert error(run.train(run.v), expected) <= TOLERANCE
        assert run.finalized == 2
        assert all(torch.equal(plain[n], g) for n, g in run.gradient().items())

    @pytest.mark.parametrize("name", ["llama", "gpt"])
    def test_parameters_that_are_not_trained(self, groups, name):
        """The embeddings, where the graph begins, a norm and a linear layer."""
        freeze = [
            "embedding.word_embeddings.weight",
            "decoder.final_layernorm.weight",
            "decoder.layers.1.mlp.linear_fc1.weight",
        ]
        run = Run(CASES[name], groups, freeze)
        assert not set(freeze) & set(run.v)
        expected = products(run.per_sample_gradients(), run.v)
        assert error(run.estimate(run.v), expected) <= TOLERANCE
        assert error(run.train(run.v), expected) <= TOLERANCE
        trained = {n for n, p in run.model[0].module.named_parameters() if p.requires_grad}
        assert trained == set(run.v)


# --------------------------------------------------------------------------- no traces


def hooks(model):
    modules = list(model[0].modules())
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]


class TestTraces:
    def test_nothing_is_left_behind(self, groups):
        """Hooks, gradient buffers, functions, and a trainer's pass that is what it was."""
        run = Run(CASES["gpt"], groups)
        run.model[0].zero_grad_buffer()
        run.schedule()
        plain, before = run.gradient(), hooks(run.model)
        run.config.grad_sync_func, run.finalized = run.finalize, 0
        run.estimate(run.v)
        assert run.finalized == 0  # no gradients, none reduced
        assert all(torch.equal(g.cpu(), run.v[n]) for n, g in run.gradient().items())
        assert all(p.requires_grad and p.grad is None for p in run.parameters.values())
        assert run.config.finalize_model_grads_func == run.finalize
        assert run.config.grad_sync_func == run.finalize
        assert hooks(run.model) == before
        run.model[0].zero_grad_buffer()
        run.schedule()
        assert all(torch.equal(plain[n], g) for n, g in run.gradient().items())

    def test_after_an_exception_too(self, groups):
        run = Run(CASES["gpt"], groups)
        before = hooks(run.model)

        def fail():
            assert hooks(run.model) != before
            assert not any(p.requires_grad for p in run.parameters.values())
            raise KeyError

        with pytest.raises(KeyError):
            ghost.estimate(run.ghost(), lambda p: p.main_grad, M, run.model, fail)
        assert hooks(run.model) == before
        assert all(p.requires_grad for p in run.parameters.values())
        assert run.config.finalize_model_grads_func == run.finalize


# --------------------------------------------------------------------------- cover


class TestCover:
    def test_automatic_takes_ghost_where_it_covers_everything(self, groups):
        name, why = choose_estimator(DWMConfig(), Run(LLAMA, groups).model)
        assert name == "ghost" and why.startswith("auto") and "every trained parameter" in why
        name, why = choose_estimator(DWMConfig(estimator="ghost"), Run(LLAMA, groups).model)
        assert name == "ghost" and "--dwm-estimator" in why

    def test_mixture_of_experts_of_megatron(self, groups):
        """Its router and experts, unless something else decides who gets a token."""
        run = Run({**LLAMA, **EXPERTS}, groups)
        assert run.ghost().layers
        run.config.moe_input_jitter_eps = 0.1
        with pytest.raises(DWMError, match=r"mlp\.router\.weight \(in a mixture-of-experts layer"):
            run.ghost()
        run.config.moe_input_jitter_eps = None
        run.config.moe_router_load_balancing_type = "sinkhorn"
        with pytest.raises(DWMError, match="--moe-router-load-balancing-type sinkhorn"):
            run.ghost()

    def test_layers_of_transformer_engine_that_are_known_by_name_exist(self):
        """Its package is not needed to read Megatron's wrappers: names, and `(out, bias)`."""
        spec = importlib.util.find_spec("megatron.core.extensions")
        path = Path(spec.submodule_search_locations[0]) / "transformer_engine.py"
        tree = ast.walk(ast.parse(path.read_text()))
        classes = {n.name: n for n in tree if isinstance(n, ast.ClassDef)}
        for name in (n for n in ghost_layers._BY_NAME if n.endswith("Linear")):
            cls = classes[name]
            while not any(getattr(n, "name", "") == "forward" for n in cls.body):
                cls = classes[ast.unparse(cls.bases[0])]
            (forward,) = (n for n in cls.body if getattr(n, "name", "") == "forward")
            returns = [ast.unparse(n.value) for n in ast.walk(forward) if isinstance(n, ast.Return)]
            assert set(returns) <= {"out", "(out, None)", "(output, output_bias)"}, name
        assert "norm_module = " in path.read_text() and ".pytorch.RMSNorm" in path.read_text()
