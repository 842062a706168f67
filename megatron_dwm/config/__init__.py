"""All settings of data weighting, and their command-line flags."""

from megatron_dwm.config.choices import attribute_name, flag
from megatron_dwm.config.schema import DWMConfig

__all__ = ["DWMConfig", "attribute_name", "flag"]
