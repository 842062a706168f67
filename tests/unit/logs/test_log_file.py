"""The step log as files: parts in order, and a resumed run that reads their end only."""

import builtins
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dwm.logs import log_file
from megatron_dwm.logs.log_file import FILE_NAME, cut_after, next_part, parts, read_log


def text_of(iterations, width=40):
    lines = ({"iteration": i, "x": "y" * width} for i in iterations)
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_parts(folder, *chunks):
    """Writes the parts of a log, the last one as the newest; returns its path."""
    path = folder / FILE_NAME
    for number, chunk in enumerate(chunks[:-1], start=1):
        (folder / f"dwm_log.{number}.jsonl").write_text(chunk)
    path.write_text(chunks[-1])
    return str(path)


def iterations(path):
    return [line["iteration"] for line in read_log(path)]


class TestParts:
    def test_are_read_by_number_and_the_newest_last(self, tmp_path):
        """By number, not by name: 10 comes after 9."""
        path = write_parts(tmp_path, *(text_of([i]) for i in range(1, 12)), text_of([12]))
        assert iterations(path) == list(range(1, 13))
        assert next_part(path) == str(tmp_path / "dwm_log.12.jsonl")

    def test_without_the_newest_the_others_are_read(self, tmp_path):
        """A run that is killed between two parts has left it out."""
        path = write_parts(tmp_path, text_of([1]), text_of([2]), "")
        os.remove(path)
        assert iterations(path) == [1, 2]

    def test_files_of_other_names_are_none(self, tmp_path):
        path = write_parts(tmp_path, text_of([1]))
        for name in ("dwm_log.old.jsonl", "dwm_log.1.json", "my_dwm_log.1.jsonl", "dwm_log..jsonl"):
            (tmp_path / name).write_text(text_of([9]))
        assert parts(path) == [path] and iterations(path) == [1]

    def test_no_log_at_all_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=FILE_NAME):
            read_log(str(tmp_path / FILE_NAME))

    def test_lines_that_are_none_are_left_out(self, tmp_path):
        path = write_parts(tmp_path, text_of([1]))
        with open(path, "ab") as file:
            file.write(b'17\n[1]\n\xff\xfe\n\0\0\0\n{"iteration": 2}\n{"iteration": 3, "x')
        assert iterations(path) == [1, 2]


class CountingFile:
    """A file that counts what is read of it."""

    total = 0

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def seek(self, *args):
        return self.file.seek(*args)

    def read(self, *args):
        found = self.file.read(*args)
        CountingFile.total += len(found)
        return found


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts the bytes that `log_file` reads; to read in another way is an error."""
    CountingFile.total = 0

    def counting(path, mode="r", *args, **kwargs):
        assert mode == "rb", "nothing is to be written again"
        return CountingFile(builtins.open(path, mode, *args, **kwargs))

    monkeypatch.setattr(log_file, "open", counting, raising=False)
    return lambda: CountingFile.total


class TestCut:
    def test_reads_only_the_end_and_writes_nothing_again(self, tmp_path, bytes_read):
        """Of 20 MB, less than 256 KB; the file is the same one, only shorter."""
        path = write_parts(tmp_path, text_of(range(1, 20001), width=1000))
        before = os.stat(path)
        assert before.st_size > 20e6
        kept = "".join(open(path).readlines()[:19990])
        cut_after(path, 19990)
        assert 0 < bytes_read() < 256 << 10
        assert os.stat(path).st_ino == before.st_ino
        assert open(path).read() == kept

    def test_leaves_older_parts_alone(self, tmp_path, bytes_read):
        path = write_parts(tmp_path, text_of(range(1, 20001), 1000), text_of([20001, 20002]))
        cut_after(path, 20001)
        assert bytes_read() < 64 << 10
        older = tmp_path / "dwm_log.1.jsonl"
        assert len(older.read_text().splitlines()) == 20000
        assert (tmp_path / FILE_NAME).read_text() == text_of([20001])

    def test_goes_back_over_parts_that_have_only_later_lines(self, tmp_path, bytes_read):
        """Without reading them: by their first line."""
        later = [text_of(range(k, k + 5000), 1000) for k in (11, 5011, 10011)]
        path = write_parts(tmp_path, text_of(range(1, 11)), *later)
        cut_after(path, 7)
        assert bytes_read() < 512 << 10
        assert os.listdir(tmp_path) == ["dwm_log.1.jsonl"]
        assert (tmp_path / "dwm_log.1.jsonl").read_text() == text_of(range(1, 8))

    def test_a_run_from_the_start_drops_all_parts(self, tmp_path):
        path = write_parts(tmp_path, text_of([1, 2]), text_of([3]))
        cut_after(path, 0)
        assert os.listdir(tmp_path) == []

    def test_without_a_log_there_is_nothing_to_do(self, tmp_path):
        cut_after(str(tmp_path / FILE_NAME), 5)
        cut_after(str(tmp_path / "none" / FILE_NAME), 5)

    @pytest.mark.parametrize("torn", [b"\0" * 100, b'{"iteration": 3, "x', b"\xff\n\0\n", b"\n\n"])
    def test_what_is_no_line_at_the_end_is_dropped(self, tmp_path, torn):
        """As a kill leaves it, or a file system that has lost what was not on the disk yet."""
        path = write_parts(tmp_path, text_of([1, 2]))
        with open(path, "ab") as file:
            file.write(torn)
        cut_after(path, 5)
        assert open(path).read() == text_of([1, 2])

    def test_a_kill_in_between_loses_nothing(self, tmp_path, monkeypatch):
        """At each of the changes to the folder; the next run takes it from there."""
        for kill_at in range(4):
            path = write_parts(tmp_path, text_of([1, 2, 3]), text_of([4, 5]), text_of([6]))
            left = kill_at

            def counted(real):
                def call(*args):
                    nonlocal left
                    if left == 0:
                        raise KeyboardInterrupt
                    left -= 1
                    return real(*args)

                return call

            with monkeypatch.context() as patch:
                patch.setattr(os, "remove", counted(os.remove))
                patch.setattr(os, "truncate", counted(os.truncate))
                try:
                    cut_after(path, 2)
                    assert kill_at == 3
                except KeyboardInterrupt:
                    assert kill_at < 3
            assert iterations(path)[:2] == [1, 2]
            cut_after(path, 2)
            assert iterations(path) == [1, 2]

    @settings(max_examples=300, deadline=None)
    @given(
        steps=st.lists(st.integers(1, 3), max_size=12),
        widths=st.lists(st.integers(0, 60), min_size=12, max_size=12),
        cuts=st.lists(st.integers(0, 12), max_size=2),
        torn=st.binary(max_size=30).filter(lambda b: b"\n" not in b),
        iteration=st.integers(1, 40),
        block=st.integers(1, 90),
    )
    def test_any_log_at_any_block_size(
        self, tmp_path_factory, steps, widths, cuts, torn, iteration, block
    ):
        """What is left is the lines up to the iteration, byte for byte."""
        folder = tmp_path_factory.mktemp("log")
        lines, at = [], 0
        for step, width in zip(steps, widths, strict=False):
            at += step
            lines.append((at, json.dumps({"iteration": at, "x": "y" * width}) + "\n"))
        bounds = [0, *sorted(min(c, len(lines)) for c in cuts), len(lines)]
        chunks = [
            "".join(text for _, text in lines[a:b])
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        path = write_parts(folder, *chunks)
        with open(path, "ab") as file:
            file.write(torn)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log_file, "_BLOCK", block)
            cut_after(path, iteration)
        left = "".join(open(part).read() for part in parts(path))
        assert left == "".join(text for i, text in lines if i <= iteration)
