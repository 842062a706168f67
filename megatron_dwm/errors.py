"""The one error type for problems that a user can fix: its text is the whole message."""

from __future__ import annotations


class DWMError(ValueError):
    """Bad input or an unsupported combination; names the flag or file, the value and what to do.

    The launcher and `attach` print it as one line and end the run with exit code 2.
    """

    def __init__(self, message: str, this_rank_only: bool = False) -> None:
        """Keeps the message.

        Args:
            message: the whole text for the user, one line.
            this_rank_only: whether other ranks may not see the error, so that the rank that sees it
                must print it, whatever its number.
        """
        super().__init__(message)
        self.this_rank_only = this_rank_only


class InputError(DWMError):
    """A fault in a user's file, or in a flag that names one; says what, where and what to do."""


class ConversionError(DWMError):
    """A checkpoint, folder or flag that cannot be converted; the message says what to do."""


def in_short(error: BaseException) -> str:
    """Returns the type and the beginning of the text of another library's error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
