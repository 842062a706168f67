"""The one error that a conversion raises for what a user can correct."""

from megatron_dwm.errors import DWMError


class ConversionError(DWMError):
    """A checkpoint, folder or flag that cannot be converted; the message says what to do."""
