"""The step log: its lines, when they are written, and what a resumed run keeps of them."""

import json
import math

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.logs.console import console_line  # noqa: E402
from megatron_dwm.logs.lines import describe  # noqa: E402
from megatron_dwm.logs.log_file import FILE_NAME, read_log  # noqa: E402
from megatron_dwm.logs.sinks import open_sinks  # noqa: E402
from megatron_dwm.logs.weight_log import MOST_WAITING, WeightLog  # noqa: E402
from megatron_dwm.policies.maps import Mapped  # noqa: E402
from megatron_dwm.step.budget import Overhead  # noqa: E402
from megatron_dwm.step.plan import StepPlan  # noqa: E402
from megatron_dwm.step.record import MetaResult, StepRecord  # noqa: E402

WEIGHTS = torch.tensor([2.0, 0.5, 1.0, 0.5])
DOMAINS = torch.tensor([0, 1, 0, -1])
NAMES = ["web", "code"]
NAN = float("nan")


def record(
    iteration=7, meta=True, weights=WEIGHTS, domains=DOMAINS, lm_loss=3.25, overhead=None, **changes
):
    plan = StepPlan(stage=1, window="meta", weighted=True, meta_step=meta, ends_stage=False)
    result = None
    if meta:
        values = {
            "loss": 2.5, "influence": torch.tensor([3.0, 0.0, -4.0, 0.0]), "grad_norm": 0.125,
            "updated": True, "seconds": 0.5,
        }  # fmt: skip
        result = MetaResult(**{**values, **changes})
    return StepRecord(iteration, plan, weights, domains, result, lm_loss, overhead)


class Writer:
    def __init__(self):
        self.scalars, self.texts = {}, {}

    def add_custom_scalars(self, layout):
        pass

    def add_scalar(self, name, value, iteration):
        self.scalars[name, iteration] = value

    def add_text(self, name, text, iteration):
        self.texts[name, iteration] = text

    def flush(self):
        pass


class Log:
    """A `WeightLog` in a folder, with what it printed and what it wrote."""

    def __init__(self, folder, first_iteration=0, log_interval=1, samples=False, writes=True):
        self.printed, self.writer = [], Writer()
        path = None if folder is None else str(folder)
        sinks = None
        if writes:
            sinks = open_sinks(
                path, first_iteration, self.writer, None, log_interval, self.printed.append
            )
        self.log = WeightLog(sinks, NAMES, log_interval, samples)
        self.path = None if folder is None else folder / FILE_NAME

    def write(self, *iterations, meta=True):
        for iteration in iterations:
            self.log.write(record(iteration, meta=meta))
        return self

    def iterations(self):
        return [line["iteration"] for line in read_log(self.path)]


class TestDescribe:
    def test_says_what_the_step_did(self):
        line = describe(record(), NAMES)
        assert line["iteration"] == 7
        # Stages are counted from 1 wherever a person reads them, as in the snapshots' names.
        assert line["stage"] == 2 and line["window"] == "meta"
        assert line["lm_loss"] == 3.25 and line["meta_loss"] == 2.5
        assert line["meta_gradient_norm"] == pytest.approx(5.0)
        assert line["dwm_grad_norm"] == 0.125 and line["dwm_updated"] == 1
        assert line["max_weight"] == 2.0 and line["min_weight"] == 0.5
        # (sum w)^2 / sum w^2 / N = 16 / 5.5 / 4
        assert line["effective_sample_size"] == pytest.approx(16 / 5.5 / 4, abs=1e-6)

    def test_domain_weights_are_means_over_the_samples_of_each_data_set(self):
        """A sample of unknown origin (-1) counts for none."""
        line = describe(record(), NAMES)
        assert line["domain_weight"] == {"web": 1.5, "code": 0.5}
        assert line["domain_samples"] == {"web": 2, "code": 1}

    def test_a_data_set_beyond_the_names_is_called_by_its_number(self):
        line = describe(record(domains=torch.tensor([5, 5, 0, 0])), NAMES)
        assert set(line["domain_weight"]) == {"web", "5"}

    @pytest.mark.parametrize("domains", [None, torch.full((4,), -1)])
    def test_without_known_data_sets_the_table_is_empty(self, domains):
        line = describe(record(domains=domains), NAMES)
        assert line["domain_weight"] == {} == line["domain_samples"]

    def test_a_step_without_a_meta_step_has_no_meta_values(self):
        line = describe(record(meta=False), NAMES)
        assert not [name for name in line if "meta" in name or name.startswith("dwm")]

    def test_samples_are_written_only_when_asked_for(self):
        assert not {"weights", "domains", "influence"} & set(describe(record(), NAMES))
        line = describe(record(), NAMES, samples=True)
        assert line["weights"] == WEIGHTS.tolist() and line["domains"] == [0, 1, 0, -1]
        assert line["influence"] == [3.0, 0.0, -4.0, 0.0]

    @pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
    def test_values_that_are_not_finite_become_null(self, bad):
        """JSON knows neither NaN nor infinity; strict readers refuse the whole line."""
        broken = record(lm_loss=bad, loss=bad, grad_norm=bad, influence=torch.full((4,), bad))
        line = describe(broken, NAMES)
        text = json.dumps(line, allow_nan=False)
        names = ("lm_loss", "meta_loss", "dwm_grad_norm", "meta_gradient_norm")
        assert [json.loads(text)[name] for name in names] == [None] * 4

    def test_a_step_without_a_reported_loss_has_null(self):
        assert describe(record(lm_loss=None), NAMES)["lm_loss"] is None

    def test_bfloat16_weights_can_be_described(self):
        assert describe(record(weights=WEIGHTS.bfloat16()), NAMES)["max_weight"] == 2.0


class TestConsoleLine:
    def test_a_meta_step(self):
        text = console_line(describe(record(), NAMES))
        assert "dwm iteration        7" in text and "stage 2 meta" in text
        assert "meta loss: 2.500000E+00" in text and "meta-gradient norm: 5.000E+00" in text
        assert "max weight: 2.000" in text
        assert "web: 1.500" in text and "code: 0.500" in text
        assert "\n" not in text

    def test_a_step_without_a_meta_step(self):
        text = console_line(describe(record(meta=False), NAMES))
        assert "meta loss" not in text and "effective sample size: 0.727" in text


class TestQuality:
    """What the estimator says of itself."""

    GOOD = {"fd_relative_step": 1e-3, "fd_signal_to_noise": 7.5, "fd_linearity_error": 0.05}

    def test_goes_into_the_line_and_to_tensorboard(self):
        assert self.GOOD.items() <= describe(record(quality=self.GOOD), NAMES).items()
        log = Log(None)
        log.log.write(record(quality=self.GOOD))
        assert log.writer.scalars["dwm/evidence/fd_signal_to_noise", 7] == 7.5

    def test_an_estimator_without_any_adds_nothing(self):
        assert not [name for name in describe(record(), NAMES) if name.startswith("fd_")]

    def test_infinite_becomes_null(self):
        line = describe(record(quality={"fd_signal_to_noise": math.inf}), NAMES)
        assert line["fd_signal_to_noise"] is None

    @pytest.mark.parametrize("error", [0.75, math.inf, NAN])
    def test_a_failed_check_is_said_whatever_the_log_interval(self, error):
        log = Log(None, log_interval=100)
        log.log.write(record(quality={**self.GOOD, "fd_linearity_error": error}))
        (text,) = log.printed
        assert "WARNING" in text and "\n" not in text
        assert "--dwm-fd-relative-step" in text and "--dwm-estimator ghost" in text

    def test_a_passed_check_and_a_step_without_one_are_not(self):
        log = Log(None, log_interval=100)
        log.log.write(record(quality=self.GOOD))
        log.log.write(record(quality={"fd_relative_step": 1e-3, "fd_signal_to_noise": 7.5}))
        log.log.write(record(meta=False))
        log.log.write(record())
        assert log.printed == []


class TestOverheadBudget:
    FIGURES = ("dwm_time_share", "overhead_budget", "meta_put_off")
    SPENT = Overhead(time_share=0.04321, budget=0.05, put_off=False)
    PUT_OFF = Overhead(time_share=0.04321, budget=0.05, put_off=True, notice="DWM: a word")

    def test_a_run_without_one_does_not_mention_it(self):
        line = describe(record(), NAMES)
        assert not set(self.FIGURES) & set(line)
        assert "DWM time" not in console_line(line) and "put off" not in console_line(line)

    def test_share_against_budget(self):
        line = describe(record(overhead=self.SPENT), NAMES)
        assert (line["dwm_time_share"], line["overhead_budget"]) == (0.04321, 0.05)
        assert "meta_put_off" not in line
        assert "| DWM time: 4.32% of 5.00% |" in console_line(line)

    def test_a_meta_step_that_was_put_off(self):
        line = describe(record(meta=False, overhead=self.PUT_OFF), NAMES)
        assert line["meta_put_off"] == 1 and "| meta step put off |" in console_line(line)

    def test_tensorboard_gets_all_three(self):
        log = Log(None)
        log.log.write(record(meta=False, overhead=self.PUT_OFF))
        names = ("budget_spent", "budget", "meta_put_off")
        found = [log.writer.scalars[f"dwm/time/{name}", 7] for name in names]
        assert found == [0.04321, 0.05, 1]

    def test_a_notice_is_printed_whatever_the_log_interval(self):
        log = Log(None, log_interval=100)
        log.log.write(record(overhead=self.PUT_OFF))
        log.log.write(record(overhead=self.SPENT))
        assert log.printed == ["DWM: a word"]


class TestWriting:
    def test_one_strict_json_line_a_step_at_once(self, tmp_path):
        """Readable while the run goes on: lines are not held back in a buffer."""
        log = Log(tmp_path).write(1, 2, 3)
        lines = log.path.read_text().splitlines()
        parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        assert [line["iteration"] for line in parsed] == [1, 2, 3]

    def test_console_lines_come_every_interval(self):
        log = Log(None, log_interval=3).write(*range(1, 8))
        assert [int(line.split()[2]) for line in log.printed] == [3, 6]

    def test_tensorboard_gets_numbers_and_domain_weights(self):
        scalars = Log(None).write(7).writer.scalars
        assert scalars["dwm/loss/lm", 7] == 3.25 and scalars["dwm/domain_weight/web", 7] == 1.5
        assert {type(value) for value in scalars.values()} <= {int, float}
        assert not [name for name, _ in scalars if "iteration" in name or "stage" in name]

    def test_tensorboard_gets_no_missing_values(self):
        log = Log(None, log_interval=10)
        log.log.write(record(lm_loss=NAN, loss=NAN))
        assert not [name for name, _ in log.writer.scalars if "loss" in name]

    def test_other_ranks_write_nothing_and_make_no_file(self, tmp_path):
        log = Log(tmp_path / "run", writes=False).write(1)
        assert not (tmp_path / "run").exists()
        assert log.printed == [] and log.writer.scalars == {}

    def test_a_rank_without_weights_writes_nothing(self, tmp_path):
        log = Log(tmp_path)
        log.log.write(record(weights=None))
        assert log.path.read_text() == "" and log.printed == []

    def test_the_folder_is_made(self, tmp_path):
        assert Log(tmp_path / "a" / "b").write(1).iterations() == [1]


class TestWaiting:
    """A plain step is not read, as that would wait for the device, until something else waits."""

    def unreadable(self, iteration):
        """A plain step on torch's device without data: whatever reads a value of it is an error."""
        nowhere = {"device": "meta"}
        found = record(
            iteration, meta=False, weights=torch.empty(4, **nowhere),
            domains=torch.empty(4, dtype=torch.long, **nowhere), lm_loss=torch.empty((), **nowhere),
        )  # fmt: skip
        found.figures = {"mine": torch.empty((), **nowhere)}
        found.batch = Mapped(*(torch.empty((), **nowhere) for _ in range(4)))
        return found

    def test_plain_steps_are_not_read(self, tmp_path):
        log = Log(tmp_path, log_interval=100)
        for iteration in range(1, MOST_WAITING):
            log.log.write(self.unreadable(iteration))
        assert len(log.log.waiting) == MOST_WAITING - 1 and log.iterations() == []

    def test_reading_them_is_what_the_test_above_forbids(self, tmp_path):
        """The control: the same steps cannot be flushed."""
        log = Log(tmp_path, log_interval=100)
        log.log.write(self.unreadable(1))
        # What torch says of reading a tensor without storage, by operation.
        with pytest.raises((RuntimeError, NotImplementedError)):
            log.log.flush()

    def test_a_meta_step_writes_what_waits_and_itself(self, tmp_path):
        log = Log(tmp_path, log_interval=100).write(1, 2, 3, meta=False)
        assert log.iterations() == []
        assert log.write(4, meta=True).iterations() == [1, 2, 3, 4]

    def test_so_does_the_log_interval(self, tmp_path):
        log = Log(tmp_path, log_interval=3).write(1, 2, meta=False)
        assert log.iterations() == [] and log.printed == []
        assert log.write(3, 4, meta=False).iterations() == [1, 2, 3]
        assert [int(line.split()[2]) for line in log.printed] == [3]

    def test_and_a_limit_to_how_many_wait(self, tmp_path):
        log = Log(tmp_path, log_interval=10**6).write(*range(1, MOST_WAITING), meta=False)
        assert log.iterations() == []
        log.write(MOST_WAITING, meta=False)
        assert log.iterations() == list(range(1, MOST_WAITING + 1)) and MOST_WAITING == 64

    @pytest.mark.parametrize("kind", ["causes", "notices", "overhead"])
    def test_and_what_is_to_be_said_at_once(self, tmp_path, kind):
        log = Log(tmp_path, log_interval=100).write(1, meta=False)
        found = record(2, meta=False)
        if kind == "causes":
            found.causes, found.bad_steps = ["loss"], {"loss": 1}
        elif kind == "notices":
            found.notices = ["DWM: a word"]
        else:
            found.overhead = TestOverheadBudget.PUT_OFF
        log.log.write(found)
        assert log.iterations() == [1, 2] and len(log.printed) == 1

    def test_no_line_is_lost_at_a_normal_end(self, tmp_path):
        log = Log(tmp_path, log_interval=100).write(*range(1, 78), meta=False)
        log.log.close()
        assert log.iterations() == list(range(1, 78))
        assert ("dwm/loss/lm", 77) in log.writer.scalars

    def test_after_a_failure_nothing_is_read(self, tmp_path):
        """The device may never be done; the file ends with a whole line."""
        log = Log(tmp_path, log_interval=100).write(1, meta=True)
        log.log.write(self.unreadable(2))
        log.log.close(wait=False)
        assert log.iterations() == [1]

    def test_after_a_kill_and_a_resume_every_iteration_is_there_once(self, tmp_path):
        """Saved at 10, 20, ...; killed at any step, with or without lines beyond the checkpoint."""
        for killed in range(11, 34):
            folder = tmp_path / str(killed)
            log = Log(folder, log_interval=7)
            for iteration in range(1, killed + 1):
                log.write(iteration, meta=iteration % 5 == 0 and iteration < 20)
                if iteration % 10 == 0:
                    log.log.flush()  # as the session does before it saves
            saved = killed // 10 * 10
            resumed = Log(folder, first_iteration=saved, log_interval=7)
            assert resumed.iterations() == list(range(1, saved + 1))
            resumed.write(*range(saved + 1, 41), meta=False).log.close()
            assert resumed.iterations() == list(range(1, 41))

    def test_a_figure_that_changes_in_place_is_logged_as_it_was(self, tmp_path):
        log = Log(tmp_path, log_interval=100)
        running = torch.zeros(())
        for iteration in (1, 2, 3):
            running += 1
            found = record(iteration, meta=False)
            found.figures = {"mine": running}
            log.log.write(found)
        log.log.close()
        assert [line["mine"] for line in read_log(log.path)] == [1, 2, 3]

    def test_the_record_of_the_caller_stays_as_it_is(self, tmp_path):
        running = torch.zeros(())
        found = record(1)
        found.figures = {"mine": running}
        Log(tmp_path).log.write(found)
        assert found.figures["mine"] is running


class TestUniformRun:
    def record(self, iteration, window="uniform"):
        found = record(iteration, meta=False, weights=torch.ones(4))
        found.plan = StepPlan(0, window, window == "weighted", False, False)
        return found

    @pytest.mark.parametrize("window", ["uniform", "weighted"])
    def test_names_no_stage_as_there_is_none(self, window):
        line = describe(self.record(7, window), NAMES)
        assert line["window"] == window and "stage" not in line
        text = console_line(line)
        assert text.startswith(f" dwm iteration        7 | {window} | entropy: 1.0000 |")
        assert "stage" not in text

    def test_has_its_domains(self):
        line = describe(self.record(7), NAMES)
        assert line["domain_weight"] == {"web": 1.0, "code": 1.0}
        assert line["domain_samples"] == {"web": 2, "code": 1}

    def test_a_warm_up_keeps_its_name(self):
        assert describe(self.record(7, "warmup"), NAMES)["window"] == "warmup"


class TestEvidence:
    FIGURES = {
        "score_correlation": 0.41, "score_correlation_mean": 0.3, "score_correlation_error": 0.05,
        "gate": 0.75,
    }  # fmt: skip

    def logged(self, folder, notices=()):
        log = Log(folder)
        found = record()
        found.figures, found.notices = dict(self.FIGURES), list(notices)
        found.time_share = 0.0412345678
        log.log.write(found)
        return log, read_log(log.path)[0]

    def test_correlation_and_gate_are_in_line_console_and_tensorboard(self, tmp_path):
        log, line = self.logged(tmp_path)
        assert self.FIGURES.items() <= line.items()
        assert "| score correlation: 0.300 | gate: 0.75 |" in log.printed[0]
        shown = {name.rpartition("/")[2]: x for (name, _), x in log.writer.scalars.items()}
        assert self.FIGURES.items() <= shown.items()

    def test_what_the_gate_says_is_in_all_of_them(self, tmp_path):
        words = "DWM: gate open: because"
        log, line = self.logged(tmp_path, [words])
        assert line["notices"] == [words] == log.printed[1:]
        assert log.writer.texts == {("dwm/notices", 7): words}

    def test_a_step_with_nothing_to_say_has_no_notices(self, tmp_path):
        log, line = self.logged(tmp_path)
        assert "notices" not in line and log.writer.texts == {}

    def test_the_share_of_the_time(self, tmp_path):
        log, line = self.logged(tmp_path)
        assert line["weighting_time_share"] == 0.041235
        assert log.writer.scalars["dwm/time/weighting_share", 7] == 0.041235
        assert "weighting_time_share" not in describe(record(), NAMES)

    def test_figures_and_words_that_are_not_finite_leave_strict_json(self, tmp_path):
        log = Log(tmp_path)
        found = record(weights=torch.tensor([NAN, 1.0, 1.0, 1.0]))
        found.figures = {"score_correlation": NAN, "gate": torch.tensor(math.inf)}
        log.log.write(found)
        (line,) = [json.loads(x, parse_constant=pytest.fail) for x in open(log.path)]
        assert line["score_correlation"] is None and line["gate"] is None
        assert line["max_weight"] is None and line["domain_weight"] == {"web": None, "code": 1.0}
        assert "max weight: nan" in log.printed[0]


class TestManyDomains:
    def test_aggregation_does_the_same_work_for_any_number_of_them(self):
        """The same operations of torch for 2 domains and for 3000."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Counter(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.count += 1
                return func(*args, **(kwargs or {}))

        counts = []
        for number in (2, 3000):
            ids = torch.arange(4096) % number
            found = record(meta=False, weights=torch.ones(4096), domains=ids)
            with Counter() as counter:
                line = describe(found, [f"d{k}" for k in range(5000)])
            assert len(line["domain_weight"]) == number
            counts.append(counter.count)
        assert counts[0] == counts[1]

    def test_means_and_counts_are_those_of_a_loop(self):
        generator = torch.Generator().manual_seed(5)
        weights = torch.rand(4096, generator=generator) * 3
        ids = torch.randint(-1, 3000, (4096,), generator=generator)
        names = [f"d{k}" for k in range(2500)]  # the others are called by their numbers
        line = describe(record(weights=weights, domains=ids), names)
        expected = {}
        for weight, i in zip(weights.tolist(), ids.tolist(), strict=True):
            if i >= 0:
                expected.setdefault(f"d{i}" if i < 2500 else str(i), []).append(weight)
        assert line["domain_samples"] == {k: len(v) for k, v in expected.items()}
        means = {k: sum(v) / len(v) for k, v in expected.items()}
        assert line["domain_weight"] == pytest.approx(means, abs=1e-6)


class TestResume:
    def test_steps_that_are_taken_again_replace_the_old_lines(self, tmp_path):
        Log(tmp_path).write(1, 2, 3, 4, 5)
        log = Log(tmp_path, first_iteration=3)
        assert log.iterations() == [1, 2, 3]
        assert log.write(4, 5, 6).iterations() == [1, 2, 3, 4, 5, 6]

    def test_a_run_from_the_start_begins_a_new_log(self, tmp_path):
        Log(tmp_path).write(1, 2)
        assert Log(tmp_path).write(1).iterations() == [1]

    def test_lines_that_are_kept_are_unchanged(self, tmp_path):
        before = Log(tmp_path).write(1, 2).path.read_text()
        assert Log(tmp_path, first_iteration=2).path.read_text() == before

    def test_a_torn_last_line_is_left_out(self, tmp_path):
        """A killed run may leave half a line, without its line end."""
        log = Log(tmp_path).write(1, 2, 3)
        text = log.path.read_text()
        for cut in (1, 5, 60):
            log.path.write_text(text[: -1 - cut])
            assert log.iterations() == [1, 2]
            assert Log(tmp_path, first_iteration=3).write(4).iterations() == [1, 2, 4]
            log.path.write_text(text)

    def test_resuming_without_an_old_log_is_fine(self, tmp_path):
        """`--load` may name another folder than `--save`."""
        assert Log(tmp_path, first_iteration=100).write(101).iterations() == [101]


class TestGuardsAndBadSteps:
    @staticmethod
    def guarded(iteration=7, raised=2.5, capped=3.0, causes=(), counts=None, **kw):
        found = record(iteration, **kw)
        bad = torch.tensor(False)
        found.batch = Mapped(WEIGHTS, bad, torch.tensor(raised), torch.tensor(capped))
        found.causes, found.bad_steps = list(causes), counts or {}
        return found

    def test_fields_are_there_only_when_a_guard_acted(self):
        line = describe(self.guarded(), NAMES)
        assert line["guard_temperature"] == 2.5 and line["guard_capped"] == 3
        line = describe(self.guarded(raised=NAN, capped=0.0), NAMES)
        assert not [name for name in line if "guard" in name or "bad" in name]

    def test_bad_scores_say_nothing_of_guards(self):
        bad = self.guarded(raised=NAN, causes=["scores"], counts={"scores": 1})
        line = describe(bad, NAMES)
        assert line["bad_step"] == ["scores"] and line["bad_steps"] == {"scores": 1}
        assert not [name for name in line if "guard" in name]
        assert "bad steps: scores 1" in console_line(line)

    def test_console_line_has_them(self):
        text = console_line(describe(self.guarded(), NAMES))
        assert "temperature raised to: 2.5" in text and "weights capped: 3" in text

    def test_a_guard_is_announced_at_first_and_then_rarely_with_its_count(self, tmp_path):
        log = Log(tmp_path, log_interval=1000)
        for iteration in range(1, 121):
            log.log.write(self.guarded(iteration, raised=2.5 if iteration > 5 else NAN))
        floor = [line for line in log.printed if "--dwm-min-effective-samples" in line]
        assert [line.split(";")[1] for line in floor] == [
            " once so far", " 10 times so far", " 100 times so far"
        ]  # fmt: skip
        assert floor[0].startswith("DWM: iteration 6: ")
        cap = [line for line in log.printed if "--dwm-max-weight" in line]
        assert [int(line.split()[2][:-1]) for line in cap] == [1, 10, 100]

    def test_a_bad_step_is_announced_by_cause(self, tmp_path):
        log = Log(tmp_path, log_interval=1000)
        for n in range(1, 12):
            counts = {"scores": n} if n < 11 else {"scores": n, "gradient": 1}
            log.log.write(self.guarded(n, causes=list(counts)[-1:], counts=counts))
        bad = [line for line in log.printed if "NaN or infinite" in line]
        assert [int(line.split()[2][:-1]) for line in bad] == [1, 10, 11]
        assert "and the samples weighed 1" in bad[0] and "weighed 1" not in bad[2]
        assert bad[2].endswith("(bad steps so far: scores 11, gradient 1)")
