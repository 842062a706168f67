"""Initialises the weighting model from the LLM's own layers, or a Hugging Face Llama's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.conversion.dwm_classifier import read_classifier
from megatron_dwm.conversion.hf_folder import iter_hf_tensors, iter_megatron_tensors
from megatron_dwm.errors import DWMError
from megatron_dwm.weighting_model.transformer import DataWeightingModel


@torch.no_grad()
def copy_from_llm(model: DataWeightingModel, llm_chunks: list[Any], groups: Any) -> None:
    """Copies the LLM's embedding and first layers into the weighting model.

    Both share their tensor-parallel layout, so shards fit as they are. Pipeline layouts differ:
    each layer is broadcast by the stage that holds it in the LLM, and kept by the stage that
    holds it in the DWM. The final norm and the head keep their own initialisation.

    Args:
        model: this stage of the weighting model, layers of the LLM's form.
        llm_chunks: the LLM's unwrapped model chunks on this rank.
        groups: process groups of both.
    """
    if model.pre_process:
        _copy(model.embedding, next(c for c in llm_chunks if c.pre_process).embedding)
    own = {layer.layer_number: layer for layer in model.decoder.layers}
    held = {layer.layer_number: layer for chunk in llm_chunks for layer in chunk.decoder.layers}
    stages: list[Any] = [None] * groups.pp.size()
    dist.all_gather_object(stages, sorted(held), group=groups.pp)
    for number in range(1, model.config.num_layers + 1):
        owner = next(stage for stage, numbers in enumerate(stages) if number in numbers)
        source = held.get(number)
        for name, template in _template(own, held, number, model, groups):
            value = template if source is None else dict(source.named_parameters())[name].data
            if groups.pp.size() > 1:
                value = value.clone()
                dist.broadcast(value, dist.get_global_rank(groups.pp, owner), group=groups.pp)
            if number in own:
                dict(own[number].named_parameters())[name].data.copy_(value)


def _template(
    own: dict[int, Any],
    held: dict[int, Any],
    number: int,
    model: DataWeightingModel,
    groups: Any,
) -> list[tuple[str, torch.Tensor]]:
    """Returns a layer's parameter names and tensors of their shapes, the same on every stage."""
    local = own.get(number) or held.get(number) or next(iter(held.values()), None)
    shapes = None
    if local is not None:
        shapes = [(n, tuple(p.shape), p.dtype) for n, p in local.named_parameters()]
    if groups.pp.size() > 1:
        gathered: list[Any] = [None] * groups.pp.size()
        dist.all_gather_object(gathered, shapes, group=groups.pp)
        shapes = next(s for s in gathered if s is not None)
    assert shapes is not None
    device = next(model.parameters()).device if list(model.parameters()) else None
    return [(n, torch.empty(shape, dtype=dtype, device=device)) for n, shape, dtype in shapes]


def _copy(target: torch.nn.Module, source: torch.nn.Module) -> None:
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.data.copy_(values[name].data)


@torch.no_grad()
def load_hf_folder(model: DataWeightingModel, folder: str, groups: Any) -> str:
    """Loads a Hugging Face Llama into the weighting model, sharded over tensor-parallel ranks.

    The score head of a sequence classifier with one label, such as an exported weighting model, is
    loaded too; with any other model the head keeps its own initialisation.

    Args:
        model: this stage of the weighting model.
        folder: folder with `config.json` and safetensors.
        groups: process groups.

    Returns:
        A line for the log: whether the head was loaded.

    Raises:
        DWMError: the folder's vocabulary is larger than the LLM's padded one, or a tensor does
            not fit.
    """
    source = read_classifier(folder)
    wanted = dict(model.named_parameters())
    offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    fused = model.config.transformer_impl == "transformer_engine"
    loaded = set()
    for name, tensor in iter_megatron_tensors(folder, fused_layernorm=fused):
        local = _local_name(name, offset)
        if local in wanted:
            parameter = wanted[local]
            if local == "embedding.word_embeddings.weight":
                # An export may have a row for padding after the vocabulary.
                tensor = tensor[: source.vocab_size]
                tensor = _padded_vocabulary(tensor, parameter.size(0) * groups.tp.size(), folder)
            shard = _tensor_parallel_shard(local, tensor, parameter, groups.tp)
            if shard.shape != parameter.shape:
                raise DWMError(
                    f"--dwm-init hf:{folder}: {name} gives shape {list(shard.shape)} where "
                    f"{list(parameter.shape)} is needed"
                )
            parameter.data.copy_(shard)
            loaded.add(local)
        if name == "decoder.final_layernorm.weight":
            break  # An output layer may follow, which a classifier does not have.
    missing = sorted(set(wanted) - loaded - {"score.weight"})
    if missing:
        raise DWMError(f"--dwm-init hf:{folder} has nothing for {', '.join(missing)}")
    if source.labels != 1:
        what = f"a classifier with {source.labels} labels" if source.labels else "no classifier"
        return f"DWM: {folder} is {what}: the score head starts at zero"
    _load_head(model, folder)
    return f"DWM: the score head of {folder} is taken, with its {source.pooling} pooling"


def _load_head(model: DataWeightingModel, folder: str) -> None:
    found = dict(iter_hf_tensors(folder, lambda name: name.startswith("score.")))
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    needed = {"score.weight": [1, model.config.hidden_size]}
    if shapes != needed:
        raise DWMError(
            f"--dwm-init hf:{folder} is a classifier with one label, whose head has "
            f"{shapes or 'no tensors named score.*'}; {needed} is needed"
        )
    if model.post_process:
        model.score.weight.data.copy_(found["score.weight"])


def _local_name(name: str, offset: int) -> str:
    """Replaces the global layer index in a name with this stage's."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) - offset)
    return ".".join(parts)


def _padded_vocabulary(tensor: torch.Tensor, rows: int, folder: str) -> torch.Tensor:
    if tensor.size(0) > rows:
        raise DWMError(
            f"--dwm-init hf:{folder} has a vocabulary of {tensor.size(0)}, larger than the LLM's "
            f"padded {rows}; the weighting model must share the LLM's tokenizer"
        )
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.size(0)))


def _tensor_parallel_shard(
    name: str, tensor: torch.Tensor, parameter: torch.nn.Parameter, tp_group: Any
) -> torch.Tensor:
    """Returns this rank's shard; gate and up projections are split separately."""
    size, rank = tp_group.size(), tp_group.rank()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return tensor
    dim = parameter.partition_dim
    if name.endswith("mlp.linear_fc1.weight"):
        halves = tensor.chunk(2, dim=0)
        return torch.cat([half.chunk(size, dim=0)[rank] for half in halves])
    return tensor.chunk(size, dim=dim)[rank]
