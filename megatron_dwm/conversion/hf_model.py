"""Reads the language model of a Hugging Face folder by its family's rules."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_dwm.conversion.families import FAMILIES, shape_from_config
from megatron_dwm.conversion.hf_folder import _read, _read_json, _tensor_files
from megatron_dwm.conversion.tensor_rules import Rule, compare
from megatron_dwm.errors import ConversionError

# The dtypes of safetensors that a model may have.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OUTPUT = "lm_head.weight"


class HfModel:
    """One folder with `config.json` and safetensors.

    Attributes:
        folder: The folder.
        config: The parsed `config.json`.
        shape: The model's shape from it.
        dtypes: Dtypes of the tensors that the model has.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """Opens a folder and compares every name and shape with what its config.json describes.

        Raises:
            ConversionError: A file is missing or damaged, the model is of no known family, or a
                tensor is unknown, missing, of the wrong shape or not floating point.
        """
        self.folder = Path(folder)
        self.config = _read_json(self.folder / "config.json")
        self.shape = shape_from_config(self.config)
        self.family = FAMILIES[self.shape.family]
        self._files = _tensor_files(self.folder)
        if self.shape.num_layers * max(self.shape.num_experts, 1) > len(self._files):
            raise ConversionError(
                f"{self.folder} does not hold the {self.family.label} that its config.json "
                f"describes: {len(self._files)} tensors for {self.shape.num_layers} layers."
            )
        self.rules = self.family.rules(self.shape)
        self._names = {self._full_name(name): name for name in self._files}
        if len(self._names) != len(self._files):
            files = self._files
            double = next(n for n in files if n != self._full_name(n) in files)
            raise ConversionError(
                f"{self.folder} has {double} and {self._full_name(double)}, which are one tensor; "
                "remove one of them."
            )
        self.dtypes = self._check()

    def _full_name(self, name: str) -> str:
        """Returns a tensor's name in the causal model; a bare base model has no prefix."""
        if name.startswith(self.family.base_prefix) or name == _OUTPUT:
            return name
        return self.family.base_prefix + name

    def _check(self) -> set[torch.dtype]:
        needed: dict[str, tuple[int, ...]] = {}
        for rule in self.rules:
            needed |= rule.hf_shapes()
        found: dict[str, tuple[int, ...]] = {}
        kinds: dict[str, str] = {}
        for full, name in self._names.items():
            if not full.endswith(self.family.ignored or ("\0",)):
                found[full], kinds[full] = self._header(name)
        if self.shape.tied and _OUTPUT in found:
            self._check_tied_output(needed, found)
        issues = compare(found, needed)
        odd = [name for name in needed if kinds.get(name, "F32") not in _DTYPES]
        if not issues and odd:
            issues = f"{odd[0]} is stored as {kinds[odd[0]]}, needs one of {', '.join(_DTYPES)}"
        if issues:
            raise ConversionError(
                f"{self.folder} does not hold the {self.family.label} that its config.json "
                f"describes: {issues}."
            )
        return {_DTYPES[kinds[name]] for name in needed}

    def _check_tied_output(
        self, needed: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
    ) -> None:
        """Checks a tied output layer that some files contain: it must equal the embedding."""
        embedding = self.rules[0].hf[0]
        if embedding in found and found[_OUTPUT] == found[embedding] == needed[embedding]:
            if torch.equal(self._load(_OUTPUT), self._load(embedding)):
                del found[_OUTPUT]
                return
        raise ConversionError(
            f"{self.folder} has {_OUTPUT} of its own though config.json ties it to {embedding}; "
            "set tie_word_embeddings to false if the two should differ."
        )

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(name)
                return tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} cannot be read: {error}") from error

    def _load(self, full: str) -> torch.Tensor:
        name = self._names[full]
        return next(iter(_read(self._files[name], [name])))[1]

    def load(self, rule: Rule, dtype: torch.dtype, rows: int | None = None) -> torch.Tensor:
        """Loads the tensor of a rule, in Megatron's layout.

        Args:
            rule: A rule of `tensor_rules`.
            dtype: The dtype to return.
            rows: Rows of a padded vocabulary; those after the true ones are zero.

        Returns:
            A contiguous tensor with its own storage.

        Raises:
            ConversionError: A file cannot be read, or fp16 cannot hold the values.
        """
        parts = tuple(self._load(name) for name in rule.hf)
        tensor = rule.to_megatron(parts)
        converted = tensor.to(dtype).contiguous()
        if dtype == torch.float16 and not converted.isfinite().all():
            raise ConversionError(
                f"--dtype fp16 cannot hold the values of {rule.hf[0]}; use bf16 or fp32."
            )
        if rows is not None and rule.kind == "vocab" and rows != converted.shape[0]:
            padded = converted.new_zeros(rows, *converted.shape[1:])
            padded[: converted.shape[0]] = converted
            return padded
        # The file's memory must not be kept alive, or saved along with a part of it.
        return converted.clone() if any(_shares(converted, part) for part in parts) else converted


def _shares(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def padded_vocabulary(size: int, divisible_by: int, tensor_parallel: int) -> int:
    """Returns the rows that Megatron gives an embedding: a multiple of the product of both.

    Args:
        size: True vocabulary size.
        divisible_by: `--make-vocab-size-divisible-by`.
        tensor_parallel: `--tensor-model-parallel-size` of the run.
    """
    step = divisible_by * tensor_parallel
    return math.ceil(size / step) * step
