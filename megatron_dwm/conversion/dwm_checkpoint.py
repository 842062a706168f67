"""Reads the weighting model (DWM) of a run's checkpoint or stage snapshot, without Megatron."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_dwm.conversion.dist_checkpoint import TensorInfo, TorchDistCheckpoint, find_checkpoint
from megatron_dwm.conversion.families import FAMILIES, shape_from_args
from megatron_dwm.conversion.families.rope import BUILT_IN_ROPE_FACTOR, LLAMA3_ROPE
from megatron_dwm.conversion.hf_folder import read_hf_config
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.stored_model import StoredModel
from megatron_dwm.errors import ConversionError
from megatron_dwm.files.folder_swap import mend

KEY = "dwm"
_PREFIX = f"{KEY}."
_WORDS = "embedding.word_embeddings.weight"
_SCORE = "score.weight"
# Values of a saved shape whose layers are Llama's, or those of Qwen2 and Qwen3.
_LLAMA = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
}
# Families for which transformers has a sequence classifier.
_FAMILIES = ("llama", "qwen2", "qwen3")
# Without a run's arguments the length of its samples is unknown.
_DEFAULT_POSITIONS = 4096


def find_snapshots(run: str | os.PathLike) -> list[Path]:
    """Returns the `dwm_stage_*` folders of a run, in order.

    Raises:
        ConversionError: The run is not a folder, or has none.
    """
    root = Path(run)
    if not root.is_dir():
        raise ConversionError(
            f"--megatron-path {root} is not a folder; give a run's --save folder."
        )
    mend(root)
    found = sorted(p for p in root.iterdir() if re.fullmatch(r"dwm_stage_\d+", p.name))
    if not found:
        raise ConversionError(
            f"--megatron-path {root} has no dwm_stage_* snapshots; a run takes one at the end of "
            "each stage in which its weighting model learns."
        )
    return found


class DWMCheckpoint(TorchDistCheckpoint):
    """The weighting model in one checkpoint or snapshot.

    Attributes:
        described: The checkpoint's description of its shape (`megatron_dwm.checkpoint.state`).
        run_args: The arguments of its run; None for a snapshot without a checkpoint beside it.
        notes: Lines that the user should see.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """Opens `iter_*` or `dwm_stage_*`.

        Raises:
            ConversionError: The files are damaged, or hold no weighting model.
        """
        self.notes: list[str] = []
        self._common: dict[str, Any] = {}
        super().__init__(folder)
        found = self._common.get(KEY)
        if not isinstance(found, dict) or not found.get("shape"):
            raise ConversionError(
                f"{self.folder} holds no weighting model (DWM); give a checkpoint of a run with "
                "--dwm and a learned policy, or a dwm_stage_* snapshot."
            )
        if "num_layers" not in found["shape"]:
            raise ConversionError(
                f"{self.folder} holds a {found['shape'].get('form')} and no model of its own; "
                "there is nothing to export. Train with --dwm-form model, or give such a run."
            )
        self.described: dict[str, Any] = found["shape"]
        self.run_args = self._common.get("args") or self._args_beside()
        self.tensors = {
            name.removeprefix(_PREFIX): TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if name.startswith(_PREFIX)
            and isinstance(entry, dcp.TensorStorageMetadata)
            and "_extra_state" not in name
        }
        needed = {_WORDS, _SCORE}
        if not needed <= self.tensors.keys():
            raise ConversionError(
                f"{self.folder} says that it holds a weighting model, and lacks its "
                f"{', '.join(sorted(needed - self.tensors.keys()))}."
            )
        self.score_info = self.tensors.pop(_SCORE)

    def load(self, name: str, index: int | tuple[int, ...] | None = None) -> torch.Tensor:
        """Loads one of the weighting model's `tensors`, like the base class."""
        return super().load(_PREFIX + name, index)

    def _common_state(self) -> dict[str, Any]:
        # A snapshot has no arguments, which the base class needs.
        self._common = super()._common_state()
        return {"args": argparse.Namespace(), **self._common}

    def _args_beside(self) -> Any:
        """Returns the arguments of the latest checkpoint of the run that a snapshot lies in."""
        try:
            return TorchDistCheckpoint(find_checkpoint(self.folder.absolute().parent)).args
        except ConversionError as error:
            self.notes.append(
                f"Note: {self.folder} carries no training arguments, and no checkpoint of its run "
                f"can be read beside it ({error}) What only they say is taken for the default: "
                f"layers without special options, no RoPE scaling, {_DEFAULT_POSITIONS} positions."
            )
            return None

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self.tensors[_WORDS].dtype

    def shape(self) -> ModelShape:
        """Returns the model's shape, with the vocabulary without padding.

        Raises:
            ConversionError: Its layers are not those of a Llama, Qwen2 or Qwen3; names what
                differs.
        """
        described, args = self.described, self.run_args
        reasons = [
            f"{name} is {described.get(name)!r}, needs {fits!r}"
            for name, fits in _LLAMA.items()
            if described.get(name, fits) != fits
        ]
        bias, norms = described.get("add_qkv_bias"), described.get("qk_layernorm")
        if bias and norms:
            reasons.append("add_qkv_bias and qk_layernorm are both set")
        if reasons:
            raise ConversionError(
                f"the weighting model in {self.folder} cannot be written as a Llama, Qwen2 or "
                f"Qwen3: {'; '.join(reasons)}."
            )
        scaling = None
        if str(getattr(args, "dwm_init", "")).startswith("llm:"):
            scaling = self._llm_shape().rope_scaling
        elif described["rope_scaling"]:
            scaling = {"rope_type": "llama3", "factor": self._rope_factor(), **LLAMA3_ROPE}
        return ModelShape(
            num_layers=described["num_layers"],
            hidden_size=described["hidden_size"],
            ffn_hidden_size=described["ffn_hidden_size"],
            num_attention_heads=described["num_attention_heads"],
            num_query_groups=described["num_query_groups"],
            kv_channels=described["kv_channels"],
            vocab_size=described["vocab_size"],
            max_position_embeddings=getattr(args, "max_position_embeddings", _DEFAULT_POSITIONS),
            layernorm_epsilon=described["layernorm_epsilon"],
            # The model requires integers.
            rotary_base=float(int(described["rotary_base"])),
            rope_scaling=scaling,
            # There is no output layer.
            tied=True,
            family="qwen3" if norms else "qwen2" if bias else "llama",
        )

    def _llm_shape(self) -> ModelShape:
        """Returns the shape of the LLM, whose layer options the weighting model shares."""
        args = self.run_args
        scaled = getattr(args, "use_rope_scaling", False)
        try:
            # Megatron's builders use one factor, whatever the flag says.
            shape = shape_from_args(args, BUILT_IN_ROPE_FACTOR if scaled else None)
            if shape.family not in _FAMILIES:
                raise ConversionError(f"they are of {FAMILIES[shape.family].label}")
        except ConversionError as error:
            raise ConversionError(
                f"the weighting model in {self.folder} has layers of the language model's form "
                f"(--dwm-init {args.dwm_init}), and transformers has no sequence classifier for "
                f"them that could be written: {error}"
            ) from error
        return shape

    def _rope_factor(self) -> float:
        """Returns the factor of scaled RoPE of a model that started from a Hugging Face folder."""
        known = self.described.get("rope_scaling_factor")
        if known is not None:
            return float(known)
        started_from = str(getattr(self.run_args, "dwm_init", ""))
        if not started_from.startswith("hf:"):
            return BUILT_IN_ROPE_FACTOR
        try:
            scaling = read_hf_config(started_from[3:]).rope_scaling
        except ConversionError as error:
            raise ConversionError(
                f"the weighting model in {self.folder} began as {started_from}, whose config.json "
                f"has the factor of its scaled RoPE and cannot be read: {error}"
            ) from error
        return BUILT_IN_ROPE_FACTOR if scaling is None else float(scaling["factor"])

    def hf_tensors(self, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of transformers' sequence classifier, one after the other.

        Args:
            shape: What `shape()` returned.

        Yields:
            Hugging Face's name and the tensor in the stored dtype; the embedding `[V, h]` without
            padding, the head `score.weight` `[1, h]`.

        Raises:
            ConversionError: A tensor is missing, unknown, damaged or of the wrong shape.
        """
        rows = self.tensors[_WORDS].shape[0]
        if rows < shape.vocab_size or self.score_info.shape != (1, shape.hidden_size):
            raise ConversionError(
                f"the weighting model in {self.folder} does not fit its shape: {rows} rows of "
                f"vocabulary, {shape.vocab_size} are needed; a head {self.score_info.shape}, "
                f"{(1, shape.hidden_size)} is needed."
            )
        stored = StoredModel(self, dataclasses.replace(shape, vocab_size=rows))
        stored.check()
        like_llm = str(getattr(self.run_args, "dwm_init", "")).startswith("llm:")
        # The stored weight is an offset from one.
        offset = like_llm and getattr(self.run_args, "layernorm_zero_centered_gamma", False)
        for rule in stored.family.rules(shape):
            tensor = stored.load(rule)
            if rule.kind == "vocab":
                tensor = tensor[: shape.vocab_size]
            elif rule.kind == "norm" and offset:
                tensor = (tensor.float() + 1).to(tensor.dtype)
            yield from rule.to_hf(tensor).items()
        yield _SCORE, self.load(_SCORE)
