"""Where the step log goes: what every sink owes, and that none can hurt the training."""

import errno
import json
import os

import pytest

from megatron_dwm.logs import sinks as module
from megatron_dwm.logs.log_file import FILE_NAME, parts, read_log
from megatron_dwm.logs.names import NAMES, scalars_of
from megatron_dwm.logs.sinks import (
    ConsoleSink,
    JsonlSink,
    Sinks,
    TensorBoardSink,
    WandbSink,
    open_sinks,
)


def line_of(iteration, **more):
    return {
        "iteration": iteration, "stage": 1, "window": "meta", "lm_loss": 3.0 + iteration,
        "entropy": 0.9, "effective_sample_size": 0.8, "max_weight": 2.0, "min_weight": 0.5,
        "domain_weight": {"web": 1.5, "code": 0.5}, "domain_samples": {"web": 2, "code": 2}, **more,
    }  # fmt: skip


class Backend:
    """A TensorBoard writer, a Weights & Biases run and a printer; fails when told to."""

    def __init__(self):
        self.scalars, self.texts, self.rows, self.printed = {}, {}, [], []
        self.error = None

    def _work(self):
        if self.error is not None:
            raise self.error

    def add_custom_scalars(self, layout):
        self.layout = layout

    def add_scalar(self, name, value, iteration):
        self._work()
        self.scalars.setdefault(iteration, {})[name] = value

    def add_text(self, name, text, iteration):
        self._work()
        self.texts[iteration] = text

    def flush(self):
        self._work()

    def log(self, row, step):
        self._work()
        # As the client does: an older step than the last one is dropped.
        assert not self.rows or step >= self.rows[-1][0], "dropped"
        self.rows.append((step, row))

    def print(self, text):
        self._work()
        self.printed.append(text)


class OwnSink:
    """One that somebody else has written."""

    name = "own"

    def __init__(self):
        self.lines = []

    def write(self, line, iteration):
        self.lines.append(iteration)

    def flush(self):
        pass

    def close(self):
        pass


class RaisingSink(OwnSink):
    """Fails at one of its three methods."""

    name = "raising"

    def __init__(self, where, error):
        super().__init__()
        self.where, self.error, self.calls = where, error, 0

    def _maybe(self, where):
        if where == self.where:
            self.calls += 1
            raise self.error

    def write(self, line, iteration):
        self._maybe("write")

    def flush(self):
        self._maybe("flush")

    def close(self):
        self._maybe("close")


def jsonl(folder, backend):
    sink = JsonlSink(str(folder))
    return sink, lambda: [line["iteration"] for line in read_log(sink.path)]


def tensorboard(folder, backend):
    return TensorBoardSink(backend, 1), lambda: list(backend.scalars)


def wandb(folder, backend):
    return WandbSink(backend, 1), lambda: [step for step, _ in backend.rows]


def console(folder, backend):
    found = backend.printed
    return ConsoleSink(backend.print, 1), lambda: [int(line.split()[2]) for line in found]


def own(folder, backend):
    sink = OwnSink()
    return sink, lambda: sink.lines


KINDS = {"jsonl": jsonl, "tensorboard": tensorboard, "wandb": wandb, "console": console, "own": own}
FULL = OSError(errno.ENOSPC, "No space left on device")


class FullDisk:
    """A file on a disk that takes no more, from some number of bytes on."""

    def __init__(self, room=0):
        self.room, self.written = room, b""

    def write(self, text):
        taken = bytes(text[: self.room - len(self.written)])
        if not taken and len(text):
            raise FULL
        self.written += taken
        return len(taken)

    def close(self):
        pass


def fail(sink, backend):
    """Breaks what a sink writes to."""
    backend.error = RuntimeError("the server\nis away") if isinstance(sink, WandbSink) else FULL
    if isinstance(sink, JsonlSink):
        sink.file = FullDisk()


@pytest.mark.parametrize("kind", KINDS)
class TestContract:
    def test_every_line_arrives_in_order_once_flushed(self, kind, tmp_path):
        sink, found = KINDS[kind](tmp_path, Backend())
        for iteration in (3, 4, 7):
            sink.write(line_of(iteration), iteration)
            sink.flush()
        sink.close()
        assert found() == [3, 4, 7]

    def test_lines_are_not_changed(self, kind, tmp_path):
        """The next sink gets the same ones."""
        sink, _ = KINDS[kind](tmp_path, Backend())
        line = line_of(3, notices=["DWM: a word"], bad_step=["loss"], bad_steps={"loss": 1})
        text = json.dumps(line)
        sink.write(line, 3)
        sink.flush()
        assert json.dumps(line) == text

    def test_flush_and_close_without_lines_are_nothing(self, kind, tmp_path):
        sink, found = KINDS[kind](tmp_path, Backend())
        sink.flush()
        sink.close()
        assert found() == []

    def test_has_a_name_for_notices(self, kind, tmp_path):
        assert KINDS[kind](tmp_path, Backend())[0].name

    @pytest.mark.parametrize("where", ["write", "flush", "close"])
    @pytest.mark.parametrize("error", [FULL, RuntimeError("a\nclient's own"), KeyError("x")])
    def test_goes_on_when_another_one_fails(self, kind, tmp_path, where, error):
        """Whichever comes first. One notice, on one line, and the broken one is left alone."""
        for first in (True, False):
            said, folder = [], tmp_path / str(first)
            sink, found = KINDS[kind](folder, Backend())
            broken = RaisingSink(where, error)
            group = Sinks(said.append)
            for one in (broken, sink) if first else (sink, broken):
                group.open(one.name, lambda one=one: one)
            for iteration in (1, 2, 3):
                group.write(line_of(iteration), iteration)
                group.flush()
            group.close()
            assert found() == [1, 2, 3]
            assert len(said) == 1 and "raising" in said[0] and "\n" not in said[0]
            assert broken.calls == 1


class TestStopping:
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own"])
    def test_its_own_failure_stops_it_alone(self, kind, tmp_path):
        """What a real disk, server or terminal does to it, in the middle of the run."""
        said, backend, other = [], Backend(), OwnSink()
        sink, found = KINDS[kind](tmp_path, backend)
        group = Sinks(said.append)
        group.open(sink.name, lambda: sink)
        group.open(other.name, lambda: other)
        for iteration in range(1, 6):
            if iteration == 3:
                fail(sink, backend)
            group.write(line_of(iteration), iteration)
            group.flush()
        group.close()
        assert found() == [1, 2] and other.lines == [1, 2, 3, 4, 5]
        assert len(said) == 1 and sink.name in said[0] and "\n" not in said[0]
        assert ("No space left" in said[0]) or ("RuntimeError: the server is away" in said[0])

    def test_keyboard_interrupts_are_not_swallowed(self):
        group = Sinks(print)
        group.open("raising", lambda: RaisingSink("write", KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            group.write(line_of(1), 1)

    def test_a_console_that_is_gone_does_not_matter(self, tmp_path):
        """Then the notice cannot be printed either."""
        backend = Backend()
        backend.error = BrokenPipeError(errno.EPIPE, "Broken pipe")
        group = open_sinks(str(tmp_path), 0, None, None, 1, backend.print)
        group.write(line_of(1), 1)
        group.write(line_of(2), 2)
        group.close()
        assert [x["iteration"] for x in read_log(str(tmp_path / FILE_NAME))] == [1, 2]

    @pytest.mark.parametrize("blocked", ["file", "folder"])
    def test_a_log_that_cannot_be_opened_is_said_once(self, tmp_path, blocked):
        folder = tmp_path / "run"
        if blocked == "folder":
            folder.write_text("")
        else:
            folder.mkdir()
            (folder / FILE_NAME).mkdir()
        said = []
        group = open_sinks(str(folder), 5, None, None, 100, said.append)
        group.write(line_of(6), 6)
        group.close()
        assert len(said) == 1 and FILE_NAME in said[0] and "\n" not in said[0]


class TestJsonl:
    def test_a_full_disk_leaves_whole_lines_that_a_resumed_run_continues(self, tmp_path):
        """The disk takes a line and a half. The half is not read, and not there after resuming."""
        sink = JsonlSink(str(tmp_path))
        sink.write(line_of(1), 1)
        sink.flush()
        text = open(sink.path).read()
        disk = FullDisk(room=len(text) + len(text) // 2)
        sink.file.close()
        sink.file = disk
        for iteration in (2, 3):
            sink.write(line_of(iteration), iteration)
        with pytest.raises(OSError, match="No space"):
            sink.flush()
        with open(sink.path, "ab") as file:
            file.write(disk.written)
        assert [x["iteration"] for x in read_log(sink.path)] == [1, 2]
        resumed = JsonlSink(str(tmp_path), first_iteration=2)
        resumed.write(line_of(3), 3)
        resumed.flush()
        assert [json.loads(x)["iteration"] for x in open(sink.path)] == [1, 2, 3]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
    def test_a_real_full_device(self, tmp_path):
        """The kernel's own ENOSPC."""
        (tmp_path / FILE_NAME).symlink_to("/dev/full")
        said = []
        group = open_sinks(str(tmp_path), 0, None, None, 100, said.append)
        for iteration in (1, 2):
            group.write(line_of(iteration), iteration)
            group.flush()
        group.close()
        assert len(said) == 1 and "No space left on device" in said[0]

    def test_short_writes_are_continued(self, tmp_path):
        """A system call may take less than it was given."""
        sink = JsonlSink(str(tmp_path))
        real = sink.file

        class Slow:
            def write(self, text):
                return real.write(text[:7])

            def close(self):
                real.close()

        sink.file = Slow()
        for iteration in (1, 2):
            sink.write(line_of(iteration), iteration)
        sink.flush()
        sink.close()
        assert read_log(sink.path) == [line_of(1), line_of(2)]

    def test_what_json_does_not_know_is_refused(self, tmp_path):
        sink = JsonlSink(str(tmp_path))
        with pytest.raises(ValueError):
            sink.write(line_of(1, meta_loss=float("nan")), 1)


class TestRotation:
    SIZE = len(json.dumps(line_of(10))) + 1

    def write(self, folder, iterations, first=0, limit=3, kept=100, flush_every=1):
        sink = JsonlSink(str(folder), first, part_bytes=limit * self.SIZE, parts_kept=kept)
        for iteration in iterations:
            sink.write(line_of(iteration), iteration)
            if iteration % flush_every == 0:
                sink.flush()
        sink.flush()
        sink.close()
        return sink.path

    @pytest.mark.parametrize("flush_every", [1, 5, 1000])
    def test_no_file_is_larger_than_its_limit_and_no_line_is_lost(self, tmp_path, flush_every):
        path = self.write(tmp_path, range(10, 31), flush_every=flush_every)
        assert [os.path.basename(p) for p in parts(path)] == [
            *(f"dwm_log.{k}.jsonl" for k in range(1, 7)), FILE_NAME
        ]  # fmt: skip
        assert all(os.path.getsize(p) == 3 * self.SIZE for p in parts(path))
        assert [x["iteration"] for x in read_log(path)] == list(range(10, 31))

    def test_a_line_beyond_the_limit_has_a_file_of_its_own(self, tmp_path):
        sink = JsonlSink(str(tmp_path), part_bytes=self.SIZE)
        for iteration, more in ((1, {}), (2, {"weights": [1.0] * 1000}), (3, {})):
            sink.write(line_of(iteration, **more), iteration)
        sink.flush()
        assert [len(open(p).readlines()) for p in parts(sink.path)] == [1, 1, 1]
        assert [x["iteration"] for x in read_log(sink.path)] == [1, 2, 3]

    @pytest.mark.parametrize("kept", [0, 1, 2])
    def test_the_oldest_parts_are_removed(self, tmp_path, kept):
        path = self.write(tmp_path, range(10, 31), kept=kept)
        assert len(parts(path)) == kept + 1
        left = [x["iteration"] for x in read_log(path)]
        assert left == list(range(31 - 3 * (kept + 1), 31))

    def test_the_defaults(self, tmp_path):
        sink = JsonlSink(str(tmp_path))
        assert sink.part_bytes == 256 * 2**20 and sink.parts_kept == module.PARTS_KEPT > 0

    def test_numbers_go_on_when_a_run_is_resumed(self, tmp_path):
        """Back into an older part, too: its lines are taken again, and the order holds."""
        self.write(tmp_path, range(10, 20))
        for first in (18, 13, 10):
            path = self.write(tmp_path, range(first + 1, 24), first=first)
            assert [x["iteration"] for x in read_log(path)] == list(range(10, 24))
            assert all(os.path.getsize(p) <= 3 * self.SIZE for p in parts(path))

    def test_a_kill_between_two_parts_loses_nothing(self, tmp_path, monkeypatch):
        sink = JsonlSink(str(tmp_path), part_bytes=3 * self.SIZE)
        rename = os.rename

        def killed(*args):
            rename(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                for iteration in range(10, 20):
                    sink.write(line_of(iteration), iteration)
        assert [x["iteration"] for x in read_log(sink.path)] == [10, 11, 12]
        path = self.write(tmp_path, range(13, 17), first=12)
        assert [x["iteration"] for x in read_log(path)] == list(range(10, 17))

    def test_a_folder_that_takes_no_more_stops_the_sink(self, tmp_path, monkeypatch):
        said = []
        group = Sinks(said.append)
        group.open("x", lambda: JsonlSink(str(tmp_path), part_bytes=3 * self.SIZE))

        def full(*args):
            raise FULL

        monkeypatch.setattr(os, "rename", full)
        for iteration in range(10, 20):
            group.write(line_of(iteration), iteration)
        group.close()
        assert len(said) == 1 and group.active == []
        assert [x["iteration"] for x in read_log(str(tmp_path / FILE_NAME))] == [10, 11, 12]


META = {
    "meta_loss": 2.5, "meta_gradient_norm": 5.0, "dwm_grad_norm": None, "dwm_updated": 1,
    "meta_seconds": 0.5, "score_correlation": 0.4, "score_correlation_mean": 0.3,
    "score_correlation_error": 0.1, "gate": 0.5, "teacher_correlation_mean": 0.2,
    "guard_temperature": 2.0, "guard_capped": 3, "weighting_time_share": 0.04,
    "dwm_time_share": 0.03, "overhead_budget": 0.05, "meta_put_off": 1,
    "fd_signal_to_noise": 7.0, "verify_correlation": 0.99, "bad_step": ["loss"],
    "bad_steps": {"loss": 2}, "notices": ["DWM: gate open", "DWM: more"],
    "weights": [1.0], "domains": [0], "influence": [0.1],
    "expert_load": {"books": {"imbalance": 1.5, "distance": 0.25}},
}  # fmt: skip


class TestFigures:
    def test_names_are_grouped(self):
        found = scalars_of(line_of(7, **META))
        groups = {name.split("/")[1] for name in found}
        groups_of_experts = {"expert_imbalance", "expert_distance"}
        figures = {"loss", "weights", "evidence", "learning", "time", "bad_steps"}
        assert groups == figures | groups_of_experts
        assert found["dwm/expert_distance/books"] == 0.25
        assert found["dwm/loss/lm"] == 10.0 and found["dwm/evidence/gate"] == 0.5
        assert found["dwm/evidence/fd_signal_to_noise"] == 7.0
        assert found["dwm/bad_steps/loss"] == 2
        assert "dwm/learning/grad_norm" not in found, "it is missing in this step"

    def test_the_layout_shows_figures_that_there_are(self):
        backend = Backend()
        TensorBoardSink(backend, 2)
        (charts,) = backend.layout.values()
        known = {f"dwm/{name}" for name in NAMES.values()}
        shown = [pattern for _, patterns in charts.values() for pattern in patterns]
        by_domain = {"dwm/domain_weight/.*", "dwm/expert_imbalance/.*"}
        assert set(shown) - known == by_domain and len(set(shown)) == len(shown)

    def test_no_two_figures_share_a_name(self):
        assert len(set(NAMES.values())) == len(NAMES)

    def test_those_of_ones_own_policy_are_shown_too(self):
        assert scalars_of(line_of(7, my_figure=1.5))["dwm/policy/my_figure"] == 1.5

    def test_tensorboard_and_wandb_get_the_same(self):
        """Figure by figure, notices included, where each line is written at once."""
        one, other = Backend(), Backend()
        sinks = TensorBoardSink(one, 2), WandbSink(other, 2)
        for iteration in (1, 2, 3, 4):
            line = line_of(iteration, **(META if iteration == 3 else {}))
            for sink in sinks:
                sink.write(line, iteration)
                sink.flush()
        rows = {step: dict(row) for step, row in other.rows}
        texts = {step: row.pop("dwm/notices") for step, row in rows.items() if "dwm/notices" in row}
        assert rows == one.scalars
        assert texts == one.texts == {3: "DWM: gate open\n\nDWM: more"}

    def test_wandb_never_goes_back(self):
        """Lines that waited are sent at the newest step, with the newest value of each figure."""
        backend = Backend()
        sink = WandbSink(backend, 4)
        for iteration in (1, 2, 3, 4):
            more = {"guard_capped": 9} if iteration == 2 else {}
            sink.write(line_of(iteration, notices=[f"n{iteration}"], **more), iteration)
        sink.flush()
        sink.flush()
        ((step, row),) = backend.rows
        assert step == 4 and row["dwm/loss/lm"] == 7.0
        assert row["dwm/weights/guard_capped"] == 9
        assert row["dwm/domain_weight/web"] == 1.5
        assert row["dwm/notices"] == "n1\n\nn2\n\nn3\n\nn4"


class TestDomains:
    def shown(self, backend, iteration):
        start = "dwm/domain_weight/"
        found = backend.scalars.get(iteration, {}).items()
        return {k.removeprefix(start): v for k, v in found if k.startswith(start)}

    def test_come_at_the_log_interval_as_means_since_the_last(self):
        """Over samples: (1.0 x 1 + 2.0 x 3) / 4."""
        backend = Backend()
        sink = TensorBoardSink(backend, 2)
        for iteration, weight, count in ((1, 1.0, 1), (2, 2.0, 3), (3, 0.5, 2), (4, 0.5, 1)):
            domains = {"domain_weight": {"web": weight}, "domain_samples": {"web": count}}
            sink.write(line_of(iteration, **domains), iteration)
        assert [self.shown(backend, k) for k in (1, 2, 3, 4)] == [
            {}, {"web": 1.75}, {}, {"web": 0.5}
        ]  # fmt: skip

    def test_only_those_with_most_samples_so_far(self):
        """Of 5000, 32; which they are is a matter of the whole run, not of one interval."""
        backend = Backend()
        sink = TensorBoardSink(backend, 1)
        names = [f"d{k}" for k in range(5000)]
        first = {name: 1 + k for k, name in enumerate(names)}
        for iteration, samples in ((1, first), (2, dict.fromkeys(names[:40], 50))):
            weights = dict.fromkeys(samples, 1.25)
            sink.write(line_of(iteration, domain_weight=weights, domain_samples=samples), iteration)
        assert set(self.shown(backend, 1)) == set(names[-module.DOMAINS_SHOWN :])
        # The forty have a hundred samples at most by now, the last ones thousands.
        assert self.shown(backend, 2) == {}
        assert module.DOMAINS_SHOWN == 32

    def test_a_console_line_has_a_bounded_number(self):
        backend = Backend()
        names = [f"d{k}" for k in range(1000)]
        samples = {name: k for k, name in enumerate(names)}
        line = line_of(1, domain_weight=dict.fromkeys(names, 1.0), domain_samples=samples)
        ConsoleSink(backend.print, 1).write(line, 1)
        (text,) = backend.printed
        assert "| d999: 1.000 |" in text and "| d968: 1.000 |" in text and "| d967:" not in text
        assert text.endswith("| and 968 more domains |")
