"""NaN and Inf in real runs on two ranks: skipped, counted, ended, the same on both ranks.

Each value is poisoned for real, on one of the two ranks only, and the other rank must take the same
decision. The control of every case is the run that is not poisoned, or not beyond a step.

Not exercised here: GPUs; pipeline stages (`test_learning.py` poisons the meta loss there).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.logs.log_file import FILE_NAME, read_log
from tests.functional.harness import (
    DWM,
    MOCK,
    ROOT,
    TINY,
    Results,
    host_flags,
    torchrun,
)

LAYOUTS = {"tp2": "--tensor-model-parallel-size 2", "dp2": "--use-distributed-optimizer"}
# By step; all others are good. Step 7 is a frozen one, without a meta step.
BAD = {
    2: ("scores", 1, ["scores"]),
    3: ("influence", 1, ["meta_gradient"]),
    4: ("gradient", 0, ["gradient"]),
    5: ("parameter", 1, ["scores", "parameters"]),
    7: ("scores", 0, ["scores"]),
}
FROZEN = 7
STEPS = 8


def poison(*plans: tuple[str, int, list[int]]) -> dict[str, str]:
    """Returns the environment that poisons (what, rank, steps)."""
    names = ("what", "rank", "steps")
    return {"POISON": json.dumps([dict(zip(names, plan, strict=True)) for plan in plans])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_steps")


def small(steps: int, *more: str) -> list[str]:
    """Returns the flags of a run on two layers."""
    size = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --global-batch-size 8".split()
    rest = (
        f"--train-iters {steps} --eval-iters 0 --ckpt-format torch_dist --save-interval 3".split()
    )
    return [*host_flags(), *TINY, *MOCK, *size, *rest, *more]


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    runs: list[dict] = []

    def add(name: str, args: list[str], env: dict[str, str] | None = None) -> None:
        runs.append({"name": name, "args": args, "env": env or {}})

    dwm = [*DWM, "--dwm-num-layers", "1", "--dwm-hidden-size", "32"]
    windows = "--dwm-schedule staged --dwm-stages 1 --dwm-stage-meta-steps 6".split()
    for layout, flags in LAYOUTS.items():
        common = [*small(STEPS, *flags.split()), *dwm]
        save = ["--save", str(folder / layout)]
        each = poison(*((what, rank, [step]) for step, (what, rank, _) in BAD.items()))
        add(f"{layout}-control", [*common, *windows])
        add(f"{layout}-each", [*common, *windows, "--save", str(folder / f"{layout}-each")], each)
        # Broken from step 2 on: stopped after step 3, two bad steps, and resumed.
        limit = ["--dwm-max-bad-steps", "4"]
        first = [*common, *save, *limit, "--exit-interval", "3"]
        add(f"{layout}-first", first, poison(("broken", 1, [2])))
        # A rank's own copy is broken, which is not the one that is saved, so again at step 4.
        resumed = [*common, *save, *limit, "--load", save[1]]
        add(f"{layout}-resumed", resumed, poison(("broken", 1, [4])))
        frozen = ["--dwm-meta-interval", "100", "--dwm-max-bad-steps", "3"]
        add(f"{layout}-frozen", [*common, *frozen], poison(("scores", 1, [2, 3, 5, 6, 7])))
    common = [*small(4, *LAYOUTS["dp2"].split()), *dwm]
    old = [*common, "--save", str(folder / "old"), "--exit-interval", "3"]
    add("old", old, {**poison(("scores", 0, [2])), "OLD": "1"})
    add("old-resumed", [*common, "--load", str(folder / "old")], poison(("scores", 0, [4])))
    unchecked = ["--no-check-for-nan-in-loss-and-grad"]
    bad_loss = poison(("loss", 1, [3, 4]))
    uniform = [*small(4, *LAYOUTS["dp2"].split()), "--dwm", "--dwm-policy", "uniform"]
    for name, words in (("checked", common), ("checked-uniform", uniform)):
        add(name, [*words, "--save", str(folder / name)], bad_loss)
    add("unchecked", [*common, *unchecked], bad_loss)
    guards = "--dwm-min-effective-samples 0.9 --dwm-uniform-mix 0.3 --dwm-max-weight 1.2".split()
    fast = "--dwm-head-lr 0.3".split()
    for policy in ("learned", "shuffled"):
        words = [*common, *fast, "--dwm-policy", policy, "--save", str(folder / policy)]
        add(policy, [*words, *guards, "--dwm-log-samples"])
    add("unguarded", [*common, *fast])
    (folder / "runs.json").write_text(json.dumps(runs))
    script = str(ROOT / "tests" / "functional" / "run_bad_steps.py")
    done = torchrun(2, [script], 600, RUNS=str(folder / "runs.json"), OUT=str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return Results(folder, 2)


def steps_of(results: Results, name: str) -> tuple[list[dict], list[dict]]:
    """Returns what each rank wrote down, after checking that both decided alike."""
    ranks = [rank["seen"] for rank in results[name]]
    for a, b in zip(*ranks, strict=True):
        assert all(a[key] == b[key] for key in ("iteration", "causes", "bad_steps", "updated"))
        assert a["weights"] == b["weights"]
    return ranks[0], ranks[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_control_has_no_bad_step(results: Results, layout: str) -> None:
    """Unpoisoned, the DWM changes at every meta step and at no other."""
    results.succeeded(f"{layout}-control")
    for rank in steps_of(results, f"{layout}-control"):
        before = None
        for step in rank:
            assert step["causes"] == [] and step["bad_steps"] == {}
            assert step["updated"] == (step["iteration"] < FROZEN)
            assert (step["dwm"] != before) == step["updated"]
            before = step["dwm"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_cause_skips_the_update_and_is_counted(results: Results, layout: str) -> None:
    """A bad step leaves the DWM and its moments bit for bit; weights are 1 where scores are bad."""
    results.succeeded(f"{layout}-each")
    for rank, control in zip(
        steps_of(results, f"{layout}-each"), steps_of(results, f"{layout}-control"), strict=True
    ):
        assert rank[0] == control[0]
        counts: dict[str, int] = {}
        for before, step in zip(rank, rank[1:], strict=False):
            causes = BAD.get(step["iteration"], (None, None, []))[2]
            assert step["causes"] == causes
            for cause in causes:
                counts[cause] = counts.get(cause, 0) + 1
            assert step["bad_steps"] == counts
            assert step["updated"] == (not causes and step["iteration"] < FROZEN)
            for key in ("dwm", "moments"):
                assert (step[key] == before[key]) == (not step["updated"])
            assert step["finite"]
            assert (set(step["weights"]) == {1.0}) == ("scores" in causes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_and_checkpoint_have_the_counts(results: Results, folder: Path, layout: str) -> None:
    """By cause, in every line from the first bad step on; and in the saved state."""
    from megatron.core import dist_checkpointing

    results.succeeded(f"{layout}-each")
    log = read_log(folder / f"{layout}-each" / FILE_NAME)
    assert [line.get("bad_step", []) for line in log] == [
        BAD.get(k, (None, None, []))[2] for k in range(1, STEPS + 1)
    ]
    total = {"scores": 3, "meta_gradient": 1, "gradient": 1, "parameters": 1}
    assert "bad_steps" not in log[0] and log[-1]["bad_steps"] == total
    saved = folder / f"{layout}-each" / f"iter_{STEPS:07d}"
    state = dist_checkpointing.load_common_state_dict(str(saved))["dwm"]["bad_steps"]
    assert {k: n for k, n in state["counts"].items() if n} == total and state["steps"] == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_ends_after_too_many_in_a_row(results: Results, layout: str) -> None:
    """A resumed run counts on: two bad steps before the stop, two after it, and both ranks end."""
    first = steps_of(results, f"{layout}-first")[0]
    assert [s["causes"] for s in first] == [[]] + [["scores", "parameters"]] * 2
    results.succeeded(f"{layout}-first")
    resumed = steps_of(results, f"{layout}-resumed")[0]
    assert [s["iteration"] for s in resumed] == [4, 5]
    assert resumed[-1]["bad_steps"] == {"scores": 4, "parameters": 4}
    found = results[f"{layout}-resumed"]
    assert [rank["code"] for rank in found] == [2, 2]
    (line,) = found[0]["stderr"].strip().splitlines()[-1:]
    assert line.startswith("megatron_dwm: error: iteration 5: ")
    for word in ("a parameter of the weighting model", "4 bad", "--dwm-max-bad-steps 4"):
        assert word in line
    assert "Traceback" not in found[0]["stderr"] + found[1]["stderr"]


def test_a_checkpoint_of_an_older_version_loads(results: Results) -> None:
    """It knows of no bad steps, so that the count begins anew."""
    results.succeeded("old")
    results.succeeded("old-resumed")
    assert steps_of(results, "old")[0][-1]["bad_steps"] == {"scores": 1}
    (last,) = steps_of(results, "old-resumed")[0]
    assert last["iteration"] == 4 and last["bad_steps"] == {"scores": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_without_meta_steps_ends_too(results: Results, layout: str) -> None:
    """Three in a row at step 7; two in a row before, with a good step between, were not enough."""
    seen = steps_of(results, f"{layout}-frozen")[0]
    assert [s["iteration"] for s in seen] == list(range(1, 8))
    assert [bool(s["causes"]) for s in seen] == [False, True, True, False, True, True, True]
    found = results[f"{layout}-frozen"]
    assert [rank["code"] for rank in found] == [2, 2]
    assert "iteration 7: a score of the weighting policy is NaN or infinite" in found[0]["stderr"]


@pytest.mark.parametrize("name", ["checked", "checked-uniform"])
def test_the_trainer_ends_a_run_with_a_bad_loss_itself(results: Results, name: str) -> None:
    """Its check fires with a weighting model as it does without one."""
    found, uniform = results[name], results["checked-uniform"]
    assert [s[0] for s in found[1]["steps"]] == [1, 2]
    assert [rank["code"] for rank in found] == [rank["code"] for rank in uniform]
    assert all(rank["code"] not in (0, 1, 2) for rank in found)
    assert "megatron_dwm: error" not in found[1]["stderr"]


def test_a_bad_loss_that_the_trainer_lets_pass_does_not_reach_the_dwm(results: Results) -> None:
    """The DWM and its moments stay those of before; the loss is among the causes."""
    results.succeeded("unchecked")
    for rank in steps_of(results, "unchecked"):
        assert [s["updated"] for s in rank] == [True, True, False, False]
        assert "loss" in rank[2]["causes"] and "loss" in rank[3]["causes"]
        for key in ("dwm", "moments"):
            assert rank[1][key] == rank[2][key] == rank[3][key]
            assert rank[0][key] != rank[1][key]
        assert all(s["finite"] for s in rank)


@pytest.mark.parametrize("policy", ["learned", "shuffled"])
def test_guards_hold_in_a_run(results: Results, folder: Path, policy: str) -> None:
    """Every bound holds at every step, the log says where a guard acted, and it did act."""
    for rank in results.succeeded(policy):
        for step in rank["seen"]:
            weights = step["weights"]
            assert sum(weights) == pytest.approx(len(weights), abs=1e-4)
            assert min(weights) >= 0.3 - 1e-6 and max(weights) <= 1.2 + 1e-6
            assert sum(weights) ** 2 / sum(w * w for w in weights) >= 0.9 * len(weights) - 1e-4
    log = read_log(folder / policy / FILE_NAME)
    assert "guard_temperature" not in log[0] and log[-1]["guard_temperature"] > 1.0
    assert any("guard_capped" in line for line in log)
    out = results[policy][-1]["stdout"]
    assert out.count("--dwm-min-effective-samples raised the temperature") == 1


def test_without_guards_the_bounds_are_broken(results: Results) -> None:
    """Negative control of the test above."""
    last = steps_of(results, "unguarded")[0][-1]["weights"]
    assert max(last) > 1.2 and min(last) < 0.3
    assert sum(last) ** 2 / sum(w * w for w in last) < 0.9 * len(last)
