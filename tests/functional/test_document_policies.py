"""Policies by what is known of documents, combinations, and learning small to draw large.

Two ranks take all runs. What is checked beside resumption bit for bit: that a sample's weight is
what the files beside the data say, and that what a run writes of its documents is what it has
weighed them by, also after a stop and on another number of data-parallel ranks.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from megatron_dwm.data import weights_seen
from megatron_dwm.data.index import read_index
from megatron_dwm.data.weight_file import read_weights, write_weights
from megatron_dwm.data.weights_seen import read
from megatron_dwm.logs.log_file import FILE_NAME, read_log
from tests.functional.corpus import write_dataset
from tests.functional.harness import TINY, Results, Run, run_all
from tests.functional.resuming import DP2, log_of, whole_and_resumed, words_on

STEPS, STOP = 14, 8
LEARNS = "--dwm-meta-interval 2 --dwm-gate off"
RESUMED = {
    "static-tp2": "--dwm --tensor-model-parallel-size 2 --dwm-policy static --dwm-log-samples",
    "curriculum-pp2": "--dwm --pipeline-model-parallel-size 2 --dwm-policy curriculum "
    "--dwm-curriculum-pacing root --dwm-curriculum-share 0.9 --dwm-log-samples",
    "rho-dp2": f"--dwm {DP2} --dwm-policy rho",
    "domains-dp2": f"--dwm {DP2} --dwm-policy domains {LEARNS}",
    "head-curriculum-dp2": f"--dwm {DP2} --dwm-policy head+curriculum "
    f"--dwm-curriculum-by quality {LEARNS}",
    "kept-dp2": f"--dwm {DP2} {LEARNS} --dwm-document-weights --dwm-log-samples",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    names = ("good", "odd", "meta", "valid")
    data = {name: write_dataset(folder / name, seed) for seed, name in enumerate(names)}
    for name, weight in (("good", 3.0), ("odd", 1.0)):
        index = read_index(data[name])
        write_weights(f"{data[name]}.weights", numpy.full(60, weight), index)
        write_weights(f"{data[name]}.quality.weights", numpy.arange(60) + 1, index)
        write_weights(f"{data[name]}.reference_loss.weights", numpy.linspace(3, 6, 60), index)
    base = words_on(folder, [data["good"], data["odd"]], data["valid"])
    base += ["--train-iters", str(STEPS), "--save-interval", str(STOP)]
    base += ["--dwm-meta-data-path", data["meta"]]
    runs = []
    for name, flags in RESUMED.items():
        # What was seen of documents lies in the run's own folder.
        stopped = name == "kept-dp2"
        if stopped:
            # Of earlier runs in the same folder: at an iteration that is saved, on more ranks, and
            # at one that is not.
            for iteration, rank in ((STOP, 5), (STOP - 1, 0)):
                seen = weights_seen.DocumentWeightsSeen([data["good"], data["odd"]])
                seen.save(str(folder / f"{name}-parts"), iteration, rank, 6)
        runs += whole_and_resumed(name, [*base, *flags.split()], folder, STOP, stopped)
    kept = RESUMED["kept-dp2"].replace(DP2, "--tensor-model-parallel-size 2 --lr 1e-2")
    source = ["--load", str(folder / "kept-dp2-whole"), "--ckpt-step", str(STOP)]
    source += ["--no-load-optim", "--no-load-rng", "--save", str(folder / "kept-tp2")]
    runs.append(Run("kept-tp2", [*base, *kept.split(), *source]))
    bad = [*base, "--dwm", "--dwm-policy"]
    runs += [
        Run("missing", [*bad, "static", "--dwm-static-weights", "nobody"]),
        Run("both", [*bad, "static", "--dwm-sampling", "weights"]),
        Run("mock", [*TINY, "--mock-data", "--dwm", "--dwm-policy", "curriculum"]),
        Run("nowhere", [*base, "--dwm", "--dwm-document-weights"]),
    ]
    return run_all(2, runs, folder)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    results: Results, folder: Path, name: str
) -> None:
    whole, second = results.succeeded(f"{name}-whole"), results.succeeded(f"{name}-second")
    for rank in range(2):
        assert second[rank]["steps"] == whole[rank]["steps"][STOP:]
        assert second[rank]["parameters"] == whole[rank]["parameters"]
    lines, expected = log_of(folder, f"{name}-parts"), log_of(folder, f"{name}-whole")
    assert lines[-(STEPS - STOP) :] == expected[STOP:]
    assert max(line["max_weight"] for line in expected) > 1.005


def test_a_meta_step_says_what_its_passes_take(results: Results, folder: Path) -> None:
    results.succeeded("domains-dp2-whole")
    lines = [x for x in read_log(str(folder / "domains-dp2-whole" / FILE_NAME)) if "gate" in x]
    timed = [line for line in lines if "meta_seconds" in line]
    assert len(timed) >= 5
    for line in timed:
        parts = [line[f"seconds_{name}"] for name in ("meta_gradient", "inner", "learn")]
        assert min(parts[:2]) > 0
        assert 0.5 * line["meta_seconds"] < sum(parts) < 1.001 * line["meta_seconds"] + 1e-3
        assert "seconds_influence" not in line  # it is read in the inner step


def test_a_static_weight_is_what_the_file_says(results: Results, folder: Path) -> None:
    """Documents of one data set weigh three times those of the other, in every step."""
    results.succeeded("static-tp2-whole")
    for line in log_of(folder, "static-tp2-whole")[1:]:
        found = line["domain_weight"]
        assert found["good"] / found["odd"] == pytest.approx(3, rel=1e-6)
        assert len(set(line["weights"])) == 2
    mean = numpy.mean([line["weights"] for line in log_of(folder, "static-tp2-whole")[1:]])
    assert mean == pytest.approx(1, abs=0.06)


def test_a_curriculum_takes_more_and_more_in(results: Results, folder: Path) -> None:
    results.succeeded("curriculum-pp2-whole")
    lines = log_of(folder, "curriculum-pp2-whole")
    shares = [line["curriculum"] for line in lines]
    assert shares == sorted(shares) and shares[0] == 0.2 and shares[-1] == 1.0
    zeros = [numpy.mean(numpy.array(line["weights"]) == 0) for line in lines]
    assert zeros[0] == 0 and zeros[2] > 0.3 and zeros[-1] == 0


def _seen_by_hand(folder: Path, name: str) -> dict[str, float]:
    """Tokens at their weights by data set, of the log alone: 32 tokens a sample."""
    total = {"good": 0.0, "odd": 0.0}
    for line in read_log(str(folder / name / FILE_NAME)):
        for domain, weight in line["domain_weight"].items():
            total[domain] += weight * line["domain_samples"][domain] * 32
    return total


@pytest.mark.parametrize("name", ["kept-dp2-whole", "kept-dp2-parts", "kept-tp2"])
def test_what_is_kept_of_documents_is_what_they_weighed(
    results: Results, folder: Path, name: str
) -> None:
    """Stopped and resumed or not bit for bit; on other ranks the past is taken over."""
    results.succeeded("kept-dp2-whole")
    results.succeeded("kept-tp2")
    seen = read(str(folder / name), STEPS)
    assert [Path(p).name for p in seen.prefixes] == ["good", "odd"]
    assert sum(t.sum() for t in seen.tokens) == STEPS * 16 * 32
    whole = read(str(folder / "kept-dp2-whole"), STEPS)
    size = 60
    for k in range(2):
        mine, other = (numpy.pad(s.weighted[k], (0, size))[:size] for s in (seen, whole))
        if name == "kept-tp2":
            # The documents are the same, and what the head makes of them after the change not.
            assert numpy.array_equal(mine > 0, other > 0)
            past = read(str(folder / "kept-dp2-whole"), STOP).weighted[k]
            assert (mine + 1e-9 >= numpy.pad(past, (0, size))[:size]).all()
        else:
            assert numpy.array_equal(mine, other)
    by_hand = _seen_by_hand(folder, "kept-dp2-whole")
    for k, domain in enumerate(by_hand):
        assert whole.weighted[k].sum() == pytest.approx(by_hand[domain], rel=1e-4)


def test_only_files_of_checkpoints_and_of_their_ranks_stay(results: Results, folder: Path) -> None:
    """Files of an iteration without checkpoint are removed, and those of more ranks at one."""
    results.succeeded("kept-dp2-second")
    kept = folder / "kept-dp2-parts" / weights_seen.FOLDER
    assert sorted(path.name for path in kept.iterdir()) == [f"iter_{k:07d}" for k in (STOP, STEPS)]
    for part in kept.iterdir():
        assert sorted(path.name for path in part.iterdir()) == ["rank_0.npz", "rank_1.npz"]


def test_a_run_draws_by_what_another_has_learned(
    results: Results, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """The command makes weight files of the run, and the blend's new shares."""
    from megatron_dwm.cli import weights

    results.succeeded("kept-dp2-whole")
    prefixes = [str(folder / name) for name in ("good", "odd")]
    blend = folder / "blend.txt"
    run = str(folder / "kept-dp2-whole")
    words = ["from-run", run, *prefixes, "--blend", str(blend)]
    assert weights.main(words) == 2  # the files are there
    assert weights.main([*words, "--force"]) == 0
    seen = read(run, STEPS)
    means = [seen.weighted[k].sum() / seen.tokens[k].sum() for k in range(2)]
    shares = [float(word) for word in blend.read_text().split()[::2]]
    read_shares = [seen.tokens[k].sum() for k in range(2)]
    expected = numpy.array(read_shares) * means
    assert shares == pytest.approx(list(expected / expected.sum()), rel=1e-4)
    for k, prefix in enumerate(prefixes):
        made = read_weights(f"{prefix}.weights", read_index(prefix)).weights
        tokens, weighted = (numpy.pad(a, (0, 60))[:60] for a in (seen.tokens[k], seen.weighted[k]))
        by_hand = (weighted + 200 * means[k]) / (tokens + 200)
        assert made == pytest.approx(by_hand, rel=1e-5)
    assert "mean weight" in capsys.readouterr().out
    assert sum(shares) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["--dwm-static-weights nobody", "good.nobody.weights", "no such file"]),
        ("both", ["--dwm-static-weights is weights", "--dwm-sampling weights"]),
        ("mock", ["--mock-data has no documents", "--dwm-curriculum-by"]),
        ("nowhere", ["--dwm-document-weights", "--save"]),
    ],
)
def test_what_does_not_fit_is_one_line(results: Results, name: str, words: list[str]) -> None:
    found = results[name]
    assert [rank["code"] for rank in found] == [2, 2]
    lines = [line for line in found[0]["stderr"].splitlines() if "megatron_dwm: error" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert all("Traceback" not in rank["stderr"] for rank in found)
