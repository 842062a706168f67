"""What a run that was killed while saving leaves: an empty tracker, a description that is stale."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.hosts.megatron_lm import cut_short  # noqa: E402

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with whole iterations 2, 4 and 100, finished in the order 100, 2, 4, and a torn 6."""
    for age, iteration in enumerate((100, 2, 4, 6)):
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        (folder / ".metadata").write_text("index")
        if iteration != 6:
            (folder / "metadata.json").write_text("{}")
            os.utime(folder / "metadata.json", (1000 + age, 1000 + age))

    def problems(folder):
        return [] if os.path.exists(os.path.join(folder, "metadata.json")) else ["torn"]

    monkeypatch.setattr(cut_short, "problems_of", problems)
    return SimpleNamespace(load=str(tmp_path), save=str(tmp_path), ckpt_format="torch_dist")


def mended(run) -> tuple[str, list[str]]:
    said: list[str] = []
    cut_short.mend_tracker(run, said.append)
    with open(os.path.join(run.load, TRACKER)) as file:
        return file.read(), said


class TestTracker:
    @pytest.mark.parametrize("left", ["", "\n", "\0\0\0"])
    def test_an_empty_one_names_what_was_finished_last(self, run, tmp_path, left):
        """Not the highest number: the run had gone back from 100."""
        (tmp_path / TRACKER).write_text(left)
        text, said = mended(run)
        assert text == "4"
        assert len(said) == 1 and TRACKER in said[0] and "iteration 4" in said[0]
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [TRACKER]

    @pytest.mark.parametrize("left", ["2", "release", "nonsense"])
    def test_any_other_is_left_alone(self, run, tmp_path, left):
        (tmp_path / TRACKER).write_text(left)
        assert mended(run) == (left, [])

    def test_that_of_another_save_folder_is_mended_too(self, run, tmp_path):
        run.load = None
        (tmp_path / TRACKER).write_text("")
        said: list[str] = []
        cut_short.mend_tracker(run, said.append)
        assert (tmp_path / TRACKER).read_text() == "4" and len(said) == 1

    def test_without_a_whole_iteration_it_stays_empty(self, run, tmp_path):
        (tmp_path / TRACKER).write_text("")
        for iteration in (2, 4, 100):
            (tmp_path / f"iter_{iteration:07d}" / "metadata.json").unlink()
        assert mended(run) == ("", [])

    def test_none_is_made(self, run, tmp_path):
        cut_short.mend_tracker(run, pytest.fail)
        run.load = None
        cut_short.mend_tracker(run, pytest.fail)
        assert not (tmp_path / TRACKER).exists()


class TestUnfinished:
    @staticmethod
    def described(folder) -> bool:
        found = [(folder / name).exists() for name in (".metadata", "metadata.json")]
        assert found[0] == found[1]
        return found[0]

    def test_description_goes_before_the_iteration_is_saved_again(self, run, tmp_path):
        (tmp_path / TRACKER).write_text("2")
        cut_short.forget_unfinished(run, 4)
        assert not self.described(tmp_path / "iter_0000004")
        assert self.described(tmp_path / "iter_0000002")
        assert self.described(tmp_path / "iter_0000100")

    def test_what_the_tracker_names_stays(self, run, tmp_path):
        (tmp_path / TRACKER).write_text("4")
        cut_short.forget_unfinished(run, 4)
        assert self.described(tmp_path / "iter_0000004")

    def test_new_iterations_and_no_save_are_fine(self, run, tmp_path):
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        cut_short.forget_unfinished(run, 8)
        cut_short.forget_unfinished(SimpleNamespace(save=None), 4)
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before
