"""The types of the values of a config.json, as in transformers' configurations.

transformers 5 checks them strictly: null is not false, and "1e-6" and 1 are not floating point
numbers. In addition, numbers must be usable for building a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_dwm.files.json_files import shown

# Any size above this is an error in the file.
_LARGEST = 2**31 - 1


def is_count(value: Any) -> bool:
    """Returns whether a value is a positive integer that can be a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number; true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Converting a larger integer fails.
    return abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


_BOOL = "true or false", lambda value: isinstance(value, bool)
_STRING = "a string", lambda value: isinstance(value, str)
_COUNT = "a positive number", is_count
_COUNT_OR_NULL = "a positive number or null", _or_null(is_count)
_FLOAT = (
    "a floating point number of 0 or more",
    lambda value: isinstance(value, float) and math.isfinite(value) and value >= 0,
)
_SHARE = "a number from 0 to 1", _share
_SHARE_OR_NULL = "a number from 0 to 1 or null", _or_null(_share)
_NUMBER_OR_NULL = "a number or null", _or_null(is_number)
_OBJECT_OR_NULL = "an object or null", _or_null(lambda value: isinstance(value, dict))
_STRINGS_OR_NULL = (
    "a list of strings or null",
    _or_null(
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
    ),
)

# Types for all families; each key has the same type wherever it occurs.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "tie_word_embeddings": _BOOL,
    "attention_bias": _BOOL,
    "mlp_bias": _BOOL,
    "use_sliding_window": _BOOL,
    "scale_attn_weights": _BOOL,
    "scale_attn_by_inverse_layer_idx": _BOOL,
    "add_cross_attention": _BOOL,
    "use_cache": _BOOL,
    "hidden_act": _STRING,
    "activation_function": _STRING,
    "max_position_embeddings": _COUNT,
    "n_positions": _COUNT,
    "num_key_value_heads": _COUNT_OR_NULL,
    "head_dim": _COUNT_OR_NULL,
    "n_inner": _COUNT_OR_NULL,
    "rms_norm_eps": _FLOAT,
    "layer_norm_epsilon": _FLOAT,
    "router_aux_loss_coef": _FLOAT,
    "attention_dropout": _SHARE_OR_NULL,
    "attn_pdrop": _SHARE,
    "embd_pdrop": _SHARE,
    "resid_pdrop": _SHARE,
    "partial_rotary_factor": _NUMBER_OR_NULL,
    "sliding_window": _COUNT_OR_NULL,
    "rope_parameters": _OBJECT_OR_NULL,
    "layer_types": _STRINGS_OR_NULL,
}


def type_issues(config: Mapping[str, Any]) -> list[str]:
    """Returns the wrong types in a config.json, one text for each key."""
    return [
        f"{name} is {shown(config[name])}, needs {what}"
        for name, (what, fits) in _TYPES.items()
        if name in config and not fits(config[name])
    ]
