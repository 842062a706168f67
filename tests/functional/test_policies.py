"""Policies in the real trainer: stop and resume, transfer, one's own, what a plain step sends.

Two ranks take all runs. A resumed run must have the losses, gradient norms, parameters and log
lines of one that was never stopped. Most go on from the checkpoint that the whole run has saved on
its way; those of `STOPPED` are stopped there, and go on in the same folder.

Not exercised here: GPUs; other layouts (tests/distributed/test_head.py); kills in the middle of a
save (test_faults).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional.corpus import write_dataset
from tests.functional.harness import DWM, Results, Run, run_all
from tests.functional.resuming import DP2, log_of, whole_and_resumed, words_on

MODEL = DWM[: DWM.index("--dwm-rule")] + DWM[DWM.index("--dwm-rule") + 2 :]
# Flags of runs that are taken up after step 8 of 14.
RESUMED = {
    "head-dp2": f"--dwm {DP2} --dwm-meta-interval 2 --dwm-gate off --dwm-log-samples",
    "head-pp2-gate": "--dwm --pipeline-model-parallel-size 2 --dwm-meta-interval 1",
    "head-tp2": "--dwm --tensor-model-parallel-size 2 --dwm-meta-interval 2 --dwm-gate off",
    "shuffled-dp2": f"--dwm {DP2} --dwm-policy shuffled --dwm-meta-interval 2 --dwm-gate off",
    "linupper-dp2": f"--dwm {DP2} --dwm-policy linupper",
    "truncation-pp2": "--dwm --pipeline-model-parallel-size 2 --dwm-policy truncation",
    "influence-dp2": f"--dwm {DP2} --dwm-policy influence",
    "model-dp2": f"{' '.join(MODEL)} {DP2} --dwm-meta-interval 3 --dwm-gate off",
    "model-pp2": f"{' '.join(MODEL)} --pipeline-model-parallel-size 2 --dwm-meta-interval 2 "
    "--dwm-meta-dense-steps 0 --dwm-gate off --dwm-map softmax",
    "head-moe-dp2": f"--dwm {DP2} --dwm-meta-interval 2 --dwm-gate off --num-experts 4 "
    "--moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
    "--dwm-log-expert-load 4",
    "head-bf16": f"--dwm --bf16 {DP2} --dwm-meta-interval 2 --dwm-gate off",
}
# What balances the experts is updated once a step, by the trainer's own tokens.
BIAS = (
    f"{DP2} --num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 0.05"
).split()
STOPPED = ("head-dp2", "model-pp2")
STEPS, STOP = 14, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    names = ("good", "odd", "meta", "valid")
    data = {name: write_dataset(folder / name, seed) for seed, name in enumerate(names)}
    base = words_on(folder, [data["good"], data["odd"]], data["valid"])
    base += ["--train-iters", str(STEPS), "--save-interval", str(STOP)]
    base += ["--dwm-meta-data-path", data["meta"]]
    runs = []
    for name, flags in RESUMED.items():
        words = [*base, *flags.split()]
        runs += whole_and_resumed(name, words, folder, STOP, name in STOPPED)
    head = [*base, "--dwm", *DP2.split()]
    saved = ["--dwm-load", str(folder / "head-dp2-whole")]
    own = ["--dwm-policy", "tests.functional.own_policy:ByDomain"]
    runs += [
        Run("frozen", [*head, "--dwm-schedule", "frozen", *saved, "--dwm-gate", "off"]),
        Run("frozen-without", [*head, "--dwm-schedule", "frozen"]),
        Run("other-form", [*base, *MODEL, *DP2.split(), "--load", str(folder / "head-dp2-whole")]),
        Run("own", [*head, *own, "--save", str(folder / "own")]),
        Run("own-missing", [*head, "--dwm-policy", "tests.functional.own_policy:Nobody"]),
        Run("no-experts", [*head, "--dwm-log-expert-load", "1"]),
        Run("model-flag", [*head, "--dwm-init", "llm:2"]),
        Run("bias-stock", [*base[: base.index("--save-interval")], *BIAS]),
        Run("bias-head", [*head, *BIAS, "--dwm-meta-interval", "1"]),
        Run("uniform-start", [*head, "--dwm-policy", "uniform"]),
    ]
    return run_all(2, runs, folder)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    results: Results, folder: Path, name: str
) -> None:
    whole = results.succeeded(f"{name}-whole")
    second = results.succeeded(f"{name}-second")
    first = results.succeeded(f"{name}-first") if name in STOPPED else [{"steps": []}] * 2
    begun = 0 if name in STOPPED else STOP
    for rank in range(2):
        assert first[rank]["steps"] + second[rank]["steps"] == whole[rank]["steps"][begun:]
        assert second[rank]["parameters"] == whole[rank]["parameters"]
    lines = log_of(folder, f"{name}-parts")
    assert [line["iteration"] for line in lines] == list(range(begun + 1, STEPS + 1))
    assert lines == log_of(folder, f"{name}-whole")[begun:]
    if "gate" not in name:  # weights did leave 1, so that there was something to compare
        assert lines[-1]["max_weight"] > 1.005


def test_experts_are_covered_by_the_hooks(results: Results) -> None:
    out = results.succeeded("head-moe-dp2-whole")[0]["stdout"]
    assert "DWM: estimator ghost: auto; it covers every trained parameter" in out


def test_the_load_of_experts_is_in_the_log_by_domain(results: Results, folder: Path) -> None:
    results.succeeded("head-moe-dp2-whole")
    lines = {line["iteration"]: line for line in log_of(folder, "head-moe-dp2-whole")}
    assert [k for k, line in lines.items() if "expert_load" in line] == [
        k for k in lines if k % 4 == 0
    ]
    last = lines[max(k for k in lines if k % 4 == 0)]["expert_load"]
    assert list(last) == ["good", "odd"]
    # What they are is in tests/unit/core/test_expert_load.py; here each domain has its own.
    assert last["good"] != last["odd"]


def test_meta_steps_leave_the_balance_of_experts_alone(results: Results) -> None:
    """Nothing is learned from random tokens, so that weights are 1 and all else must be stock's."""
    stock, head = results.succeeded("bias-stock"), results.succeeded("bias-head")
    assert "meta loss" in head[-1]["stdout"]
    for rank in range(2):
        assert head[rank]["steps"] == stock[rank]["steps"]
        assert head[rank]["parameters"] == stock[rank]["parameters"]


def test_scores_are_in_the_log_where_samples_are(folder: Path, results: Results) -> None:
    results.succeeded("head-dp2-whole")
    line = log_of(folder, "head-dp2-whole")[-1]
    assert len(line["scores"]) == len(line["weights"]) == len(line["losses"]) == 16
    assert sum(line["losses"]) / 16 == pytest.approx(line["lm_loss"], rel=0.02)
    order = sorted(range(16), key=lambda i: line["scores"][i])
    weights = [line["weights"][i] for i in order]
    assert weights == sorted(weights)


def test_a_head_that_was_saved_weighs_without_meta_steps(results: Results) -> None:
    out = results.succeeded("frozen")
    assert "DWM: weights from" in out[0]["stdout"]
    assert "meta loss" not in out[-1]["stdout"]
    lines = [line for line in out[-1]["stdout"].splitlines() if " dwm iteration " in line]
    assert all("max weight: 1.000" not in line for line in lines[2:])


def test_own_policy_by_its_path(results: Results, folder: Path) -> None:
    results.succeeded("own")
    for line in log_of(folder, "own"):
        assert line["domain_weight"] == {"good": 1.5, "odd": 0.5}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("frozen-without", ["--dwm-schedule frozen needs --dwm-load"]),
        ("other-form", ["of the form head", "this run's is model", "--dwm-form"]),
        ("own-missing", ["tests.functional.own_policy has no Nobody"]),
        ("model-flag", ["--dwm-init", "--dwm-form is head", "--dwm-form model"]),
        ("no-experts", ["--dwm-log-expert-load is about MoE layers"]),
    ],
)
def test_what_does_not_fit_is_one_line(results: Results, name: str, words: list[str]) -> None:
    found = results[name]
    assert [rank["code"] for rank in found] == [2, 2]
    lines = [line for line in found[0]["stderr"].splitlines() if "megatron_dwm: error" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert all("Traceback" not in rank["stderr"] for rank in found)


def test_the_gate_says_in_words_when_it_opens(results: Results) -> None:
    """Nothing is to be learned from random tokens: it stays closed and every weight 1."""
    out = results.succeeded("head-pp2-gate-whole")[-1]["stdout"]
    assert "gate: 0.00" in out
    assert "DWM: gate open" not in out
