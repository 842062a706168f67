"""What is relied on in Megatron 0.19's DDP and optimizers, and that their steps are differentiated.

An upgrade of Megatron must fail here first. Real optimizers on one rank: the fp32, the bf16 and
the distributed one, with torch's Adam and SGD inside, and a stand-in for Transformer Engine's
FusedAdam as the precision-aware one.
What these tests do not exercise: more ranks (tests/distributed has those), Transformer Engine.
"""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core import optimizer as megatron_optimizer  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

from megatron_dwm.core import optimizers as optimizer_view  # noqa: E402
from megatron_dwm.core.trainee import Trainee  # noqa: E402
from megatron_dwm.core.trainer_state import TrainerState, refusal  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.meta_gradient.optimizers import derivatives as jacobian  # noqa: E402
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import check_supported  # noqa: E402
from megatron_dwm.meta_gradient.pull_back import pull_back_identity, trainable_parameters  # noqa: E402
from tests.contract.real_step import (  # noqa: E402
    SIZE,
    RealStep,
    accumulate,
    as_other_decay,
    as_plain_sgd,
    optimizer_of,
    precision_aware_of,
    read,
    without_gradient,
    wrapped,
    write,
)


def parameters_of(function):
    return list(inspect.signature(function).parameters)


KINDS = pytest.mark.parametrize(
    ("dtype", "distributed"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float32, True),
        (torch.bfloat16, True),
    ],
    ids=["fp32", "bf16", "distributed-fp32", "distributed-bf16"],
)


class TestDistributedDataParallel:
    def test_attributes(self, one_rank):
        ddp = wrapped(use_distributed_optimizer=True)
        assert len(ddp.remove_forward_pre_hook_handles) == 0
        assert ddp.ddp_config.overlap_param_gather is False
        assert list(ddp.expert_parallel_buffers) == []
        (buffer,) = ddp.buffers
        assert buffer.ddp_config.use_distributed_optimizer is True
        assert torch.distributed.get_world_size(buffer.data_parallel_group) == 1
        assert sum(bucket.grad_data.numel() for bucket in buffer.buckets) >= 6 * 3 + 3

    def test_signatures(self):
        assert "force_sync" in parameters_of(DistributedDataParallel.start_param_sync)
        assert "param_sync" in parameters_of(DistributedDataParallel.disable_forward_pre_hook)
        assert "force_all_reduce" in parameters_of(DistributedDataParallel.finish_grad_sync)
        assert parameters_of(DistributedDataParallel.enable_forward_pre_hook) == ["self"]
        assert {"config", "ddp_config", "module", "full_param_layout"} <= set(
            parameters_of(DistributedDataParallel)
        )
        assert parameters_of(DistributedOptimizer.compute_full_param_layout)[:4] == [
            "params",
            "bucket_size",
            "data_parallel_world_size",
            "ddp_config",
        ]

    def test_main_grad_is_a_view_of_the_bucket_that_zeroing_clears(self, one_rank):
        """v is written into `main_grad` and gathered through the buckets."""
        ddp = wrapped()
        found = trainable_parameters([ddp])
        assert len(found) == 2
        found[0].main_grad.fill_(3.0)
        data = torch.cat([bucket.grad_data for b in ddp.buffers for bucket in b.buckets])
        assert (data == 3.0).sum() == found[0].numel()
        ddp.zero_grad_buffer()
        assert not found[0].main_grad.any()


# 1: far below the norm of the gradients of `accumulate`; 1e3: far above; 0: off.
CLIPS = pytest.mark.parametrize("clip_grad", [1.0, 1e3, 0.0], ids=["clip", "inactive", "off"])


class TestRealStep:
    """`<v, dG>` is the change of `<h, theta+>` when the gradient of the real step moves by dG."""

    @KINDS
    @CLIPS
    @pytest.mark.parametrize(
        "decay",
        [
            {},
            {"weight_decay": 0.1},
            {"weight_decay": 5.0, "decoupled_weight_decay": False},
        ],
        ids=["none", "decoupled", "l2"],
    )
    def test_adam(self, one_rank, dtype, distributed, clip_grad, decay):
        def build():
            ddp = wrapped(dtype, use_distributed_optimizer=distributed)
            return ddp, optimizer_of(ddp, dtype, distributed, clip_grad=clip_grad, **decay)

        controls = [as_plain_sgd] if clip_grad == 1.0 else [as_plain_sgd, without_gradient]
        if "decoupled_weight_decay" in decay:
            controls.append(as_other_decay)
        RealStep(build).check(clip_grad == 1.0, 0.002, controls)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @CLIPS
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    @pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
    def test_sgd(self, one_rank, dtype, clip_grad, weight_decay, momentum, nesterov):
        """Megatron has no flag for Nesterov; a group of torch's SGD takes it all the same."""

        def build():
            ddp = wrapped(dtype)
            options = {"weight_decay": weight_decay, "sgd_momentum": momentum}
            optimizer = optimizer_of(ddp, dtype, optimizer="sgd", clip_grad=clip_grad, **options)
            for leaf in optimizer_view.leaf_optimizers(optimizer):
                for group in leaf.optimizer.param_groups:
                    group["nesterov"] = nesterov
            return ddp, optimizer

        RealStep(build).check(clip_grad == 1.0, 0.002, [as_plain_sgd] if nesterov else [])

    def test_sgd_in_the_distributed_optimizer_is_refused_by_megatron_itself(self, one_rank):
        ddp = wrapped(use_distributed_optimizer=True)
        with pytest.raises(AssertionError, match="Only Adam"):
            optimizer_of(ddp, distributed=True, optimizer="sgd")


class TestOptimizers:
    @KINDS
    def test_every_element_is_found_once_with_its_state_and_gradient(
        self, one_rank, dtype, distributed
    ):
        """The optimizers' group names, and the range map of the distributed one."""
        ddp = wrapped(dtype, use_distributed_optimizer=distributed)
        optimizer = optimizer_of(ddp, dtype, distributed)
        accumulate(ddp, optimizer)
        grads = {id(p): p.main_grad.clone().view(-1) for p in trainable_parameters([ddp])}
        successful, norm, _ = optimizer.step()
        assert successful and norm > 1.0
        factor = jacobian.clip_coefficient(float(norm), 1.0)
        seen = {}
        for shard in optimizer_view.shards(optimizer):
            count = shard.end - shard.start
            assert shard.main_param.dtype == torch.float32 and shard.main_param.numel() == count
            assert shard.state["exp_avg"].numel() == count
            assert shard.counts_in_norm()
            expected = grads[id(shard.model_param)][shard.start : shard.end] * factor
            assert torch.allclose(shard.stepped_grad(), expected, rtol=1e-5)
            key = id(shard.model_param)
            seen[key] = seen.get(key, 0) + count
        assert seen == {id(p): p.numel() for p in trainable_parameters([ddp])}

    @pytest.mark.skipif(not cpu.is_cpu(), reason="torch's Adam as the CPU host mends it")
    def test_a_rank_whose_share_is_padding_says_its_settings(self, one_rank):
        """With others it gathers what is saved; its own count of steps is not."""
        ddp = wrapped(use_distributed_optimizer=True)
        optimizer = optimizer_of(ddp, distributed=True)
        (leaf,) = optimizer_view.leaf_optimizers(optimizer)
        for group in leaf.optimizer.param_groups:
            group["params"] = []
        found = leaf.state_dict()["optimizer"]["param_groups"]
        assert [group["step"] for group in found] == [0] * len(leaf.optimizer.param_groups)
        assert len(leaf.optimizer.state) == 0

    def test_fields_of_the_configuration_that_are_read(self):
        fields = {field.name for field in dataclasses.fields(megatron_optimizer.OptimizerConfig)}
        assert {
            "optimizer",
            "fp16",
            "clip_grad",
            "decoupled_weight_decay",
            "use_precision_aware_optimizer",
            "optimizer_cpu_offload",
        } <= fields

    @staticmethod
    def configured(optimizer, options):
        for leaf in optimizer_view.leaf_optimizers(optimizer):
            for name, value in options.items():
                assert hasattr(leaf.config, name)
                setattr(leaf.config, name, value)
        return optimizer

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"optimizer": "lion"}, "--optimizer lion"),
            ({"optimizer": "muon"}, "--optimizer muon"),
            ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload"),
            ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer: AdamW"),
        ],
    )
    def test_exact_refuses_by_name_what_identity_accepts(self, one_rank, options, words):
        """Lion can not be built without emerging_optimizers; the name is what is looked at."""
        optimizer = optimizer_of(wrapped())
        check_supported(optimizer, "exact")
        self.configured(optimizer, options)
        with pytest.raises(DWMError, match=words) as caught:
            check_supported(optimizer, "exact")
        assert "--dwm-jacobian identity" in str(caught.value) and "\n" not in str(caught.value)
        check_supported(optimizer, "identity")

    def test_exact_refuses_an_unknown_wrapper_by_its_name(self, one_rank):
        class LayerWise:
            config, optimizer = optimizer_of(wrapped()).config, None

        with pytest.raises(DWMError, match="LayerWise: .*--dwm-jacobian identity"):
            check_supported(LayerWise(), "exact")
        check_supported(LayerWise(), "identity")

    @pytest.mark.parametrize("kind", ["exact", "identity"])
    def test_loss_scaling_is_refused(self, one_rank, kind):
        optimizer = self.configured(optimizer_of(wrapped()), {"fp16": True})
        with pytest.raises(DWMError, match="--fp16 .*--bf16"):
            check_supported(optimizer, kind)

    def test_identity_is_minus_the_learning_rate(self, one_rank):
        ddp = wrapped()
        h = torch.randn(SIZE, device=cpu.device())
        write(ddp, h)
        pull_back_identity(0.01, [ddp])
        assert torch.allclose(read(ddp), -0.01 * h)

    @pytest.mark.parametrize(("norm", "max_norm"), [(5.0, 1.0), (0.5, 1.0), (1e-6, 1e-6)])
    def test_megatrons_clip_factor_is_the_one_that_is_differentiated(self, norm, max_norm):
        parameter = torch.nn.Parameter(torch.zeros(4, device=cpu.device()))
        parameter.grad = torch.full_like(parameter, norm / 2)
        clip_grad_by_total_norm_fp32([parameter], max_norm, norm)
        expected = jacobian.clip_coefficient(norm, max_norm) * norm / 2
        assert parameter.grad.tolist() == pytest.approx([expected] * 4, rel=1e-6)

    def test_process_groups_that_are_read_exist(self, one_rank):
        for name in ("tp", "pp", "mp", "dp", "dp_cp", "cp"):
            assert getattr(one_rank, name).size() == 1


class TestPrecisionAware:
    """Megatron's real distributed optimizer; Transformer Engine's FusedAdam is a stand-in."""

    @CLIPS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("keeps_weights", [True, False])
    def test_pulled_back_gradient_is_the_derivative_of_the_step(
        self, one_rank, monkeypatch, dtype, clip_grad, keeps_weights
    ):
        """Where Megatron keeps the fp32 weights (mxfp8), only the moments lie elsewhere."""

        def build():
            ddp = wrapped(dtype, use_distributed_optimizer=True)
            options = {"clip_grad": clip_grad, "weight_decay": 0.1}
            return ddp, precision_aware_of(ddp, dtype, monkeypatch, keeps_weights, **options)

        controls = [as_plain_sgd] if clip_grad == 1.0 else [as_plain_sgd, without_gradient]
        RealStep(build).check(clip_grad == 1.0, 0.002, controls)

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.uint8])
    def test_moments_in_few_bits(self, one_rank, monkeypatch, stored):
        def build():
            ddp = wrapped(torch.bfloat16, use_distributed_optimizer=True)
            dtypes = {"exp_avg_dtype": stored, "exp_avg_sq_dtype": stored}
            return ddp, precision_aware_of(ddp, torch.bfloat16, monkeypatch, dtypes=dtypes)

        RealStep(build).check(True, 0.01, [as_plain_sgd])

    def test_a_step_is_undone_with_its_scales(self, one_rank, monkeypatch):
        """16-bit moments are stored beside a scale that every step overwrites."""
        ddp = wrapped(torch.bfloat16, use_distributed_optimizer=True)
        dtypes = {"exp_avg_dtype": torch.float16, "exp_avg_sq_dtype": torch.float16}
        optimizer = precision_aware_of(ddp, torch.bfloat16, monkeypatch, dtypes=dtypes)
        config = SimpleNamespace(timers=None)
        trainee = Trainee([ddp], optimizer, config, lambda: None, None)

        def step(size):
            for parameter in ddp.parameters():
                parameter.main_grad.fill_(size)
            optimizer.step()

        def moments():
            parts = list(optimizer_view.shards(optimizer))
            return [m.clone() for shard in parts for m in shard.moments()]

        step(1.0)
        state, before = TrainerState(trainee, SimpleNamespace(num_steps=0)), moments()
        step(100.0)
        assert not all(torch.equal(a, b) for a, b in zip(moments(), before, strict=True))
        state.restore()
        assert all(torch.equal(a, b) for a, b in zip(moments(), before, strict=True))
        state.scales = []  # without them the moments come back in the wrong scale
        step(100.0)
        state.restore()
        assert not all(torch.equal(a, b) for a, b in zip(moments(), before, strict=True))

    def test_what_cannot_be_undone_is_named(self, one_rank, monkeypatch):
        dtypes = {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.float32}
        ddp = wrapped(torch.bfloat16, use_distributed_optimizer=True)
        optimizer = precision_aware_of(ddp, torch.bfloat16, monkeypatch, dtypes=dtypes)
        assert "--exp-avg-dtype fp8" in refusal(optimizer)
        assert refusal(optimizer_of(ddp, torch.bfloat16, True)) is None

    def test_gradients_in_bf16(self, one_rank, monkeypatch):
        """`--main-grads-dtype bf16`: the optimizer reads them from the buffers, h and v lie there.

        Clipping off: its rounding in bf16 is larger than the difference that is measured.
        """

        def build():
            ddp = wrapped(torch.bfloat16, use_distributed_optimizer=True, grad_reduce_in_fp32=False)
            assert next(ddp.module.parameters()).main_grad.dtype == torch.bfloat16
            return ddp, precision_aware_of(ddp, torch.bfloat16, monkeypatch, clip_grad=0.0)

        RealStep(build).check(False, 0.01, [as_plain_sgd, without_gradient])

    def test_l2_decay_is_refused(self, one_rank, monkeypatch):
        """It needs the weights, which may lie in the optimizer as 16-bit remainders."""
        for decoupled in (True, False):
            ddp = wrapped(torch.bfloat16, use_distributed_optimizer=True)
            options = {"decoupled_weight_decay": decoupled}
            optimizer = precision_aware_of(ddp, torch.bfloat16, monkeypatch, **options)
            check_supported(optimizer, "identity")
            if decoupled:
                check_supported(optimizer, "exact")
                continue
            with pytest.raises(DWMError, match="decoupled_weight_decay=False.*--dwm-jacobian id"):
                check_supported(optimizer, "exact")
