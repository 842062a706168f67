"""The meta-gradient checked against brute force, in running trainings and on saved runs.

What a verification must not do is change the training: losses, gradient norms, parameters and the
step log are compared bit by bit with a run without it. What it must do is notice: a scrambled
estimate draws the loud message, and nothing else does.

Not exercised here: GPUs; virtual pipeline stages; experts; more ranks than two.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from megatron_dwm.logs.log_file import CLOCK_FIGURES, FILE_NAME, read_log
from tests.functional.corpus import write_dataset
from tests.functional.harness import (
    DWM,
    MOCK,
    ROOT,
    TINY,
    Results,
    environment,
    host_flags,
    torchrun,
)

pytestmark = pytest.mark.timeout(1600)

LAYOUTS = {
    "dp2": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    "--hidden-dropout 0.1",
    "pp2": "--pipeline-model-parallel-size 2 --dwm-init llm:2 --lr-warmup-iters 3",
}
VERIFY = ["--dwm-verify-meta-gradient", "2", "--dwm-verify-samples", "3"]
LOUD = "META-GRADIENT NOT CONFIRMED"
# Early steps of Adam are far from linear in a weight, so that these runs look from step 5 on.
LATER = ["--dwm-warmup-steps", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verification")


@pytest.fixture(scope="module")
def common(folder: Path) -> list[str]:
    """The flags of every run but its layout."""
    data = {n: write_dataset(folder / n, seed) for seed, n in enumerate(("train", "meta", "valid"))}
    at = TINY.index("--split")
    return [
        *(*TINY[:at], *TINY[at + 2 :], "--train-iters", "5", "--ckpt-format", "torch_dist"),
        *("--save-interval", "3"),
        *("--train-data-path", data["train"], "--valid-data-path", data["valid"]),
        *("--dwm-meta-data-path", data["meta"], "--data-cache-path", str(folder / "cache"), *DWM),
    ]


def run_all(runs: list[dict], folder: Path) -> Results:
    """Takes all runs and probes in one set of two ranks."""
    for run in runs:
        if not run.setdefault("probe", False):
            run["args"] = [*host_flags(), *run["args"]]
        run.setdefault("env", {})
    (folder / "runs.json").write_text(json.dumps(runs))
    script = str(ROOT / "tests" / "functional" / "run_verification.py")
    done = torchrun(2, [script], 1500, RUNS=str(folder / "runs.json"), OUT=str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return Results(folder, 2)


@pytest.fixture(scope="module")
def results(folder: Path, common: list[str]) -> Results:
    runs: list[dict] = []
    for name, flags in LAYOUTS.items():
        for kind, more in (("plain", []), ("verified", VERIFY)):
            save = ["--save", str(folder / f"{name}-{kind}")]
            runs.append({"name": f"{name}-{kind}", "args": [*common, *flags.split(), *save, *more]})
    saved = str(folder / "pp2-verified")
    resumed = [*common, *LAYOUTS["pp2"].split(), *VERIFY, "--load", saved, "--ckpt-step", "3"]
    later = [*common, *LATER, *VERIFY, "--dwm-estimator", "ghost"]
    drowned = [*later, "--bf16", "--lr", "1e-6", "--dwm-verify-samples", "6"]
    current = ["--dwm-lookahead", "current"]
    board = ["--tensorboard-dir", str(folder / "tensorboard")]
    runs += [
        {"name": "resumed", "args": [*resumed, "--save", str(folder / "resumed")]},
        {"name": "later", "args": [*later, "--save", str(folder / "later"), *board]},
        {
            "name": "broken",
            "args": [*later, "--save", str(folder / "old")],
            "env": {"SCRAMBLE": "1", "OLD": "1"},
        },
        {
            "name": "doubled",
            "args": [*later, "--save", str(folder / "doubled")],
            "env": {"SCALE": "2"},
        },
        {
            "name": "loss-scale",
            "args": [*later, "--bf16", "--save", str(folder / "loss-scale")],
            "env": {"SCALE": "64"},
        },
        {
            "name": "current",
            "args": [*later, *current, "--save", str(folder / "current")],
            "env": {"SCALE": "64"},
        },
        {"name": "bf16", "args": [*later, "--bf16", "--save", str(folder / "bf16")]},
        {
            "name": "drowned",
            "args": [*drowned, "--save", str(folder / "drowned")],
        },
        {"name": "stock", "args": [*stock(common), "--save", str(folder / "stock")]},
    ]
    return run_all(runs, folder)


def stock(common: list[str]) -> list[str]:
    """The same run without the DWM, one step of it."""
    words = [*common[: common.index("--dwm")], "--exit-interval", "1"]
    at = words.index("--dwm-meta-data-path")
    return [*words[:at], *words[at + 2 :]]


@pytest.fixture(scope="module")
def probes(results: Results, folder: Path, common: list[str]) -> Results:
    """The command on what the runs left, which it must leave as it is."""
    dp2, script = str(folder / "dp2-verified"), str(ROOT / "examples" / "pretrain_dwm.py")
    old, few = str(folder / "old"), ["--samples", "4"]
    flags = [*host_flags(), *common]
    runs = [
        {"name": "probe", "args": ["--checkpoint", dp2, "--iteration", "3"]},
        {
            "name": "probe-broken",
            "args": ["--checkpoint", str(folder / "later"), *few],
            "env": {"SCRAMBLE": "1"},
        },
        {
            "name": "probe-doubled",
            "args": ["--checkpoint", str(folder / "later"), *few],
            "env": {"SCALE": "2"},
        },
        {
            "name": "probe-old",
            "args": ["--checkpoint", old, *few, "--script", script, "--", *flags],
        },
        *({"name": f"bad-{n}", "args": words} for n, (words, _) in bad_input(folder).items()),
    ]
    kept = ("dp2-verified", "later", "old", "stock", "tensorboard")
    before = [contents(folder / name) for name in kept]
    found = run_all([{**run, "probe": True} for run in runs], folder)
    assert before == [contents(folder / name) for name in kept], "the command changed the run"
    return found


def bad_input(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments of the command that cannot work, and what the error must say."""
    saved, damaged = str(folder / "dp2-verified"), folder / "damaged"
    (damaged / "iter_0000001").mkdir(parents=True, exist_ok=True)
    words = {
        "nowhere": ([], "no such folder"),
        "cache": ([], "holds no checkpoint"),
        "damaged": ([], "cannot be read as a torch_dist checkpoint"),
        "stock": ([], "holds no weighting model"),
        "old": ([], "--script SCRIPT -- FLAGS"),
    }
    found = {
        name: (["--checkpoint", str(folder / name), *more], message)
        for name, (more, message) in words.items()
    }
    for name, more, message in (
        ("iteration", ["--iteration", "4"], "it holds 3, 5"),
        ("samples", ["--samples", "2"], "--samples 2"),
        ("json-inside", ["--json", f"{saved}/figures.json"], "lies in the run"),
        ("json-nowhere", ["--json", f"{folder}/no/figures.json"], "no such folder"),
        ("script", ["--script", "gone.py"], "gone.py does not exist"),
        ("uniform", ["--", "--dwm-policy", "uniform"], "takes no meta steps"),
    ):
        found[name] = (["--checkpoint", saved, *more], message)
    return found


def contents(folder: Path) -> dict[str, str]:
    """Returns a hash of each file below a folder, and of the time it was written."""
    return {
        str(path): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def log_of(folder: Path, name: str) -> list[dict]:
    """Returns a run's step log without what differs from time to time."""
    return [
        {k: v for k, v in x.items() if k not in CLOCK_FIGURES}
        for x in read_log(folder / name / FILE_NAME)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_with_verification(
    results: Results, folder: Path, layout: str
) -> None:
    """Losses, norms, validation, parameters of every rank, and the log but for its figures."""
    plain, verified = (results.succeeded(f"{layout}-{k}") for k in ("plain", "verified"))
    for a, b in zip(plain, verified, strict=True):
        for name in ("steps", "valid", "parameters"):
            assert a[name] == b[name], name
    logs = [log_of(folder, f"{layout}-{kind}") for kind in ("plain", "verified")]
    figures = [[k for k in line if k.startswith("verify")] for line in logs[1]]
    # Due at the first meta step, which cannot be verified; then, with the count, at 3 and 5.
    assert [bool(names) for names in figures] == [False, True, True, False, True]
    for line in logs[1]:
        for name in [k for k in line if k.startswith("verify")]:
            del line[name]
    assert logs[0] == logs[1]
    out = verified[-1]["stdout"]
    assert out.count("cannot be verified yet") == 1
    assert out.count("meta-gradient verified on 3 samples") == 3


def test_resumed_run_verifies_the_same_steps(results: Results, folder: Path) -> None:
    """The count of meta steps is in the checkpoint, so that the log goes on as it would have."""
    results.succeeded("resumed")
    assert log_of(folder, "resumed") == log_of(folder, "pp2-verified")[3:]


def test_estimate_agrees_with_brute_force(results: Results, folder: Path) -> None:
    """In fp32 the correlation is above 0.99 and brute force agrees with itself."""
    out = results.succeeded("later")[-1]["stdout"]
    lines = [x for x in log_of(folder, "later") if "verify_correlation" in x]
    assert [line["iteration"] for line in lines] == [5]
    for line in lines:
        assert line["verify_correlation"] >= 0.99
        assert line["verify_relative_error"] < 0.1
        assert 0.9 < line["verify_magnitude"] < 1.1
        assert line["verify_noise"] < 0.05
        assert line["verify_samples"] == 3
    assert "META-GRADIENT" not in out and "without a verdict" not in out


def test_tensorboard_has_the_figures(results: Results, folder: Path) -> None:
    """Under dwm/, as everything of the log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results.succeeded("later")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (line,) = [x for x in log_of(folder, "later") if "verify_correlation" in x]
    names = ("correlation", "magnitude", "relative_error", "noise")
    for name in (f"verify_{name}" for name in names):
        (event,) = events.Scalars(f"dwm/evidence/{name}")
        assert event.step == 5 and event.value == pytest.approx(line[name])


def test_broken_estimate_is_noticed(results: Results) -> None:
    """The loud message names both figures and the ways out; the run goes on."""
    found = results.succeeded("broken")
    assert [s[0] for s in found[-1]["steps"]] == [1, 2, 3, 4, 5]
    out = found[-1]["stdout"]
    for words in (LOUD, "--dwm-verify-correlation 0.9", "learning noise", "relative error"):
        assert words in out
    assert "DWM: " not in "".join(x for x in found[0]["stdout"].splitlines() if "CONFIRMED" in x)


@pytest.mark.parametrize(("name", "factor"), [("doubled", 2), ("loss-scale", 64)])
def test_a_factor_is_noticed(results: Results, folder: Path, name: str, factor: float) -> None:
    """Of every estimate alike, as of a loss scale in bf16: the correlation does not see it."""
    out = results.succeeded(name)[-1]["stdout"]
    (line,) = [x for x in log_of(folder, name) if "verify_magnitude" in x]
    assert line["verify_correlation"] >= 0.95
    assert line["verify_magnitude"] == pytest.approx(factor, rel=0.1 if factor == 2 else 0.5)
    assert LOUD in out and "The order of the samples is right" in out
    assert f"the estimate is {line['verify_magnitude']:.3g} times what brute force" in out


def test_the_magnitude_of_current_is_not_judged(results: Results, folder: Path) -> None:
    """It is printed and logged, and nothing is said of it, whatever it is."""
    out = results.succeeded("current")[-1]["stdout"]
    (line,) = [x for x in log_of(folder, "current") if "verify_correlation" in x]
    assert line["verify_magnitude"] is not None and "| magnitude: " in out
    assert "times what brute force measures" not in out and "on the magnitude" not in out


def test_bf16_is_verified(results: Results, folder: Path) -> None:
    """Brute force changes weights by more there, and is above its rounding."""
    out = results.succeeded("bf16")[-1]["stdout"]
    (line,) = [x for x in log_of(folder, "bf16") if "verify_noise" in x]
    assert line["verify_correlation"] >= 0.95 and line["verify_noise"] < 0.2
    assert LOUD not in out and "without a verdict" not in out


def test_noise_is_told_apart(results: Results, folder: Path) -> None:
    """At a learning rate at which bf16 parameters hardly move, brute force says it sees noise."""
    out = results.succeeded("drowned")[-1]["stdout"]
    (line,) = [x for x in log_of(folder, "drowned") if "verify_noise" in x]
    assert line["verify_noise"] is None or line["verify_noise"] > 0.48
    assert "verification without a verdict" in out and LOUD not in out


# ------------------------------------------------------------------------------- the command


def test_command_on_a_saved_run(probes: Results) -> None:
    """Two ranks: the table on the first one, exit code 0, and the run untouched (see fixture).

    The next step of checkpoint 3 is step 4, which the run itself did not verify.
    """
    found = probes["probe"]
    assert [rank["code"] for rank in found] == [0, 0], found[0]["stderr"][-3000:]
    assert found[1]["stdout"] == ""
    lines = found[0]["stdout"].splitlines()
    assert "estimated" in lines[2] and len(lines) == 3 + 8 + 1
    assert float(lines[-1].split()[1]) >= 0.99


def test_command_notices_a_broken_estimate(probes: Results) -> None:
    """Exit code 1 and the message; the complete run's last batch is taken once more."""
    found = probes["probe-broken"]
    assert [rank["code"] for rank in found] == [1, 1], found[0]["stderr"][-3000:]
    assert LOUD in found[0]["stdout"]
    assert "the run is complete" in found[0]["stdout"]


def test_command_notices_a_factor(probes: Results) -> None:
    """Exit code 1, with a correlation that would have passed."""
    found = probes["probe-doubled"]
    assert [rank["code"] for rank in found] == [1, 1], found[0]["stderr"][-3000:]
    out = found[0]["stdout"]
    assert LOUD in out and "The order of the samples is right" in out


def command(*words: str) -> tuple[int, str, str]:
    """Runs the command without torchrun, as one process; returns code, stdout and stderr."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "megatron_dwm", "probe", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_command_on_another_world_size(results: Results, folder: Path) -> None:
    """One process on a run of two ranks: same samples, same figures up to rounding."""
    results.succeeded("dp2-verified")
    saved, file = folder / "dp2-verified", folder / "figures.json"
    before = contents(saved)
    code, out, err = command("--checkpoint", str(saved / "iter_0000003"), "--json", str(file))
    assert code == 0, err[-3000:]
    figures = json.loads(file.read_text())
    assert figures["passed"] and figures["correlation"] >= 0.99
    assert 0.5 < figures["magnitude"] < 2.0
    assert len(figures["samples"]) == len(figures["measured"]) == 8
    assert f"correlation {figures['correlation']:.4f}" in out
    assert contents(saved) == before


def test_command_on_a_launched_script(folder: Path) -> None:
    """A script of the user's own, which the launcher attached the DWM to and which takes a word
    off its command line, is started the same way again. Its learning rate ended at 0, where there
    would be nothing to compare."""
    script = str(ROOT / "tests" / "functional" / "_tiny_pretrain.py")
    words = [*host_flags(), *TINY, *MOCK, *DWM, "--eval-iters", "0", "--ckpt-format", "torch_dist"]
    saved, logits = folder / "launched", folder / "logits.pt"
    words += ["--save", str(saved), "--save-interval", "4", "--lr-decay-style", "linear"]
    done = torchrun(1, ["-m", "megatron_dwm", "train", script, str(logits), *words])
    assert done.returncode == 0, done.stderr[-3000:]
    logits.unlink()
    before = contents(saved)
    code, out, err = command("--checkpoint", str(saved), "--samples", "3", "--json")
    assert code == 0, err[-3000:]
    figures = json.loads(out)  # and nothing else is printed
    assert figures["iteration"] == 4 and len(figures["samples"]) == 3 and figures["passed"]
    assert not logits.exists() and contents(saved) == before


def test_command_on_an_older_checkpoint(probes: Results) -> None:
    """Which does not say how it was started: with the script and its flags it works."""
    found = probes["probe-old"]
    assert [rank["code"] for rank in found] == [0, 0], found[0]["stderr"][-3000:]
    assert "estimator ghost" in found[0]["stdout"]


def test_bad_input_is_one_line(probes: Results, folder: Path) -> None:
    """Exit code 2 on every rank, and one line on the first that says what is missing."""
    for name, (_, message) in bad_input(folder).items():
        found = probes[f"bad-{name}"]
        assert [rank["code"] for rank in found] == [2, 2], (name, found[0]["stderr"][-2000:])
        lines = [x for r in found for x in r["stderr"].splitlines() if "error:" in x]
        assert len(lines) == 1 and message in lines[0], (name, lines)
        assert "Traceback" not in found[0]["stderr"]
