"""What public recipes need and the CPU lacks, by plain torch: Mamba's kernels, Muon's and more.

    mamba-ssm, causal-conv1d, einops   the state-space layer as its recurrence, step by step
    Transformer Engine's hybrid layers  the same stack of Megatron's local layers
    head sizes of latent attention      the local attention of Megatron 0.19 does not take them
    emerging-optimizers                 what Megatron's Muon is built on (tests/contract)

Hybrid models are built with `--spec tests.recipes.stand_ins hybrid_stack_spec`. Not exercised
therefore: the kernels themselves, Transformer Engine's layers, and saving such a model.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm import mamba_context_parallel, mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from tests.contract import stand_in_muon

_FOR_GOOD = contextlib.ExitStack()


def split_conv1d_scan(
    zxbcdt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    D: torch.Tensor,  # noqa: N803  (as the kernel has it)
    headdim: int,
    ngroups: int,
    **kwargs: Any,
) -> torch.Tensor:
    """Mamba 2's layer between its projections: causal convolution, state-space recurrence, gate.

        x, B, C <- silu(conv(x, B, C));  dt <- softplus(dt + dt_bias)
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t;  y silu(z)

    Args:
        zxbcdt: `[b, l, 2 p h + 2 g n + h]`, packed; p = `headdim`, h heads, g = `ngroups`.
        conv_weight: `[p h + 2 g n, width]`.
        conv_bias: `[p h + 2 g n]`.
        dt_bias: `[h]`.
        a: `[h]`, negative.
        D: `[h]`.
        headdim: size of a head.
        ngroups: groups of heads that share B and C.
        kwargs: what only the kernel needs.

    Returns:
        `[b, l, p h]`.
    """
    heads = a.numel()
    inner = heads * headdim
    state = (zxbcdt.size(-1) - 2 * inner - heads) // (2 * ngroups)
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * ngroups * state, heads], dim=-1)
    width = conv_weight.size(1)
    padded = F.pad(xbc.transpose(1, 2), (width - 1, 0))
    xbc = F.silu(F.conv1d(padded, conv_weight.unsqueeze(1), conv_bias, groups=padded.size(1)))
    x, b, c = xbc.transpose(1, 2).split([inner, ngroups * state, ngroups * state], dim=-1)
    x = x.unflatten(-1, (heads, headdim)).float()
    b, c = (
        t.unflatten(-1, (ngroups, state)).repeat_interleave(heads // ngroups, dim=2).float()
        for t in (b, c)
    )
    dt = F.softplus(dt.float() + dt_bias)
    decay = torch.exp(dt * a)
    h = torch.zeros(x.size(0), heads, headdim, state, device=x.device)
    out = []
    for t in range(x.size(1)):
        step = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(2)
        h = decay[:, t, :, None, None] * h + step
        out.append((h * c[:, t].unsqueeze(2)).sum(-1) + D.float()[:, None] * x[:, t])
    return (torch.stack(out, dim=1).flatten(2) * F.silu(z.float())).to(zxbcdt.dtype)


class GroupedRMSNorm(torch.nn.Module):
    """The norm after it, over groups of features."""

    def __init__(
        self, size: int, eps: float, group_size: int, device: Any, dtype: torch.dtype, **_: Any
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.float().unflatten(-1, (-1, self.group_size))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.float()).to(x.dtype)


def rearrange(x: torch.Tensor, pattern: str) -> torch.Tensor:
    """The two patterns that a training step asks of einops."""
    if pattern in ("l b d -> b l d", "b l d -> l b d"):
        return x.transpose(0, 1)
    assert pattern == "d 1 w -> d w", pattern
    return x.squeeze(1)


def install() -> None:
    """Puts the stand-ins where Megatron looks for the packages."""
    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.HAVE_EINOPS = mamba_context_parallel.HAVE_EINOPS = True
    mamba_mixer.rearrange = rearrange
    mamba_mixer.mamba_split_conv1d_scan_combined = lambda zxbcdt, weight, bias, dt_bias, a, **kw: (
        split_conv1d_scan(zxbcdt, weight, bias, dt_bias, a, **kw)
    )
    mamba_mixer.ExtendedRMSNorm = GroupedRMSNorm
    hybrid_block.TENorm = WrappedTorchNorm
    init = DotProductAttention.__init__

    @functools.wraps(init)
    def without_channels(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("k_channels", None)
        values = kwargs.pop("v_channels", config.kv_channels)
        # By which it gives its output a shape.
        assert values == config.kv_channels, "--v-head-dim and --kv-channels must be one"
        init(self, config, *args, **kwargs)

    DotProductAttention.__init__ = without_channels
    _FOR_GOOD.enter_context(stand_in_muon.installed())


def _norm_of(name: str, **modules: Any) -> TransformerLayerSubmodules:
    return TransformerLayerSubmodules(**{name: WrappedTorchNorm, **modules})


hybrid_stack_spec = ModuleSpec(
    module=HybridStack,
    submodules=HybridStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=ModuleSpec(
                    module=MambaMixer,
                    submodules=MambaMixerSubmodules(
                        in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
                    ),
                ),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=_norm_of(
                "input_layernorm",
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=ColumnParallelLinear,
                        core_attention=DotProductAttention,
                        linear_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=_norm_of(
                "pre_mlp_layernorm",
                mlp=functools.partial(
                    MLP.as_mlp_submodule,
                    submodules=MLPSubmodules(
                        linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                    ),
                ),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=_norm_of(
                "pre_mlp_layernorm",
                mlp=get_moe_module_spec(use_te=False, num_experts=4, moe_grouped_gemm=False),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(
                layer_specs=[
                    ModuleSpec(
                        module=MultiTokenPredictionLayer,
                        submodules=MultiTokenPredictionLayerSubmodules(
                            enorm=WrappedTorchNorm,
                            hnorm=WrappedTorchNorm,
                            eh_proj=ColumnParallelLinear,
                            mtp_model_layer=None,
                            layer_norm=WrappedTorchNorm,
                        ),
                    )
                ]
            ),
        ),
    ),
)
