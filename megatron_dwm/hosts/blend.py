"""A blend of data sets as `--data-path` writes it."""

from __future__ import annotations

from megatron.core.datasets.utils import get_blend_from_list

from megatron_dwm.errors import DWMError


def blend_of(paths: list[str] | None, flag: str) -> tuple[list[str], list[float] | None]:
    """Parses `PREFIX ...` or `WEIGHT PREFIX ...` as `--data-path` does.

    Raises:
        DWMError: an even number of words that are not weights and prefixes in turn.
    """
    try:
        blend = get_blend_from_list(paths)
    except ValueError as error:
        raise DWMError(
            f"{flag} {' '.join(paths or [])}: an even number of words is read as WEIGHT PREFIX "
            f"pairs, and {error}; give weights, or one prefix"
        ) from None
    return ([], None) if blend is None else (list(blend[0]), blend[1])
