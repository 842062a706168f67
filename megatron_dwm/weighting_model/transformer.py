"""The data weighting model: a Llama-style transformer on Megatron's blocks, pooled to one score.

It shares the LLM's tokenizer and its tensor- and pipeline-parallel groups. Scores are computed on
the last pipeline stage, where the losses are.

Shapes: b samples in a micro-batch, s tokens, h hidden size of the DWM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.weighting_model.attention import CausalAttention
from megatron_dwm.weighting_model.pooling import pool_tokens

# Fields that describe how to compute, not the model: copied from the LLM.
_HOST_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "use_cpu_initialization",
    "params_dtype",
    "bf16",
    "deterministic_mode",
    "gradient_accumulation_fusion",
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "persist_layer_norm",
    "batch_p2p_comm",
    "batch_p2p_sync",
    "transformer_impl",
    "attention_backend",
)
# Fields that give the DWM's layers the LLM's form, so that they can start as copies.
LAYER_FIELDS = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "add_bias_linear",
    "add_qkv_bias",
    "gated_linear_unit",
    "activation_func",
    "qk_layernorm",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "softmax_scale",
    "softmax_type",
    "window_size",
    "attention_output_gate",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "rotary_interleaved",
    "init_method_std",
)


@dataclass(frozen=True)
class EmbeddingShape:
    """Settings that are not in `TransformerConfig`.

    Attributes:
        vocab_size: padded vocabulary, as in the LLM's embedding.
        max_sequence_length: the LLM's `--max-position-embeddings`.
        position_embedding_type: `rope`, `learned_absolute` or `none`.
        rotary_base: theta of the rotary embedding.
        rotary_percent: share of each head that is rotated.
        rope_scaling: Llama 3 frequency scaling.
        rope_scaling_factor: its factor.
    """

    vocab_size: int
    max_sequence_length: int
    position_embedding_type: str = "rope"
    rotary_base: float = 10000
    rotary_percent: float = 1.0
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0


def pipeline_layout(num_layers: int, pipeline_size: int) -> list[list[str]] | None:
    """Returns what each stage holds, for any depth; stages may hold no layer.

    Layers are spread evenly, the first stages taking the remainder.

    Args:
        num_layers: layers of the DWM.
        pipeline_size: pipeline stages of the LLM.
    """
    if pipeline_size == 1:
        return None
    layout = []
    for stage in range(pipeline_size):
        count = num_layers // pipeline_size + (stage < num_layers % pipeline_size)
        layout.append(["decoder"] * count)
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def dwm_transformer_config(
    llm: TransformerConfig, num_layers: int, like_llm: bool, **shape: Any
) -> TransformerConfig:
    """Returns the DWM's `TransformerConfig`.

    Args:
        llm: the LLM's config.
        num_layers: layers of the DWM.
        like_llm: whether layers have the LLM's own form (`--dwm-init llm:K`), else Llama-style.
        **shape: `hidden_size`, `ffn_hidden_size`, ... for Llama-style layers.
    """
    fields = {name: getattr(llm, name) for name in _HOST_FIELDS if hasattr(llm, name)}
    if like_llm:
        fields.update({name: getattr(llm, name) for name in LAYER_FIELDS if hasattr(llm, name)})
    else:
        fields.update(
            normalization="RMSNorm",
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            **shape,
        )
    return TransformerConfig(
        num_layers=num_layers,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Layers differ by stage only; one checkpoint tensor per layer can be read in any layout.
        hetereogenous_dist_checkpoint=True,
        pipeline_dtype=llm.params_dtype,
        pipeline_model_parallel_layout=pipeline_layout(
            num_layers, llm.pipeline_model_parallel_size
        ),
        deallocate_pipeline_outputs=True,
        **fields,
    )


class DataWeightingModel(MegatronModule):
    """Scores samples: embedding, transformer, final norm, pooling, linear head without bias.

    The head starts at zero, so the first weights are uniform.

    Args:
        config: the DWM's own transformer config.
        embedding: vocabulary and positions.
        pooling: `last` (state of the last token: a `LlamaForSequenceClassification` with one
            label) or `mean` (mean over the sample's tokens).
        pg_collection: the LLM's process groups (`tp`, `pp`, `cp`, ...).
        pre_process: whether this rank holds the embedding.
        post_process: whether this rank holds the final norm and the head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        embedding: EmbeddingShape,
        pooling: str,
        pg_collection: Any,
        pre_process: bool,
        post_process: bool,
    ) -> None:
        super().__init__(config=config)
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = False
        self.pooling = pooling
        self.embedding_shape = embedding
        self.input_tensor: torch.Tensor | None = None
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=embedding.vocab_size,
                max_sequence_length=embedding.max_sequence_length,
                position_embedding_type=embedding.position_embedding_type,
                scatter_to_sequence_parallel=False,
                tp_group=pg_collection.tp,
            )
        self.rotary_pos_emb = None
        if embedding.position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                kv_channels=config.kv_channels,
                rotary_percent=embedding.rotary_percent,
                rotary_interleaved=config.rotary_interleaved,
                rotary_base=int(embedding.rotary_base),
                rope_scaling=embedding.rope_scaling,
                rope_scaling_factor=embedding.rope_scaling_factor,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=pg_collection.cp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=_layer_spec(config),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            # The DWM has one chunk per stage, even if the LLM has virtual stages.
            vp_stage=0,
        )
        if post_process:
            self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
            torch.nn.init.zeros_(self.score.weight)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Sets the hidden states `[s, b, h]` from the previous stage."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.input_tensor = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens: torch.Tensor | None,
        position_ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs this pipeline stage.

        Args:
            tokens: `[b, s]` ids on the first stage, unused elsewhere.
            position_ids: `[1, s]`.
            lengths: `[b]` tokens of each sample without padding on the right; None: all are full.

        Returns:
            Scores `[b]` in float32 on the last stage, hidden states `[s, b, h]` elsewhere.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(
                input_ids=tokens, position_ids=position_ids.expand_as(tokens).contiguous()
            )
        rotary = None
        if self.rotary_pos_emb is not None:
            rotary = self.rotary_pos_emb(position_ids.size(1))
        mask = None
        if self.config.transformer_impl == "local" and not CausalAttention.fits(self.config):
            mask = _causal_mask(position_ids.size(1), position_ids.device)
        hidden = self.decoder(hidden, attention_mask=mask, rotary_pos_emb=rotary)
        if not self.post_process:
            if not len(self.decoder.layers):
                # The schedule frees a stage's output, so a stage without layers must not return its
                # input.
                hidden = hidden.clone()
            return hidden
        if lengths is not None:
            pooled = pool_tokens(hidden, lengths, self.pooling)
        else:
            pooled = hidden[-1] if self.pooling == "last" else hidden.float().mean(dim=0)
        return torch.nn.functional.linear(pooled.float(), self.score.weight.float()).squeeze(-1)


def _layer_spec(config: TransformerConfig) -> Any:
    if config.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    if CausalAttention.fits(config):
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
    return spec


def _causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """Returns `[1, 1, s, s]`, true where attention is masked out."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu_(1)
