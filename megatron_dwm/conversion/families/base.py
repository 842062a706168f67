"""A model family: its arguments, its config.json, its tensors.

Each family is defined once. Export reads arguments and writes a config, import does the reverse,
and both move tensors by the same rules.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from megatron_dwm.conversion.families.config_types import is_count, type_issues
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.tensor_rules import Rule
from megatron_dwm.errors import ConversionError
from megatron_dwm.files.json_files import shown

# Flags whose spelling differs from their argument.
FLAG_NAMES = {
    "add_bias_linear": "--add-bias-linear (see --disable-bias-linear)",
    "layernorm_epsilon": "--norm-epsilon",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
}

# Values that an argument must have; an argument missing from an older checkpoint counts as fitting.
NO_MODEL_HAS: dict[str, tuple[Any, ...]] = {
    "qk_l2_norm": (False,),
    "multi_latent_attention": (False,),
    "rotary_interleaved": (False,),
    "no_rope_freq": (None,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "use_mup": (False,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (False,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "spec": (None,),
}


# Arguments that every checkpoint must have.
_NUMBERS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
    "max_position_embeddings",
)


def flag_of(argument: str) -> str:
    """Returns the flag of an argument, as messages name it."""
    return FLAG_NAMES.get(argument, "--" + argument.replace("_", "-"))


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Family(abc.ABC):
    """One model family; subclasses fill in the tables and the tensors.

    Attributes:
        name: Hugging Face's `model_type`.
        label: Its name in messages.
        base_prefix: Prefix of all tensors except the output layer in Hugging Face's causal model.
        required: Megatron argument -> allowed values, of which import writes the first. A
            checkpoint must have the argument.
        own_numbers: Megatron arguments of this family that must be positive numbers.
        unused: Megatron argument -> allowed values; absent counts as fitting.
        config_fits: config.json key -> values that fit; absent counts as fitting.
        config_needs: config.json keys that must exist.
        ignored: Endings of Hugging Face names that hold no weights.
    """

    name: str
    label: str
    base_prefix: str
    required: Mapping[str, tuple[Any, ...]] = {}
    own_numbers: tuple[str, ...] = ()
    unused: Mapping[str, tuple[Any, ...]] = {}
    config_fits: Mapping[str, tuple[Any, ...]] = {}
    config_needs: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    # ------------------------------------------------------------- Megatron's arguments

    def values_from_args(self, args: Any, rope_scaling_factor: float | None) -> dict[str, Any]:
        """Returns a shape's values from a checkpoint's arguments.

        Raises:
            ConversionError: The model does not belong to the family; names every argument that says
                so.
        """
        numbers = (*_NUMBERS, *self.own_numbers)
        lost = [name for name in numbers if not _counts(getattr(args, name, None))]
        if lost:
            raise ConversionError(
                "The checkpoint's arguments do not say what the model is: "
                + "; ".join(f"{name} is {getattr(args, name, None)!r}" for name in lost)
                + ". They must be positive numbers, as the trainer saves them."
            )
        issues = [
            f"{flag_of(name)} is {getattr(args, name, None)!r}, needs {fits[0]!r}"
            for name, fits in self.required.items()
            if getattr(args, name, None) not in fits
        ]
        issues += [
            f"{flag_of(name)} is {getattr(args, name)!r}, needs {fits[0]!r}"
            for name, fits in {**NO_MODEL_HAS, **self.unused}.items()
            if getattr(args, name, fits[0]) not in fits
        ]
        heads = args.num_attention_heads
        if args.hidden_size % heads:
            issues.append(
                f"--hidden-size {args.hidden_size} is not a multiple of "
                f"--num-attention-heads {heads}"
            )
        gqa = getattr(args, "group_query_attention", False)
        values = {
            "family": self.name,
            "num_layers": args.num_layers,
            "hidden_size": args.hidden_size,
            "ffn_hidden_size": args.ffn_hidden_size,
            "num_attention_heads": heads,
            "num_query_groups": args.num_query_groups if gqa else heads,
            "kv_channels": getattr(args, "kv_channels", None) or args.hidden_size // heads,
            "vocab_size": args.padded_vocab_size,
            "max_position_embeddings": args.max_position_embeddings,
            "layernorm_epsilon": getattr(args, "layernorm_epsilon", 1e-5),
            "tied": not getattr(args, "untie_embeddings_and_output_weights", False),
        }
        own, more = self.own_values_from_args(args, rope_scaling_factor)
        issues += more
        if issues:
            raise ConversionError(
                f"The checkpoint cannot be written as a {self.label}: {'; '.join(issues)}."
            )
        return {**values, **own}

    @abc.abstractmethod
    def own_values_from_args(
        self, args: Any, rope_scaling_factor: float | None
    ) -> tuple[dict[str, Any], list[str]]:
        """Returns the values that only this family has, and reasons why they do not fit."""

    def to_args(self, shape: ModelShape) -> dict[str, Any]:
        """Returns Megatron's arguments of a model, without those of its tokenizer.

        Raises:
            ConversionError: Megatron cannot compute the model; names every reason.
        """
        own, issues = self.own_args(shape)
        if shape.hidden_size % shape.num_attention_heads:
            issues.append(
                f"the hidden size {shape.hidden_size} is not a multiple of the "
                f"{shape.num_attention_heads} heads"
            )
        if issues:
            raise ConversionError(
                f"Megatron cannot compute this {self.label}: {'; '.join(issues)}."
            )
        return {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "group_query_attention": shape.num_query_groups != shape.num_attention_heads,
            "num_query_groups": shape.num_query_groups,
            "kv_channels": shape.kv_channels,
            "max_position_embeddings": shape.max_position_embeddings,
            "layernorm_epsilon": shape.layernorm_epsilon,
            "untie_embeddings_and_output_weights": not shape.tied,
            "attention_dropout": shape.attention_dropout,
            "hidden_dropout": shape.hidden_dropout,
            **{name: fits[0] for name, fits in {**self.unused, **self.required}.items()},
            **own,
        }

    @abc.abstractmethod
    def own_args(self, shape: ModelShape) -> tuple[dict[str, Any], list[str]]:
        """Returns the arguments that only this family has, and what Megatron cannot compute."""

    # ------------------------------------------------------------- config.json

    def values_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a shape's values from a parsed `config.json`.

        Raises:
            ConversionError: The model does not belong to the family, or a number is missing.
        """
        issues = type_issues(config)
        fits = {"model_type": (self.name,), "quantization_config": (None,), **self.config_fits}
        issues += [
            f"{name} is {shown(config.get(name))}, needs {values[0]!r}"
            for name, values in fits.items()
            if config.get(name, None if name == "model_type" else values[0]) not in values
        ]
        issues += [f"{name} is missing" for name in self.config_needs if name not in config]
        issues += [
            f"{name} is {shown(config[name])}, needs a positive number"
            for name in self.config_needs
            if name in config and not is_count(config[name])
        ]
        if not issues:
            issues = self._layer_type_issues(config) + self.own_config_issues(config)
        if issues:
            issues = list(dict.fromkeys(issues))
            raise ConversionError(f"config.json is no {self.label}: {'; '.join(issues)}.")
        return {"family": self.name, **self.own_values_from_config(config)}

    def _layer_type_issues(self, config: Mapping[str, Any]) -> list[str]:
        types = config.get("layer_types")
        if types is None:
            return []
        others = [kind for kind in types if kind != "full_attention"]
        if others:
            return [f"layer_types has {others[0][:60]}, needs full_attention"]
        layers = config.get("num_hidden_layers", config.get("n_layer"))
        if len(types) != layers:
            return [f"layer_types names {len(types)} layers, and there are {layers}"]
        return []

    def own_config_issues(self, config: Mapping[str, Any]) -> list[str]:
        """Returns the issues that only this family has, in a config.json with correct types."""
        return []

    @abc.abstractmethod
    def own_values_from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all values of the shape except the family."""

    @abc.abstractmethod
    def to_config(self, shape: ModelShape) -> dict[str, Any]:
        """Returns the contents of `config.json` except dtype and the tokenizer's ids."""

    # ------------------------------------------------------------- tensors

    @abc.abstractmethod
    def layer_prefix(self, number: int) -> str:
        """Returns Hugging Face's prefix of a layer."""

    @abc.abstractmethod
    def layer_rules(self, shape: ModelShape) -> list[Rule]:
        """Returns the rules of a layer, under names relative to it."""

    @abc.abstractmethod
    def first_rules(self, shape: ModelShape) -> list[Rule]:
        """Returns the rules before the layers."""

    @abc.abstractmethod
    def last_rules(self, shape: ModelShape) -> list[Rule]:
        """Returns the rules after the layers, with the output layer unless tied."""

    def rules(self, shape: ModelShape, num_layers: int | None = None) -> list[Rule]:
        """Returns the rules of a whole model, or of its first layers, in the model's order."""
        layer = self.layer_rules(shape)
        numbers = range(shape.num_layers if num_layers is None else num_layers)
        layers = [
            rule.inside(f"decoder.layers.{number}.", self.layer_prefix(number))
            for number in numbers
            for rule in layer
        ]
        return [*self.first_rules(shape), *layers, *self.last_rules(shape)]
