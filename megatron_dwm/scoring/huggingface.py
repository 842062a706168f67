"""Loads a weighting model that was exported to a Hugging Face folder."""

from __future__ import annotations

import os
from typing import Any

import torch

from megatron_dwm.conversion.dwm_classifier import LENGTH, TEMPERATURE, read_classifier
from megatron_dwm.conversion.hf_folder import find_weights
from megatron_dwm.errors import ConversionError, DWMError, in_short
from megatron_dwm.hosts import cpu
from megatron_dwm.scoring.identity import digest_of
from megatron_dwm.weighting_model.pooling import pool_tokens


def usable_device() -> torch.device:
    """Returns the device that this process scores on."""
    if cpu.wanted():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class HuggingFaceScorer:
    """An `AutoModelForSequenceClassification` with one label; see `WindowScorer`.

    The score uses the last real token, found by its position (the padding id may be a document's
    own token), or the mean over the real tokens if an exported weighting model's config.json says
    so. No code from the folder is run.

    Args:
        folder: folder written by `save_pretrained`.
        device: device for the model.

    Raises:
        DWMError: transformers is not installed, the folder cannot be loaded, or the model does not
            have a linear head for one label.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        try:
            from transformers import AutoConfig, AutoModelForSequenceClassification
        except ImportError as error:
            raise DWMError(
                f"--hf needs transformers, which cannot be imported ({error}); install the extra: "
                "pip install 'megatron-dwm[convert]'"
            ) from error
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise DWMError(f"--hf {folder} has no config.json; give a folder of save_pretrained")
        try:
            source = read_classifier(folder)
            find_weights(folder)
        except ConversionError as error:
            raise DWMError(f"--hf {error}") from error
        try:
            settings = dict(source.config)
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except Exception as error:
            raise DWMError(
                f"--hf {folder} cannot be loaded as a sequence classifier ({in_short(error)})"
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise DWMError(
                f"--hf {folder} has no weights for {', '.join(missing[:4])}; a language model is "
                "not a weighting model: give an export of the DWM, with its score head"
            )
        head = getattr(model, "score", None)
        if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
            raise DWMError(
                f"--hf {folder}: a {type(model).__name__} with {model.config.num_labels} labels; "
                "a weighting model has a linear head `score` and num_labels 1"
            )
        self.where = folder
        self.notes: list[str] = []
        self.pooling = source.pooling
        self.vocab_size = int(source.vocab_size or model.config.vocab_size)
        longest = getattr(model.config, "max_position_embeddings", None)
        self.max_length = longest
        # An export records its run's temperature.
        self.default_length = source.config.get(LENGTH, longest)
        self.temperature: float | None = source.config.get(TEMPERATURE)
        self._model: Any = model.to(device).eval()
        self._device = device

    def scores(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Scores a batch that is padded on the right; see `WindowScorer`."""
        tokens, lengths = tokens.to(self._device), lengths.to(self._device)
        positions = torch.arange(tokens.size(1), device=self._device)
        hidden = self._model.base_model(
            input_ids=tokens,
            attention_mask=(positions < lengths.unsqueeze(1)).long(),
            use_cache=False,
        ).last_hidden_state
        pooled = pool_tokens(hidden.transpose(0, 1), lengths, self.pooling)
        head = self._model.score
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(pooled, head.weight.float(), bias).squeeze(-1)

    def identity(self) -> str:
        """Returns a digest of weights, configuration and device kind."""
        config = self._model.config.to_dict()
        # Not part of the model: where it was loaded from, and by which version.
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        described = {**config, "pooling": self.pooling, "device": self._device.type}
        return digest_of(self._model, described)
