"""The language model that Megatron-LM's arguments describe, matrix by matrix, without building it.

Layers are named and split as `gpt_layer_specs.py` of megatron-core builds them, for its own layers
(`--transformer-impl local`) and for those of Transformer Engine, which need not be installed.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_dwm.config.schema import DWMConfig
from megatron_dwm.conversion.hf_folder import read_hf_config
from megatron_dwm.errors import DWMError
from megatron_dwm.planning.model import Layer, Layout, Matrix, Model, Norm, Stage
from megatron_dwm.weighting_model.transformer import pipeline_layout

# Flags of models whose layers the plan does not know.
_UNKNOWN = (
    "hybrid_layer_pattern",
    "spec",
    "heterogeneous_layers_config_path",
    "experimental_attention_variant",
    "moe_latent_size",
    "attention_output_gate",
    "mla_down_proj_fusion",
    "mtp_num_layers",
    "yaml_cfg",
)


def layout_of(args: Any) -> Layout:
    """Returns the parallel sizes of validated arguments."""
    return Layout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        dp=args.data_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        vp=args.virtual_pipeline_model_parallel_size or 1,
        sequence_parallel=bool(args.sequence_parallel),
    )


def language_model(args: Any, vocabulary: int) -> Model:
    """Returns the model of validated arguments.

    Args:
        args: Megatron's.
        vocabulary: rows of the word embedding, padded.

    Raises:
        DWMError: it has layers that the plan does not know.
    """
    for name in _UNKNOWN:
        if getattr(args, name, None):
            raise DWMError(
                f"--{name.replace('_', '-')} {_shown(getattr(args, name))}: builds layers that the "
                "plan does not know; leave it out to plan the plain model"
            )
    local = args.transformer_impl == "local"
    moe = _moe_layers(args)
    layers = [_layer(args, local, routed) for routed in moe]
    tied = not args.untie_embeddings_and_output_weights
    counts = _layers_by_stage(args)
    held: list[list[Layer]] = [[] for _ in range(args.pipeline_model_parallel_size)]
    left = iter(layers)
    for chunk in range(args.virtual_pipeline_model_parallel_size or 1):
        for stage, of_chunks in enumerate(counts):
            held[stage] += [next(left) for _ in range(of_chunks[chunk])]
    words = Matrix(
        "word_embeddings", "VocabParallelEmbedding", vocabulary, args.hidden_size, "column"
    )
    positions = None
    if args.position_embedding_type == "learned_absolute":
        positions = Matrix(
            "position_embeddings", "Embedding", args.max_position_embeddings, args.hidden_size
        )
    output = Matrix("output_layer", "ColumnParallelLinear", vocabulary, args.hidden_size, "column")
    last = len(held) - 1
    # With several stages, the copy of the embedding on the last stage is a separate parameter.
    stages = tuple(
        Stage(
            layers=tuple(of_stage),
            embedding=words if stage == 0 else None,
            positions=positions if stage == 0 else None,
            output=output if stage == last else None,
            final_norm=_norm(args, "final_layernorm", args.hidden_size) if stage == last else None,
            tied=tied and stage == last == 0,
        )
        for stage, of_stage in enumerate(held)
    )
    return Model(
        stages=stages,
        hidden=args.hidden_size,
        causal_share=1.0 if local else 0.5,
        recompute=_recompute(args),
        recomputed_layers=args.recompute_num_layers if args.recompute_method == "block" else None,
        dispatcher=args.moe_token_dispatcher_type,
        shared_copy=tied and last > 0,
    )


def weighting_model(config: DWMConfig, args: Any, llm: Model, vocabulary: int) -> Model:
    """Returns the separate weighting model, as `weighting_model.transformer` builds it.

    Args:
        config: settings with resolved shapes (`build.resolve_shapes`).
        args: Megatron's.
        llm: what `language_model` returned.
        vocabulary: rows of the word embedding.
    """
    local = args.transformer_impl == "local"
    if config.init.startswith("llm:"):
        layer = next(stage.layers[0] for stage in llm.stages if stage.layers)
    else:
        heads = config.num_attention_heads
        kv_channels = config.hidden_size // heads
        if config.init.startswith("hf:"):
            kv_channels = read_hf_config(config.init[3:]).kv_channels
        shape = SimpleNamespace(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.resolved_ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=config.num_query_groups or heads,
            group_query_attention=True,
            kv_channels=kv_channels,
            swiglu=True,
            add_bias_linear=False,
            add_qkv_bias=False,
            qk_layernorm=False,
            normalization="RMSNorm",
            multi_latent_attention=False,
        )
        layer = _layer(shape, local, False)
    count = args.pipeline_model_parallel_size
    spread = pipeline_layout(config.num_layers, count) or [["decoder"] * config.num_layers]
    words = Matrix(
        "word_embeddings", "VocabParallelEmbedding", vocabulary, config.hidden_size, "column"
    )
    norm = Norm("final_layernorm", "RMSNorm", config.hidden_size)
    stages = tuple(
        Stage(
            layers=(layer,) * held.count("decoder"),
            embedding=words if stage == 0 else None,
            final_norm=norm if stage == count - 1 else None,
        )
        for stage, held in enumerate(spread)
    )
    return Model(stages=stages, hidden=config.hidden_size, causal_share=llm.causal_share)


def _moe_layers(args: Any) -> list[bool]:
    if not args.num_experts:
        return [False] * args.num_layers
    every = args.moe_layer_freq
    if isinstance(every, int):
        return [k % every == 0 for k in range(args.num_layers)]
    return [bool(one) for one in every]


def _layers_by_stage(args: Any) -> list[list[int]]:
    """Returns the number of layers of each chunk of each stage, by Megatron's own division."""
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    if args.pipeline_model_parallel_layout is not None:
        layout = args.pipeline_model_parallel_layout
        if isinstance(layout, str):
            layout = PipelineParallelLayerLayout.from_str(layout, stages)
        return [
            [layout.layout[stage][chunk].count(LayerType.decoder) for chunk in range(chunks or 1)]
            for stage in range(stages)
        ]
    config = SimpleNamespace(
        num_layers=args.num_layers,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=args.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=args.account_for_loss_in_pipeline_split,
    )
    try:
        found = [
            [
                get_num_layers_to_build(config, None if chunks is None else chunk, stage)
                for chunk in range(chunks or 1)
            ]
            for stage in range(stages)
        ]
    except AssertionError as error:
        raise DWMError(
            f"--pipeline-model-parallel-size {stages} and --num-layers {args.num_layers}: "
            f"{' '.join(str(error).split())}; give sizes that divide, or "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"
        ) from None
    if sum(map(sum, found)) != args.num_layers:
        raise DWMError(
            f"--num-layers {args.num_layers}: Megatron gives its pipeline stages "
            f"{sum(map(sum, found))} layers; correct the division"
        )
    return found


def _layer(args: Any, local: bool, routed: bool) -> Layer:
    """Returns one transformer layer."""
    matrices, norms, attention = (
        _latent_attention(args, local) if args.multi_latent_attention else _attention(args, local)
    )
    norms = [_norm(args, "input_layernorm", args.hidden_size), *norms]
    norms.append(_norm(args, "pre_mlp_layernorm", args.hidden_size))
    if not routed:
        up = "ColumnParallelLinear" if local else "TELayerNormColumnParallelLinear"
        matrices += _mlp(args, "mlp.", args.ffn_hidden_size, local, up=up)
        return Layer(tuple(matrices), tuple(norms), attention)
    matrices.append(
        Matrix(
            "mlp.router",
            "TopKRouter",
            args.num_experts,
            args.hidden_size,
            bias=bool(getattr(args, "add_bias_linear_router", False)),
        )
    )
    experts = {"copies": args.num_experts, "uses": args.moe_router_topk}
    grouped = args.moe_grouped_gemm and not local
    of_column = "TEColumnParallelGroupedLinear" if grouped else None
    of_row = "TERowParallelGroupedLinear" if grouped else None
    of_experts = _mlp(
        args, "mlp.experts.", args.moe_ffn_hidden_size, local, up=of_column, down=of_row
    )
    matrices += [replace(m, split=f"expert {m.split}", **experts) for m in of_experts]
    shared = args.moe_shared_expert_intermediate_size
    if shared:
        matrices += _mlp(args, "mlp.shared_experts.", shared, local)
    return Layer(
        tuple(matrices), tuple(norms), attention, int(args.moe_router_topk), args.num_experts
    )


def _attention(args: Any, local: bool) -> tuple[list[Matrix], list[Norm], int]:
    heads, size = args.num_attention_heads, args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else heads
    qkv = "ColumnParallelLinear" if local else "TELayerNormColumnParallelLinear"
    queries, bias = heads * size, args.add_bias_linear
    matrices = [
        Matrix(
            "self_attention.linear_qkv",
            qkv,
            queries + 2 * groups * size,
            args.hidden_size,
            "column",
            bias=bias or args.add_qkv_bias,
        ),
        Matrix(
            "self_attention.linear_proj", _row(local), args.hidden_size, queries, "row", bias=bias
        ),
    ]
    norms = []
    if args.qk_layernorm:
        for name in ("q_layernorm", "k_layernorm"):
            norms.append(replace(_norm(args, f"self_attention.{name}", size), of_heads=True))
    return matrices, norms, 2 * queries


def _latent_attention(args: Any, local: bool) -> tuple[list[Matrix], list[Norm], int]:
    """Multi-latent attention: projections down to a low rank and up to the heads."""
    heads, hidden, normed = args.num_attention_heads, args.hidden_size, args.qk_layernorm
    query = args.qk_head_dim + args.qk_pos_emb_head_dim
    up = _column(local)
    if not local and normed:
        up = "TELayerNormColumnParallelLinear"
    # Transformer Engine's are replicated on all tensor-parallel ranks, Megatron's own are split.
    down: dict[str, Any] = {"layer": "TELinear", "split": "none"}
    if local:
        down = {"layer": "ColumnParallelLinear", "split": "column", "gathered": True}
    name = "self_attention.linear_"
    matrices, norms = [], []
    if args.q_lora_rank is None:
        matrices.append(Matrix(f"{name}q_proj", _column(local), heads * query, hidden, "column"))
    else:
        rank = args.q_lora_rank
        matrices.append(Matrix(f"{name}q_down_proj", rows=rank, columns=hidden, **down))
        matrices.append(Matrix(f"{name}q_up_proj", up, heads * query, rank, "column"))
        if normed:
            norms.append(_norm(args, "self_attention.q_layernorm", rank))
    rank, size = args.kv_lora_rank, args.v_head_dim
    matrices += [
        Matrix(f"{name}kv_down_proj", rows=rank + args.qk_pos_emb_head_dim, columns=hidden, **down),
        Matrix(f"{name}kv_up_proj", up, heads * (args.qk_head_dim + size), rank, "column"),
        Matrix(f"{name}proj", _row(local), hidden, heads * size, "row", bias=args.add_bias_linear),
    ]
    if normed:
        norms.append(_norm(args, "self_attention.kv_layernorm", rank))
    return matrices, [replace(n, of_heads=True) for n in norms], heads * (query + size)


def _mlp(
    args: Any, prefix: str, width: int, local: bool, up: str | None = None, down: str | None = None
) -> list[Matrix]:
    first, bias = width * (2 if args.swiglu else 1), args.add_bias_linear
    return [
        Matrix(
            f"{prefix}linear_fc1",
            up or _column(local),
            first,
            args.hidden_size,
            "column",
            bias=bias,
        ),
        Matrix(
            f"{prefix}linear_fc2", down or _row(local), args.hidden_size, width, "row", bias=bias
        ),
    ]


def _column(local: bool) -> str:
    return "ColumnParallelLinear" if local else "TEColumnParallelLinear"


def _row(local: bool) -> str:
    return "RowParallelLinear" if local else "TERowParallelLinear"


def _norm(args: Any, name: str, size: int) -> Norm:
    if args.normalization == "RMSNorm":
        return Norm(name, "RMSNorm", size)
    return Norm(name, "LayerNorm", 2 * size)


def _recompute(args: Any) -> str:
    if args.recompute_granularity == "full":
        return "full"
    if args.recompute_granularity == "selective" and "core_attn" in (args.recompute_modules or []):
        return "attention"
    return "none"


def _shown(value: Any) -> str:
    return "" if value is True else str(value)
