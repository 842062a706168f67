"""One process needs no torchrun, unless a launcher has started many."""

import os

import pytest

from megatron_dwm.core.ranks import stand_alone

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch):
    """Starts as a process that no launcher has started."""
    for name in (*NAMES, "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_alone_is_rank_0_of_1(alone):
    stand_alone()
    assert [os.environ[name] for name in NAMES[:4]] == ["0", "0", "1", "1"]
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize(("count", "changed"), [("1", True), ("8", False)])
def test_one_of_many_is_left_to_its_script(alone, name, count, changed):
    alone.setenv(name, count)
    stand_alone()
    assert ("RANK" in os.environ) is changed


def test_what_torchrun_has_set_stays(alone):
    alone.setenv("RANK", "3")
    stand_alone()
    assert os.environ["RANK"] == "3" and "WORLD_SIZE" not in os.environ
