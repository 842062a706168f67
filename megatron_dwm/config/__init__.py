"""All settings of data weighting, and their command-line flags."""

from megatron_dwm.config.schema import DWMConfig, attribute_name, flag

__all__ = ["DWMConfig", "attribute_name", "flag"]
