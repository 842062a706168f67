"""Describes a weighting model (DWM) as a Hugging Face sequence classifier with one label.

With `last` pooling this is transformers' own class. With `mean` pooling there is none, and a small
module is written beside the weights. Its configuration has its own model type: with `llama`,
transformers would load the folder without the module and silently score by the last token.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

from megatron_dwm.conversion.families import hf_config
from megatron_dwm.conversion.families.config_types import is_count, is_number
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.errors import ConversionError
from megatron_dwm.files.json_files import JsonError, read_object, shown

MODULE = "modeling_dwm.py"
# This project's own keys in config.json.
POOLING = "dwm_pooling"
# Number of rows of the weighting model's embedding; one for padding may follow.
VOCABULARY = "dwm_vocab_size"
# From the run, if known: tau of the weights, tokens per sample.
TEMPERATURE = "dwm_temperature"
LENGTH = "dwm_seq_length"

_MEAN_TYPE = "dwm_mean_"
# model_type -> the stem of transformers' class names.
_STEMS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_LABEL = "weight"
_COUNT = "a positive number", is_count
# Keys of config.json that this module and the scorer read.
_OWN_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "architectures": (
        "a list of strings",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    ),
    "id2label": ("an object", lambda value: isinstance(value, dict)),
    "num_labels": _COUNT,
    VOCABULARY: _COUNT,
    LENGTH: _COUNT,
    TEMPERATURE: ("a number above 0", lambda value: is_number(value) and value > 0),
}


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A folder's config.json, as far as it concerns a score head.

    Attributes:
        config: The contents, with transformers' own model type.
        labels: Number of labels; 0 for a model that is not a sequence classifier.
        pooling: `last` or `mean`.
        vocab_size: Number of embedding rows without padding.
    """

    config: dict[str, Any]
    labels: int
    pooling: str
    vocab_size: int | None


def classifier_config(
    shape: ModelShape, pooling: str, dtype: str, vocab_size: int, pad_token_id: int | None
) -> dict[str, Any]:
    """Returns the contents of config.json.

    Args:
        shape: The model's shape, including the row for padding, if any.
        pooling: `last` or `mean`.
        dtype: Name of the weights' dtype.
        vocab_size: Number of embedding rows without the one for padding.
        pad_token_id: Id of padding; None allows only batches of one.

    Raises:
        ConversionError: The pooling is unknown.
    """
    config = hf_config(shape, dtype)
    stem = _STEMS[config["model_type"]]
    config |= {
        "architectures": [f"{stem}ForSequenceClassification"],
        "tie_word_embeddings": False,
        "use_cache": False,
        "problem_type": "regression",
        # Both spellings of "one label".
        "num_labels": 1,
        "id2label": {"0": _LABEL},
        "label2id": {_LABEL: 0},
        "pad_token_id": pad_token_id,
        POOLING: pooling,
        VOCABULARY: vocab_size,
    }
    if pooling == "mean":
        module = MODULE.removesuffix(".py")
        config |= {
            "architectures": [f"MeanPooled{stem}ForSequenceClassification"],
            "model_type": _MEAN_TYPE + config["model_type"],
            "auto_map": {
                "AutoConfig": f"{module}.MeanPooled{stem}Config",
                "AutoModelForSequenceClassification": (
                    f"{module}.MeanPooled{stem}ForSequenceClassification"
                ),
            },
        }
    elif pooling != "last":
        raise ConversionError(f"the pooling is {pooling!r}; last and mean are known.")
    return config


def module_source(shape: ModelShape) -> str:
    """Returns the text of the module that a mean-pooling model needs."""
    model_type = hf_config(shape, "float32")["model_type"]
    return _MODULE.substitute(stem=_STEMS[model_type], model_type=_MEAN_TYPE + model_type)


def read_classifier(folder: str | os.PathLike) -> Classifier:
    """Reads a folder's description of a score head, without running any code from it.

    Args:
        folder: A Hugging Face folder, of a language model or a classifier.

    Raises:
        ConversionError: config.json is missing or damaged, or its pooling is unknown.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConversionError(f"{path} is missing; give a folder that save_pretrained wrote.")
    try:
        config = read_object(path)
    except JsonError as error:
        raise ConversionError(f"{path} is damaged: {error}") from error
    config = stock_config(config)
    for name, (what, fits) in _OWN_TYPES.items():
        value = config.get(name)
        if value is not None and not fits(value):
            raise ConversionError(f"{path}: {name} is {shown(value)}, needs {what}.")
    architectures = config.get("architectures") or [""]
    labels = 0
    if architectures[0].endswith("ForSequenceClassification"):
        # transformers leaves out its default, two labels.
        labels = len(config.get("id2label") or ()) or config.get("num_labels") or 2
    pooling = config.get(POOLING, "last")
    if pooling not in ("last", "mean"):
        raise ConversionError(f"{path}: {POOLING} is {shown(pooling)}; last and mean are known.")
    return Classifier(config, labels, pooling, config.get(VOCABULARY))


def stock_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of a config.json with transformers' own model type and no module."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.startswith(_MEAN_TYPE):
        return config
    stock = {name: value for name, value in config.items() if name != "auto_map"}
    return {**stock, "model_type": kind.removeprefix(_MEAN_TYPE)}


_MODULE = Template(
    '''"""Scores text with a data weighting model: the mean of its tokens' states, times a head.

Needed because transformers' own classifier takes the state of the last token. Load with

    pipeline("text-classification", model=FOLDER, trust_remote_code=True, function_to_apply="none")
"""

import torch
from transformers import AutoModel, ${stem}Config, ${stem}ForSequenceClassification, ${stem}Model
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class MeanPooled${stem}Config(${stem}Config):
    """${stem}Config under a name of its own, so that it is not mistaken for last-token pooling."""

    model_type = "${model_type}"


class MeanPooled${stem}Model(${stem}Model):
    """The backbone, as AutoModel finds it by the configuration."""

    config_class = MeanPooled${stem}Config


AutoModel.register(MeanPooled${stem}Config, MeanPooled${stem}Model, exist_ok=True)


class MeanPooled${stem}ForSequenceClassification(${stem}ForSequenceClassification):
    """One score for each text, from the mean over its tokens without padding."""

    config_class = MeanPooled${stem}Config

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        return_dict=None,
        **kwargs,
    ):
        """Returns `logits` `[b, 1]`; `labels` `[b]` or `[b, 1]` add the mean squared error.

        Tokens whose `attention_mask` `[b, s]` is 0, or without it those with the id of padding, do
        not count.
        """
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        ).last_hidden_state.float()
        if attention_mask is not None:
            counts = attention_mask.bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            counts = input_ids != self.config.pad_token_id
        else:
            counts = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        counts = counts.to(hidden.device).unsqueeze(-1)
        pooled = hidden.masked_fill(~counts, 0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        logits = torch.nn.functional.linear(pooled, self.score.weight.float())
        loss = None
        if labels is not None:
            loss = torch.nn.functional.mse_loss(logits.squeeze(-1), labels.float().reshape(-1))
        output = SequenceClassifierOutputWithPast(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
'''
)
