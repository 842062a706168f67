"""What the session does for the step log: nothing is left waiting where a run may be continued."""

from types import SimpleNamespace

import pytest

from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.hosts.megatron_lm import attach, session  # noqa: E402
from megatron_dwm.hosts.megatron_lm.session import Session, _may_be_last  # noqa: E402


class Log:
    def __init__(self):
        self.calls = []

    def write(self, record, extra):
        self.calls.append("write")

    def flush(self):
        self.calls.append("flush")

    def close(self, wait=True):
        self.calls.append(("close", wait))


@pytest.fixture
def run(monkeypatch):
    found = SimpleNamespace(
        ckpt_format="torch_dist", train_iters=100, save_interval=10, exit_interval=None, save="x",
        curr_iteration=0,
    )  # fmt: skip
    monkeypatch.setattr(session, "get_args", lambda: found)
    return found


def started():
    found = Session()
    found.log = Log()
    return found


class TestSaving:
    @pytest.mark.parametrize("form", ["torch_dist", "torch"])
    def test_the_log_is_written_before_anything_is_saved(self, run, form):
        run.ckpt_format = form
        found = started()
        calls = found.log.calls

        def stock(*args, **kwargs):
            calls.append("state")
            return {}

        # Without a step there is nothing of the DWM to add.
        found.generate_state_dict(stock, iteration=7)
        assert sorted(calls) == ["flush", "state"]

    def test_loading_writes_nothing(self, run):
        found = started()
        found.generate_state_dict(lambda *a, **k: {}, optim_sd_kwargs={"is_loading": True})
        assert found.log.calls == []


class TestLastSteps:
    def test_those_after_which_the_trainer_may_stop_or_save(self, run):
        run.exit_interval, run.train_iters = 7, 23
        assert [k for k in range(1, 24) if _may_be_last(k)] == [7, 10, 14, 20, 21, 23]

    def test_without_intervals_the_last_one(self, run):
        run.save_interval = None
        assert [k for k in range(1, 101) if _may_be_last(k)] == [100]

    def test_the_step_flushes_there(self, run, monkeypatch):
        """After the line has been handed over."""
        found = started()
        record = SimpleNamespace(iteration=0, plan=SimpleNamespace(ends_stage=False))

        def step(stock_step, trainee, done):
            record.iteration = done + 1
            return (), record

        found.step = step
        step.forward_step = SimpleNamespace(forward_step=None)
        step.bad_steps = SimpleNamespace(problem=lambda iteration: None)
        found.verifier = lambda stock_step, trainee, scheduler, done: (trainee, None)
        found.stages = SimpleNamespace(take=lambda done: None, keep=lambda plan, folder: None)
        for iteration in range(8, 11):
            found.train_step(None, None, None, [], None, None, None, None, iteration=iteration)
        assert found.log.calls == ["write", "write", "flush", "write"]


class TestEnd:
    @pytest.mark.parametrize("failure", [None, SystemExit])
    def test_a_normal_end_writes_what_waits(self, monkeypatch, failure):
        monkeypatch.setattr(cpu, "is_idle", lambda: pytest.fail("no reason to ask"))
        found = started()
        log = found.log
        found.end_log(failure)
        assert log.calls == [("close", True)] and found.log is None
        found.end_log()  # a second time there is nothing to end

    @pytest.mark.parametrize("idle", [True, False])
    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
    def test_a_failure_waits_for_no_device(self, monkeypatch, failure, idle):
        monkeypatch.setattr(cpu, "is_idle", lambda: idle)
        found = started()
        log = found.log
        found.end_log(failure)
        assert log.calls == [("close", idle)]

    def test_another_run_ends_the_log_of_the_one_before(self, run, monkeypatch):
        monkeypatch.setattr(session.DWMConfig, "from_args", lambda args: session.DWMConfig())
        found = started()
        log = found.log
        assert found.setup_model_and_optimizer(lambda *a: "model") == "model"
        assert log.calls == [("close", True)]

    @pytest.mark.parametrize("error", [None, SystemExit(0), ValueError("x")])
    def test_leaving_attach_ends_the_log(self, monkeypatch, error):
        """Whether `pretrain` returns, exits or fails; the failure is passed on."""
        seen = []

        class Watched(Session):
            def end_log(self, failure=None, *rest):
                seen.append(failure)

        monkeypatch.setattr(session, "Session", Watched)
        try:
            with attach.attach():
                if error is not None:
                    raise error
        except (SystemExit, ValueError) as caught:
            assert caught is error
        assert seen == [type(error) if error is not None else None]
