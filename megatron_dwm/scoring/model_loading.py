"""Loads a weighting model from a run's checkpoint or a stage's snapshot, whole on every rank.

The layout that it was saved with does not matter. Its shape comes from the checkpoint; device and
kernels are this machine's. Megatron is imported here, after `cpu.install()`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_dwm.checkpoint.state import KEY
from megatron_dwm.conversion.families.rope import BUILT_IN_ROPE_FACTOR
from megatron_dwm.conversion.hf_folder import read_hf_config
from megatron_dwm.core.stored_state import load_sharded, load_weights
from megatron_dwm.errors import ConversionError, DWMError, in_short
from megatron_dwm.files.folder_swap import mend
from megatron_dwm.hosts import cpu
from megatron_dwm.scoring.identity import digest_of
from megatron_dwm.weighting_model.transformer import (
    LAYER_FIELDS,
    DataWeightingModel,
    EmbeddingShape,
    dwm_transformer_config,
)

_PREFIX = f"{KEY}."
_WORDS = f"{_PREFIX}embedding.word_embeddings.weight"
_POSITIONS = f"{_PREFIX}embedding.position_embeddings.weight"
_ACTIVATIONS = {
    f.__name__: f
    for f in (
        torch.nn.functional.silu,
        torch.nn.functional.gelu,
        torch.nn.functional.relu,
        fast_gelu,
        quick_gelu,
        squared_relu,
    )
}
# The saved shape's fields about layers, under the names of Megatron's config.
_SHAPE_FIELDS = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
)
# Fields that only the run's arguments have; they matter for layers copied from the LLM.
_ARGUMENT_FIELDS = tuple(
    name for name in LAYER_FIELDS if name not in (*_SHAPE_FIELDS, "activation_func")
)


@dataclass
class SavedDWM:
    """A weighting model in a checkpoint, before it is loaded.

    Attributes:
        folder: the checkpoint or snapshot.
        shape: its shape, as saved by `megatron_dwm.checkpoint.state`.
        args: the run's arguments; None for a snapshot without a checkpoint beside it.
        sharding: sharding metadata of the checkpoint.
        tensors: name -> shape and dtype of the stored tensors.
        notes: lines that the user should see.
    """

    folder: str
    shape: dict[str, Any]
    args: Any
    sharding: dict[str, Any]
    tensors: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def find_folder(path: str) -> str:
    """Finds the checkpoint that `--checkpoint` refers to.

    Args:
        path: a run's `--save` folder (its latest checkpoint, else its last snapshot), one
            `iter_*` folder, or one `dwm_stage_*` snapshot.

    Raises:
        DWMError: there is none.
    """
    if not os.path.isdir(path):
        raise DWMError(f"--checkpoint {path}: no such folder")
    if os.path.exists(os.path.join(path, "metadata.json")):
        return path
    mend(path)
    names = sorted(os.listdir(path))
    tracker = os.path.join(path, "latest_checkpointed_iteration.txt")
    wanted = None
    if os.path.isfile(tracker):
        with open(tracker, encoding="utf-8") as file:
            text = file.read().strip()
        wanted = f"iter_{int(text):07d}" if text.isdecimal() else text
    else:
        wanted = next((n for n in reversed(names) if re.fullmatch(r"dwm_stage_\d+", n)), None)
    if wanted is None:
        raise DWMError(
            f"--checkpoint {path} is neither a checkpoint (no metadata.json) nor a run (no "
            "latest_checkpointed_iteration.txt, no dwm_stage_* snapshots); give a run's --save "
            "folder, or an iter_* or dwm_stage_* folder in it"
        )
    folder = os.path.join(path, wanted)
    if not os.path.exists(os.path.join(folder, "metadata.json")):
        raise DWMError(
            f"--checkpoint {path}: its latest checkpoint {wanted} is missing or incomplete; give "
            "another iter_* or dwm_stage_* folder"
        )
    return folder


def read_saved(path: str) -> SavedDWM:
    """Reads a checkpoint's description of its weighting model; uses no process group.

    Args:
        path: as for `find_folder`.

    Raises:
        DWMError: there is no checkpoint, it is damaged, or it has no weighting model.
    """
    folder = find_folder(path)
    common = _common_state(folder)
    found = common.get(KEY)
    if not isinstance(found, dict) or not found.get("shape"):
        raise DWMError(
            f"--checkpoint {folder} holds no weighting model (DWM); give a checkpoint of a run "
            "with --dwm and a learned policy, or a dwm_stage_* snapshot"
        )
    if "num_layers" not in found["shape"]:
        raise DWMError(
            f"--checkpoint {folder} holds a {found['shape'].get('form')} and no separate model; a "
            "head scores samples only while the language model trains: train with --dwm-form "
            "model, or give such a run"
        )
    notes: list[str] = []
    args = common.get("args")
    if args is None:
        args = _args_beside(folder)
        if args is None:
            notes.append(
                f"{folder} carries no training arguments, and no checkpoint of its run lies beside "
                "it: RoPE scaling and layer options beyond the saved shape are taken for the "
                "defaults, and --temperature for 1"
            )
    return SavedDWM(
        folder=folder,
        shape=found["shape"],
        args=args,
        sharding=dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {},
        tensors=dist_checkpointing.load_tensors_metadata(folder),
        notes=notes,
    )


def _common_state(folder: str) -> dict[str, Any]:
    try:
        return dist_checkpointing.load_common_state_dict(folder)
    except Exception as error:
        raise DWMError(
            f"--checkpoint {folder} cannot be read ({in_short(error)}); give "
            "another checkpoint or snapshot"
        ) from error


def _args_beside(snapshot: str) -> Any:
    """Returns the arguments in the latest checkpoint of the run that a snapshot lies in."""
    run = os.path.dirname(os.path.abspath(snapshot))
    if not os.path.isfile(os.path.join(run, "latest_checkpointed_iteration.txt")):
        return None
    return _common_state(find_folder(run)).get("args")


class MegatronScorer:
    """A weighting model on Megatron's blocks; see `WindowScorer`.

    All ranks build one at the same time.

    Args:
        saved: the model to load.

    Raises:
        DWMError: this version cannot build such a model, or its tensors do not fit.
    """

    def __init__(self, saved: SavedDWM) -> None:
        shape, args = saved.shape, saved.args
        self.where = saved.folder
        self.notes = saved.notes
        self.vocab_size = int(shape["vocab_size"])
        self.max_length = None if args is None else int(args.max_position_embeddings)
        if _POSITIONS in saved.tensors:
            self.max_length = int(saved.tensors[_POSITIONS].global_shape[0])
        self.default_length = None if args is None else int(args.seq_length)
        temperature = getattr(args, "dwm_temperature", None)
        self.temperature = None if temperature is None else float(temperature)
        self._shape = shape
        self._device = cpu.device()

        if mpu.model_parallel_is_initialized():
            # Left from ranks that were joined earlier in the same process.
            mpu.destroy_model_parallel()
        mpu.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self._model = _build(saved, groups)
        _load(self._model, saved, groups)
        self._model.eval()

    def scores(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Scores a batch that is padded on the right; see `WindowScorer`."""
        tokens, lengths = tokens.to(self._device), lengths.to(self._device)
        position_ids = torch.arange(tokens.size(1), device=self._device).unsqueeze(0)
        return self._model(tokens, position_ids, lengths)

    def identity(self) -> str:
        """Returns a digest of weights, shape and device kind."""
        config = self._model.config
        described = {
            **self._shape,
            "embedding": self._model.embedding_shape,
            "device": self._device.type,
            "kernels": config.transformer_impl,
            **{name: getattr(config, name) for name in _ARGUMENT_FIELDS},
        }
        return digest_of(self._model, described)


def _build(saved: SavedDWM, groups: Any) -> DataWeightingModel:
    shape = saved.shape
    activation = _ACTIVATIONS.get(shape["activation_func"])
    if activation is None:
        raise DWMError(
            f"--checkpoint {saved.folder}: the weighting model's activation is "
            f"{shape['activation_func']!r}; known are {', '.join(_ACTIVATIONS)}"
        )
    words = saved.tensors[_WORDS]
    on_cpu = cpu.is_cpu()
    host_fields = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "use_cpu_initialization": on_cpu,
        "params_dtype": words.dtype,
        "bf16": words.dtype == torch.bfloat16,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "transformer_impl": "local" if on_cpu else _best_kernels(),
    }
    layers = {name: shape[name] for name in _SHAPE_FIELDS}
    started_from = str(getattr(saved.args, "dwm_init", ""))
    if started_from.startswith("llm:"):
        layers.update(
            {n: getattr(saved.args, n) for n in _ARGUMENT_FIELDS if hasattr(saved.args, n)}
        )
    llm = SimpleNamespace(**host_fields, **layers, activation_func=activation)
    positions = saved.tensors.get(_POSITIONS)
    model = DataWeightingModel(
        config=dwm_transformer_config(llm, shape["num_layers"], like_llm=True),
        embedding=EmbeddingShape(
            vocab_size=int(words.global_shape[0]),
            max_sequence_length=0 if positions is None else int(positions.global_shape[0]),
            position_embedding_type=shape["position_embedding_type"],
            rotary_base=shape["rotary_base"],
            rotary_percent=shape["rotary_percent"],
            rope_scaling=shape["rope_scaling"],
            rope_scaling_factor=_rope_factor(saved, started_from),
        ),
        pooling=shape["pooling"],
        pg_collection=groups,
        pre_process=True,
        post_process=True,
    )
    interpolation = getattr(saved.args, "rotary_seq_len_interpolation_factor", None)
    if started_from.startswith("llm:") and model.rotary_pos_emb is not None:
        model.rotary_pos_emb.seq_len_interpolation_factor = interpolation
    return model.to(device=cpu.device(), dtype=words.dtype)


def _rope_factor(saved: SavedDWM, started_from: str) -> float:
    """Returns the factor of scaled RoPE, which the shape does not hold."""
    if not saved.shape["rope_scaling"] or not started_from.startswith("hf:"):
        return BUILT_IN_ROPE_FACTOR
    try:
        scaling = read_hf_config(started_from[3:]).rope_scaling
    except ConversionError as error:
        raise DWMError(
            f"--checkpoint {saved.folder}: its weighting model began as {started_from}, whose "
            f"config.json has the factor of its scaled RoPE and cannot be read: {error}"
        ) from error
    return BUILT_IN_ROPE_FACTOR if scaling is None else float(scaling["factor"])


def _best_kernels() -> str:
    from megatron.core.extensions import transformer_engine

    return "transformer_engine" if transformer_engine.HAVE_TE else "local"


def _load(model: DataWeightingModel, saved: SavedDWM, groups: Any) -> None:
    metadata = {**saved.sharding, "dp_cp_group": groups.dp_cp}
    wanted = model.sharded_state_dict(prefix=_PREFIX, metadata=metadata)
    try:
        loaded = load_sharded({KEY: {"model": wanted}}, saved.folder)[KEY]["model"]
        weights = {n.removeprefix(_PREFIX): value for n, value in loaded.items()}
        load_weights(model, weights, saved.folder)
    except Exception as error:
        raise DWMError(
            f"--checkpoint {saved.folder}: its weighting model cannot be loaded "
            f"({in_short(error)}); give another checkpoint or snapshot"
        ) from error
