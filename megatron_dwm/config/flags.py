"""`DWMConfig` as an argparse group: one flag per field, help text from the field itself."""

from __future__ import annotations

import argparse
import dataclasses
import typing

from megatron_dwm.config.choices import attribute_name, flag
from megatron_dwm.config.schema import DWMConfig


def add_dwm_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the `--dwm-*` flags; pass it to Megatron as (part of) `extra_args_provider`.

    Adding the flags twice is harmless, so the launcher works with a script that adds them itself.

    Args:
        parser: Megatron's argument parser.

    Returns:
        The same parser.
    """
    if any("--dwm" in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group(title="data weighting model")
    types = typing.get_type_hints(DWMConfig)
    for spec in dataclasses.fields(DWMConfig):
        options: dict = {"dest": attribute_name(spec.name), "help": spec.metadata["help"]}
        if types[spec.name] is bool:
            options["action"] = "store_true"
        else:
            options["default"] = spec.default
            options["type"] = _scalar(types[spec.name])
            if "nargs" in spec.metadata:
                options["nargs"] = spec.metadata["nargs"]
        group.add_argument(flag(spec.name), **options)
    return parser


def _scalar(annotation: object) -> type:
    """Returns the type of one value: `int | None` -> int, `list[str] | None` -> str."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if candidate in (int, float, str):
            return typing.cast(type, candidate)
        if typing.get_origin(candidate) is list:
            return typing.cast(type, typing.get_args(candidate)[0])
    raise TypeError(f"no argparse type for {annotation}")
