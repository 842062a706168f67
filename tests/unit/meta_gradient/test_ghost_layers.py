"""Ghost formulas of each layer against per-sample gradients by autograd, and what is refused.

For each sample i alone, `<v, dl_i/dp>` summed over the layer's parameters, with a random v and a
loss that is not linear in the layer's output, so that no term can vanish or cancel unseen. Shapes:
s tokens, b samples; hidden states `[s, b, h]`, heads `[s, b, heads, d]`, ids `[b, s]`.

Transformer Engine's layers are imitated here in plain torch, with the names and attributes of its
public source (2.x: `layernorm_linear.py`, `linear.py`, `ops/basic/rmsnorm.py`) and of Megatron's
wrappers: names of classes and packages, `layer_norm_weight [h]`, `layer_norm_bias` (None with
RMSNorm), `normalization`, `eps`, `zero_centered_gamma`, `sequence_parallel`, `tp_group`, where
there is no bias an empty tensor that is no parameter, outputs `(out, bias or None)`.
What this does NOT show: that Transformer Engine's own classes do as these do (for which there is
tests/contract/test_ghost_transformer_engine.py), its kernels, FP8, and tensor or sequence
parallelism.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.meta_gradient.ghost import embeddings, linear, norms  # noqa: E402
from megatron_dwm.meta_gradient.ghost.layer_rules import register, rule_of  # noqa: E402
from megatron_dwm.meta_gradient.ghost.linear import linear_dot  # noqa: E402
from megatron_dwm.meta_gradient.ghost.recording import Ghost, refusal, uncovered_parameters  # noqa: E402
from megatron_dwm.meta_gradient.ghost.rule import ByDimension, ByRow, Call  # noqa: E402

S, B, H = 5, 3, 6
TOLERANCE = 1e-5


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=1):
    """The module with random parameters, norm weights and biases too."""
    for k, parameter in enumerate(module.parameters()):
        parameter.data = randn(*parameter.shape, seed=100 * seed + k)
    return module


def directions(module, only=None):
    """A random v for each parameter; with `only`, zero for all others."""
    names = dict(module.named_parameters())
    v = {id(p): randn(*p.shape, seed=50 + k) for k, p in enumerate(names.values())}
    for name, parameter in names.items():
        if only not in (None, name):
            v[id(parameter)].zero_()
    return lambda parameter: v.get(id(parameter))


def sample_losses(output, batch_dim):
    """`[b]`: each sample's loss, not linear in its part of the output."""
    losses = torch.tanh(output) * randn(*output.shape, seed=9)
    return losses.sum([d for d in range(output.dim()) if d != batch_dim])


def first(output):
    """The output with the bias that its user adds later (`skip_bias_add`)."""
    if not isinstance(output, tuple):
        return output
    out, bias = output
    return out if bias is None else out + bias


def by_autograd(module, x, v, batch_dim):
    parameters = [p for p in module.parameters() if p.requires_grad and v(p) is not None]
    found = []
    for i in range(B):
        loss = sample_losses(first(module(x)), batch_dim)[i]
        grads = torch.autograd.grad(loss, parameters)
        found.append(sum((g.double() * v(p)).sum() for g, p in zip(grads, parameters, strict=True)))
    return torch.stack(found)


def by_formula(module, x, v, batch_dim, share=lambda parameter: 1.0):
    output = module(x)
    total = first(output)
    (grad,) = torch.autograd.grad(sample_losses(total, batch_dim).sum(), total)
    with torch.no_grad():
        rule = rule_of(module)
        return rule.formula(Call(module, x, module.weight, rule.samples(module)), grad, v, share)


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def agrees(module, x, only=None):
    """Whether the formula gives what autograd gives, per sample."""
    batch_dim, v = rule_of(module).samples(module).dim, directions(module, only)
    expected = by_autograd(module, x, v, batch_dim)
    assert expected.abs().min() > 1e-3  # nothing is proved by zeros
    return error(by_formula(module, x, v, batch_dim), expected) <= TOLERANCE


# --------------------------------------------------------------------------- imitations


def imitation(name, package="megatron.core.extensions.transformer_engine"):
    """Gives a class the name and the package by which the formula is found."""

    def rename(cls):
        cls.__name__, cls.__module__ = name, package
        return cls

    return rename


class LinearLike(torch.nn.Module):
    """What Transformer Engine's linear layers have in common."""

    def __init__(self, inputs, outputs, bias=True, return_bias=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs))
        self.bias = torch.nn.Parameter(torch.empty(outputs)) if bias else torch.Tensor()
        self.te_return_bias = return_bias and bias
        self.sequence_parallel, self.tp_group = False, None

    def forward(self, x):
        bias = self.bias if self.bias.numel() else None
        if self.te_return_bias:
            return F.linear(x, self.weight), bias
        return F.linear(x, self.weight, bias), None


@imitation("TEColumnParallelLinear")
class Column(LinearLike):
    pass


@imitation("TERowParallelLinear")
class Row(LinearLike):
    pass


@imitation("TELayerNormColumnParallelLinear")
class NormColumn(LinearLike):
    def __init__(self, inputs, outputs, normalization, zero_centered_gamma=False, **options):
        super().__init__(inputs, outputs, **options)
        self.normalization, self.zero_centered_gamma = normalization, zero_centered_gamma
        self.eps = 1e-3
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(inputs))
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.empty(inputs))

    def forward(self, x):
        gamma = self.layer_norm_weight + (1.0 if self.zero_centered_gamma else 0.0)
        if self.normalization == "RMSNorm":
            return super().forward(F.rms_norm(x, gamma.shape, gamma, self.eps))
        return super().forward(F.layer_norm(x, gamma.shape, gamma, self.layer_norm_bias, self.eps))


@imitation("RMSNorm", "transformer_engine.pytorch.module.rmsnorm")
class TERMSNorm(torch.nn.Module):
    def __init__(self, size, zero_centered_gamma=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size))
        self.eps, self.zero_centered_gamma = 1e-3, zero_centered_gamma

    def forward(self, x):
        gamma = self.weight + 1.0 if self.zero_centered_gamma else self.weight
        return F.rms_norm(x, gamma.shape, gamma, self.eps)


@imitation("LayerNorm", "transformer_engine.pytorch.module.layernorm")
class TELayerNorm(TERMSNorm):
    def __init__(self, size, zero_centered_gamma=False):
        super().__init__(size, zero_centered_gamma)
        self.bias = torch.nn.Parameter(torch.empty(size))

    def forward(self, x):
        gamma = self.weight + 1.0 if self.zero_centered_gamma else self.weight
        return F.layer_norm(x, gamma.shape, gamma, self.bias, self.eps)


# --------------------------------------------------------------------------- formulas


class TestLinear:
    @pytest.mark.parametrize(("inputs", "outputs"), [(H, 4), (4, H), (H, H)])
    def test_both_ways_round_give_the_same(self, inputs, outputs):
        """By `V x` where the output is narrower, else by `V^T grad`."""
        x, grad, v = randn(S, B, inputs), randn(S, B, outputs, seed=1), randn(outputs, inputs)
        expected = torch.einsum("sbo,oi,sbi->b", grad.double(), v.double(), x.double())
        assert error(linear_dot(x, grad, v, ByDimension(1)), expected) <= TOLERANCE
        # Strided inputs, as after a transpose, and bfloat16 activations with a float32 direction.
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert error(linear_dot(strided, grad, v, ByDimension(1)), expected) <= TOLERANCE
        assert error(linear_dot(x.bfloat16(), grad.bfloat16(), v, ByDimension(1)), expected) < 0.05

    @pytest.mark.parametrize("outputs", [4, 9])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", [Column, Row, torch.nn.Linear])
    def test_every_kind(self, kind, bias, outputs):
        module, x = randomised(kind(H, outputs, bias=bias)), randn(S, B, H)
        assert agrees(module, x)
        assert all(agrees(module, x, only=name) for name, _ in module.named_parameters())

    @pytest.mark.parametrize("kind", [Column, Row])
    def test_bias_that_its_user_adds(self, kind):
        module = randomised(kind(H, 4, return_bias=True))
        assert module(randn(S, B, H))[1] is module.bias
        assert agrees(module, randn(S, B, H)) and agrees(module, randn(S, B, H), only="bias")

    def test_negative_controls(self):
        """Without the bias, or with the samples in the wrong dimension, it does not agree."""
        module, x = randomised(Column(H, 4)), randn(B, B, H)
        v = directions(module)
        expected = by_autograd(module, x, v, 1)
        assert error(by_formula(module, x, v, 1), expected) <= TOLERANCE
        no_bias = directions(module, only="weight")
        assert error(by_formula(module, x, no_bias, 1), expected) > 0.05
        # x is [s, b, in]; were it [b, s, in], dimension 1 would not be the samples.
        assert error(by_formula(module, x, v, 0), by_autograd(module, x, v, 0)) > 0.05

    def test_parameters_without_a_direction_add_nothing(self):
        module, x = randomised(Column(H, 4)), randn(S, B, H)
        assert not by_formula(module, x, lambda parameter: None, 1).any()

    def test_a_replicated_parameter_counts_by_its_share(self):
        """A plain linear layer is replicated, of a row-parallel one the bias only."""
        x = randn(S, B, H)
        for module, replicated in ((torch.nn.Linear(H, 4), True), (Row(H, 4), False)):
            v = directions(randomised(module))
            whole = by_formula(module, x, v, 1)
            none = by_formula(module, x, v, 1, lambda parameter: 0.0)
            half = by_formula(module, x, v, 1, lambda parameter: 0.5)
            assert error(half - none, (whole - none) / 2) <= TOLERANCE
            weight = by_formula(module, x, directions(module, only="weight"), 1)
            assert not none.any() if replicated else error(none, weight) <= TOLERANCE


NORMS = pytest.mark.parametrize(
    "module",
    [
        torch.nn.LayerNorm(H, eps=1e-3),
        torch.nn.RMSNorm(H, eps=1e-3),
        torch.nn.RMSNorm(H),
        TELayerNorm(H),
        TERMSNorm(H),
        TELayerNorm(H, zero_centered_gamma=True),
        TERMSNorm(H, zero_centered_gamma=True),
    ],
    ids=["LayerNorm", "RMSNorm", "eps-of-the-type", "TE-LN", "TE-RMS", "TE-LN-0", "TE-RMS-0"],
)


class TestNorm:
    @NORMS
    @pytest.mark.parametrize("shape", [(S, B, H), (S, B, 2, H)], ids=["hidden", "heads"])
    def test_every_kind(self, module, shape):
        randomised(module)
        assert agrees(module, randn(*shape))
        assert all(agrees(module, randn(*shape), only=n) for n, _ in module.named_parameters())

    def test_negative_controls(self):
        """The other kind of norm, another epsilon, and no bias."""
        module, x = randomised(TELayerNorm(H)), randn(S, B, H) + 1.0
        v = directions(module)
        expected = by_autograd(module, x, v, 1)
        assert error(by_formula(module, x, directions(module, only="weight"), 1), expected) > 0.05
        grad = randn(S, B, H, seed=3)
        call, one = Call(module, x, module.weight), lambda parameter: 1.0
        right = norms.norm(call, grad, v, one)
        module.eps = 0.5
        assert error(norms.norm(call, grad, v, one), right) > 0.01
        other = randomised(TERMSNorm(H))
        call = Call(other, x, module.weight)
        assert error(norms.norm(call, grad, v, one), right) > 0.05


class TestNormColumnLinear:
    @pytest.mark.parametrize("outputs", [4, 9])
    @pytest.mark.parametrize(("bias", "return_bias"), [(True, False), (True, True), (False, False)])
    @pytest.mark.parametrize("zero_centered_gamma", [False, True])
    @pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
    def test_every_kind(self, normalization, zero_centered_gamma, bias, return_bias, outputs):
        options = {"bias": bias, "return_bias": return_bias}
        module = randomised(NormColumn(H, outputs, normalization, zero_centered_gamma, **options))
        x = randn(S, B, H) + 0.5
        names = {name for name, _ in module.named_parameters()}
        assert {"weight", "layer_norm_weight"} <= names and ("bias" in names) is bias
        assert agrees(module, x) and all(agrees(module, x, only=name) for name in names)

    def test_only_the_norm_or_only_the_linear_layer_is_trained(self):
        module, x = randomised(NormColumn(H, 4, "LayerNorm")), randn(S, B, H)
        for frozen in (["weight", "bias"], ["layer_norm_weight"], ["layer_norm_bias"]):
            left_out = {id(getattr(module, name)) for name in frozen}
            v = directions(module)

            def partial(p, v=v, left_out=left_out):
                return None if id(p) in left_out else v(p)

            expected = by_autograd(module, x, partial, 1)
            assert error(by_formula(module, x, partial, 1), expected) <= TOLERANCE

    def test_negative_controls(self):
        """The norm's terms left out, or its weight taken without the one that is added to it."""
        module, x = randomised(NormColumn(H, 4, "LayerNorm", True)), randn(S, B, H)
        v = directions(module)
        expected = by_autograd(module, x, v, 1)
        assert error(by_formula(module, x, directions(module, "weight"), 1), expected) > 0.05
        output = first(module(x))
        (grad,) = torch.autograd.grad(sample_losses(output, 1).sum(), output)
        module.zero_centered_gamma = False
        call = Call(module, x, module.weight)
        found = linear.norm_column_linear(call, grad, v, lambda parameter: 1.0)
        assert error(found, expected) > 0.05


class TestEmbedding:
    def test_learned_positions(self):
        """Each position once and, for word ids, some more than once in a sample."""
        module = randomised(torch.nn.Embedding(S, H))
        positions = torch.arange(S).expand(B, S)
        assert agrees(module, positions)
        ids = torch.randint(0, S, (B, S), generator=torch.Generator().manual_seed(2))
        assert len(ids.unique()) < ids.numel() and agrees(module, ids)

    def test_negative_control(self):
        """Ids of another sample."""
        module = randomised(torch.nn.Embedding(S, H))
        ids = torch.randint(0, S, (B, S), generator=torch.Generator().manual_seed(2))
        v = directions(module)
        expected = by_autograd(module, ids, v, 0)
        output = module(ids)
        (grad,) = torch.autograd.grad(sample_losses(output, 0).sum(), output)
        call = Call(module, ids.roll(1, 0), module.weight)
        found = embeddings.position_embedding(call, grad, v, lambda parameter: 1.0)
        assert error(found, expected) > 0.05


# --------------------------------------------------------------------------- cover


class TestCover:
    @pytest.mark.parametrize(
        "cls",
        [Column, Row, NormColumn, TERMSNorm, TELayerNorm, torch.nn.LayerNorm, torch.nn.Linear],
    )
    def test_a_subclass_is_not_taken_for_the_layer(self, cls):
        """It may compute something else."""
        sub = type("Sub", (cls,), {})
        assert rule_of(sub.__new__(sub)) is None
        assert rule_of(cls.__new__(cls)) is not None

    @pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "TERowParallelLinear"])
    def test_nor_is_a_class_of_that_name_from_elsewhere(self, name):
        other = type(name, (torch.nn.LayerNorm,), {"__module__": "their_model.layers"})
        assert rule_of(other(H)) is None

    def test_a_parameter_of_an_unknown_module_is_named_with_the_way_out(self):
        model = torch.nn.Sequential(
            torch.nn.Linear(H, H), torch.nn.Conv1d(2, 2, 1), torch.nn.PReLU()
        )
        found = uncovered_parameters([model])
        assert found == [
            "the parameter 1.weight (of a Conv1d)",
            "the parameter 1.bias (of a Conv1d)",
            "the parameter 2.weight (of a PReLU)",
        ]
        for words in ("1.weight (of a Conv1d)", "and 2 more", "--dwm-estimator finite_difference"):
            assert words in refusal(found)
        with pytest.raises(DWMError, match=r"1\.weight \(of a Conv1d\)"):
            Ghost([model], None, None, B, torch.device("cpu"))
        assert "more" not in refusal(found[:1])

    def test_parameters_that_are_not_trained_need_no_cover(self):
        model = torch.nn.Sequential(torch.nn.Linear(H, H), torch.nn.Conv1d(2, 2, 1))
        model[1].requires_grad_(False)
        assert uncovered_parameters([model]) == []

    def test_a_parameter_beside_known_layers_is_seen(self):
        """Of the module that holds it, whatever its children are."""
        model = torch.nn.Sequential(torch.nn.Linear(H, H))
        model.sink = torch.nn.Parameter(torch.zeros(2))
        assert uncovered_parameters([model]) == ["the parameter sink (of a Sequential)"]

    def test_experts_are_refused_in_words_although_their_layers_are_known(self):
        layer = type("MoELayer", (torch.nn.Module,), {})()
        layer.router = torch.nn.Linear(H, 2)
        model = torch.nn.ModuleDict({"mlp": layer, "other": torch.nn.Linear(H, H)})
        found = uncovered_parameters([model])
        assert [text.split()[2] for text in found] == ["mlp.router.weight", "mlp.router.bias"]
        assert all("no longer in the order of the samples" in text for text in found)
        layer.requires_grad_(False)
        assert uncovered_parameters([model]) == []


class TestShare:
    """By the rules of Megatron's `finalize_model_grads`; tests/distributed has real ranks."""

    @pytest.mark.parametrize(
        ("attributes", "sequence_parallel", "qk_layernorm", "shares"),
        [
            ({}, False, False, (1.0, 0.0)),
            ({"tensor_model_parallel": True}, False, False, (1.0, 1.0)),
            ({"average_gradients_across_tp_domain": True}, False, False, (0.5, 0.5)),
            ({"sequence_parallel": True}, True, False, (1.0, 1.0)),
            ({"sequence_parallel": True}, False, False, (1.0, 0.0)),
            ({}, True, False, (1.0, 0.0)),
            ({}, False, True, (1.0, 1.0)),
        ],
    )
    def test_on_two_ranks(self, attributes, sequence_parallel, qk_layernorm, shares):
        model = torch.nn.ModuleDict({"q_layernorm": torch.nn.LayerNorm(H)})
        for name, value in attributes.items():
            setattr(model["q_layernorm"].weight, name, value)
        config = SimpleNamespace(sequence_parallel=sequence_parallel, qk_layernorm=qk_layernorm)
        found = []
        for rank in range(2):
            tp = SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank)
            layers = Ghost([model], config, SimpleNamespace(tp=tp), B, torch.device("cpu"))
            found.append(layers.share(model["q_layernorm"].weight))
        assert tuple(found) == shares


class TestSampleMaps:
    """Rows of one tensor that belong to many samples, as those of an expert do."""

    def test_rows_are_summed_into_their_samples(self):
        rows, samples = 3 * B, torch.arange(3 * B) % B
        module = torch.nn.Linear(H, H)
        x, v = randn(rows, H, seed=1), directions(module)
        out = module(x)
        weights = randn(rows, H, seed=2)
        (grad,) = torch.autograd.grad((torch.tanh(out) * weights).sum(), out)
        expected = []
        for i in range(B):
            mine = samples == i
            loss = (torch.tanh(module(x[mine])) * weights[mine]).sum()
            grads = torch.autograd.grad(loss, list(module.parameters()))
            expected.append(
                sum((g * v(p)).sum() for g, p in zip(grads, module.parameters(), strict=True))
            )
        call = Call(module, x, module.weight, ByRow(samples, B))
        with torch.no_grad():
            found = linear.plain_linear(call, grad, v, lambda parameter: 1.0)
        assert error(found.double(), torch.stack(expected)) < TOLERANCE
        call.samples = ByRow(samples.roll(1), B)
        with torch.no_grad():
            wrong = linear.plain_linear(call, grad, v, lambda parameter: 1.0)
        assert error(wrong.double(), torch.stack(expected)) > 0.01

    def test_rows_of_padding_count_for_nobody(self):
        a, b = torch.ones(4, H), torch.ones(4, H)
        found = ByRow(torch.tensor([0, -1, 1, -1]), 2).dot(a, b)
        assert found.tolist() == [H, H]

    def test_a_gradient_of_other_rows_is_named(self):
        samples = ByRow(torch.tensor([0, 1, 1]), 2)
        assert samples.problem(torch.ones(3, H), 2) is None
        assert "3 rows of 2 samples" in samples.problem(torch.ones(4, H), 2)

    def test_a_layer_type_of_ones_own(self):
        class Scaled(torch.nn.Linear):
            pass

        assert rule_of(Scaled(H, H)) is None
        register(Scaled, rule_of(torch.nn.Linear(H, H)))
        assert rule_of(Scaled(H, H)) is rule_of(torch.nn.Linear(H, H))
