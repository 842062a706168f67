"""What tests with Transformer Engine ask for."""

from __future__ import annotations

import pytest

from tests.transformer_engine_cpu import source


@pytest.fixture(scope="session")
def transformer_engine() -> dict[str, str]:
    """Returns the variable of ranks that have Transformer Engine's Python classes.

    Fails, in one line, where they cannot be fetched.
    """
    try:
        return {"TRANSFORMER_ENGINE": str(source.folder())}
    except source.SourceMissing as error:
        pytest.fail(str(error), pytrace=False)
