"""Transformer Engine for tests: what is not written and what cannot be fetched say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transformer_engine_cpu import extension, source


def test_what_is_not_written_can_be_named_and_compared_and_raises_when_it_is_called() -> None:
    module = extension.module()
    kinds = module.NVTE_QKV_Layout
    assert kinds.NVTE_SB3HD != kinds.NVTE_BSHD_BSHD_BSHD
    assert kinds.NVTE_SB3HD == kinds.NVTE_SB3HD
    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.fused_attn_fwd"):
        module.fused_attn_fwd(1)


def test_a_registry_that_cannot_be_reached_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "ROOT", tmp_path)
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(source.SourceMissing) as error:
        source.folder()
    message = str(error.value)
    assert "\n" not in message
    assert source.VERSION in message and "PIP_INDEX_URL" in message and "ERROR" in message
    assert not (tmp_path / ".transformer_engine" / source.VERSION).exists()


def test_what_is_there_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "ROOT", tmp_path)
    target = tmp_path / ".transformer_engine" / source.VERSION
    target.mkdir(parents=True)
    (target / source.WHOLE).touch()
    assert source.folder() == target
