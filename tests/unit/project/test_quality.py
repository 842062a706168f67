"""`benchmarks/quality.py`: data makers, plan, figures and tables from made-up results, resuming."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality import data, figures, noise, plan, plots, runner, tables  # noqa: E402

LINE = "The morning was fine, and all of the little company walked down to the river.\n"


# ------------------------------------------------------------------------------------- data


def test_shuffling_keeps_each_block_s_tokens_and_no_order():
    tokens = numpy.arange(1000)
    found = noise.shuffle_blocks(tokens, 97, seed=1)
    for start in range(0, 1000, 97):
        block = found[start : start + 97]
        assert sorted(block) == list(range(start, min(start + 97, 1000)))
    # Of neighbours only those by chance are left: about one of a block's pairs.
    assert (numpy.diff(found) == 1).sum() < 40
    assert (noise.shuffle_blocks(tokens, 97, seed=1) == found).all()
    assert (noise.shuffle_blocks(tokens, 97, seed=2) != found).any()


def test_a_scan_keeps_most_characters_and_loses_half_of_the_line_breaks():
    from difflib import SequenceMatcher

    rng = random.Random(1)
    scans = [noise.scan(LINE, rng) for _ in range(100)]
    alike = [SequenceMatcher(None, LINE, scan, autojunk=False).ratio() for scan in scans]
    assert 0.85 < sum(alike) / 100 < 0.97
    assert 30 < sum(scan.endswith("\n") for scan in scans) < 70


def test_near_duplicates_are_few_documents_hardly_changed():
    from difflib import SequenceMatcher

    documents = [f"document {k} " + " ".join(str(k * j) for j in range(200)) for k in range(50)]
    copies = noise.near_duplicates(documents, random.Random(1), originals=5)
    found = [next(copies) for _ in range(60)]
    originals = {text.split()[1] for text in found if text.startswith("document")}
    assert len(originals) <= 6  # an edit may have changed a number
    assert len(set(found)) > 50
    words = found[0].split()
    closest = max(SequenceMatcher(None, words, d.split(), False).ratio() for d in documents)
    assert 0.9 < closest < 1


def test_boilerplate_repeats():
    pages = noise.boilerplate(["<html><head>"], random.Random(1))
    blocks = [block for _ in range(200) for block in next(pages).split("\n\n")]
    assert len(blocks) > 600
    assert len(set(blocks)) < 0.5 * len(blocks)
    assert "<html><head>" in blocks
    assert not any("{" in block for block in blocks)


def test_pieces_are_all_of_a_file_s_text_and_none_is_long(tmp_path: Path):
    (tmp_path / "train").mkdir()
    texts = [f"{word} " + "\n\n".join(LINE * 20 for _ in range(9)) for word in ("one", "two")]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "train" / "books.jsonl").write_text(lines)
    pieces = data.read_pieces(tmp_path, "train/books")
    assert max(map(len, pieces)) <= data.PIECE
    words = sorted(" ".join(texts).split())
    assert sorted(" ".join(pieces).split()) == words


def test_documents_are_cut_off_at_the_limit_with_their_end_counted():
    documents = [numpy.arange(10)] * 5
    found = list(data.up_to(25, documents))
    assert [len(d) for d in found] == [10, 10, 3]
    assert sum(len(d) + 1 for d in found[:2]) + len(found[2]) == 25


# ------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("regime", plan.REGIMES)
def test_shares_add_up_and_the_oracle_s_mean_weight_is_one(regime: str):
    about = plan.REGIMES[regime]
    assert sum(about.shares.values()) == pytest.approx(1)
    assert set(about.useful) <= set(about.shares)
    if about.useful:
        weights = dict(zip(about.shares, about.oracle_weights(), strict=True))
        assert sum(weights[n] * about.shares[n] for n in weights) == pytest.approx(1)
        assert all((weights[n] > 0) == (n in about.useful) for n in weights)


def test_the_full_plan_has_the_seeds_that_were_asked_for():
    runs = plan.full_plan(plan.SIZES["toy"])
    assert len({run.key for run in runs}) == len(runs)
    seeds: dict[tuple[str, str], int] = {}
    for run in runs:
        seeds[run.regime, run.arm] = seeds.get((run.regime, run.arm), 0) + 1
    for arm in ("uniform", "oracle", "linupper", "truncation", "head"):
        assert seeds["shuffled", arm] == 5
    for regime in ("noise", "target", "nothing", "scarce"):
        assert seeds[regime, "uniform"] == seeds[regime, "head"] == 3
        for arm in ("linupper", "shuffled", "model-regression", "model-chain", "influence"):
            assert seeds[regime, arm] == 1
        assert seeds[regime, "uniform-x0.5"] == seeds[regime, "uniform-x2"] == 1
    assert ("nothing", "oracle") not in seeds
    # The first regime comes first, and in it the first seed of the main arms.
    assert [run.key for run in runs[:2]] == ["shuffled/uniform/1", "shuffled/oracle/1"]
    assert {run.seed for run in runs[:9]} == {1}


def test_arms_that_learn_from_a_smaller_run_have_a_teacher_of_their_own():
    size = plan.SIZES["toy"]
    runs = plan.more_plan(size, 2, ["shuffled", "target"])
    assert len(runs) == len({run.key for run in runs}) == 4 * len(plan.MORE)
    assert set(plan.RECIPES) <= set(plan.MORE) and not set(plan.MORE) & set(plan.ARMS)
    taught = {run.arm: plan.teacher(size, run) for run in runs if run.recipe}
    smaller, run = taught["drawn"]
    assert (smaller.hidden, smaller.ffn, smaller.layers) == (32, 96, 2)
    assert "--dwm-document-weights" in run.flags and run.regime == "target"
    # A head is taken over where the width is the same.
    smaller, run = taught["frozen"]
    assert (smaller.hidden, smaller.layers) == (64, 1)
    assert {r.seed for _, r in taught.values()}.isdisjoint({1, 2, 3, 4, 5})


def test_runs_are_chosen_by_regime_letter_arm_and_seed():
    runs = plan.full_plan(plan.SIZES["toy"])
    assert [r.key for r in runs if r.chosen(["a/head/2"])] == ["shuffled/head/2"]
    assert {r.regime for r in runs if r.chosen(["b", "target"])} == {"noise", "target"}
    assert not [r for r in runs if r.chosen(["f"])]
    assert all(r.chosen([]) for r in runs)


@pytest.mark.parametrize("word", ["head-16", "x=nobody --flag", "head=head --dwm-slope 2", "=head"])
def test_a_bad_variant_is_refused(word: str):
    with pytest.raises(ValueError, match="--variant"):
        plan.variants(plan.SIZES["toy"], [word], 1, ["shuffled"])


def test_a_variant_has_its_arm_s_flags_and_its_own():
    (run,) = plan.variants(
        plan.SIZES["toy"], ["head-16=head --dwm-meta-interval 16"], 1, ["target"]
    )
    assert run.key == "target/head-16/1"
    assert run.flags == f"{plan.ARMS['head']} --dwm-meta-interval 16"


def test_only_weighted_arms_wait_for_the_warm_up():
    size = plan.SIZES["toy"]
    flags = {
        arm: plan.trainer_flags(size, plan.Run("shuffled", arm, 1, plan.ARMS[arm], 100, 1e-3))
        for arm in plan.ARMS
    }
    assert "--dwm-warmup-steps" not in flags.pop("uniform")
    for words in flags.values():
        assert words[words.index("--dwm-warmup-steps") + 1] == "20"


# ---------------------------------------------------------------------------------- figures


def result(arm: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    """A run of 1200 steps; its curve falls by 0.001 a step to `loss` + 0.01 (of fewer samples)."""
    curve = [
        {"step": s, "seconds": s * 0.1, "loss": loss + 0.01 + 0.001 * (1200 - s)}
        for s in range(100, 1300, 100)
    ]
    kinds = {"stock": {"steps": 1200, "median": 0.1}}
    if arm != "uniform":
        kinds = {"warm-up": {"steps": 240, "median": 0.1}, "plain": {"steps": 960, "median": 0.1}}
    made = {
        "regime": "shuffled",
        "arm": arm,
        "seed": seed,
        "steps": 1200,
        "tokens": 1_000_000,
        "lr": 3e-3,
        "settings": {},
        "curve": curve,
        "final": loss,
        "seconds": 120.0,
        "kinds": kinds,
        "weights": {},
    }
    return {**made, **changes}


LADDER = [(500_000.0, 2.6), (1_000_000.0, 2.4), (2_000_000.0, 2.3)]
METAS = {
    "warm-up": {"steps": 240, "median": 0.1},
    "plain": {"steps": 720, "median": 0.1},
    "meta": {"steps": 240, "median": 0.2},
}


def test_cost_is_counted_in_the_run_s_own_warm_up_steps():
    # 960 stock steps' worth and 240 of two: (960 + 480) / 1200.
    assert figures.cost(result("head", 1, 2.3, kinds=METAS)) == pytest.approx(1.2)
    assert figures.cost(result("uniform", 1, 2.4)) == 1


def test_cost_follows_from_a_run_alone_on_the_machine_where_there_is_one():
    alone = {
        "warm-up": {"steps": 80, "median": 0.1, "low": 0.1},
        **{kind: {"steps": 9, "median": 0.1, "low": 0.15} for kind in METAS if kind != "warm-up"},
    }
    busy = result("head", 1, 2.3, kinds=METAS)
    known = figures.Results([busy, result("oracle", 1, 2.2)], [{"arm": "head", "kinds": alone}])
    assert figures.cost(known.seeds("shuffled", "head")[1]) == pytest.approx(
        (240 + 960 * 1.5) / 1200
    )
    assert figures.cost(busy) == pytest.approx(1.2)
    runs = plan.timing_plan(plan.SIZES["toy"])
    assert {run.arm for run in runs} == set(plan.ARMS) - {"uniform"}
    assert {run.steps for run in runs} == {plan.TIMING_STEPS}


def test_equal_time_is_read_where_the_time_of_uniform_is_spent():
    # 240 steps at 1, then 1.25 each: uniform's 1200 are spent after 240 + 960 / 1.25 = 1008. The
    # curve is 0.001 x 192 above its end there.
    found = figures.loss_at_equal_time(result("head", 1, 2.3, kinds=METAS))
    assert found == pytest.approx(2.3 + 0.192)
    assert figures.loss_at_equal_time(result("oracle", 1, 2.3)) == 2.3


@pytest.mark.parametrize(
    ("loss", "tokens"),
    [
        (2.6, 500_000),
        (2.5, 500_000 * 2**0.5),
        (2.4, 1_000_000),
        (2.35, 1_000_000 * 2**0.5),
        (2.3, 2_000_000),
        (2.2, 4_000_000),
        (2.8, 250_000),
    ],
)
def test_tokens_are_read_off_uniform_s_runs_linear_in_their_logarithm(loss: float, tokens: float):
    assert figures.tokens_needed(LADDER, loss) == pytest.approx(tokens)
    assert figures.loss_of_tokens(LADDER, tokens) == pytest.approx(loss)


def test_no_number_of_tokens_reaches_what_more_tokens_lead_away_from():
    assert figures.tokens_needed([(1.0, 2.0), (2.0, 2.1)], 1.9) == math.inf


def test_the_multiplier_counts_the_cost_and_goes_by_the_seed_s_own_uniform_run():
    uniform, head = result("uniform", 2, 2.5), result("head", 2, 2.45, kinds=METAS)
    # 0.05 ahead of its own uniform run, as 2.35 is of the ladder's 2.4: 2^0.5 times the tokens.
    assert figures.multiplier(LADDER, head, uniform) == pytest.approx(2**0.5 / 1.2)
    # A uniform run of 1.2 times the tokens gains 0.1 log2 1.2.
    longer = figures.against_longer_uniform(LADDER, head, uniform)
    assert longer == pytest.approx(-0.05 + 0.1 * math.log2(1.2))
    assert figures.multiplier([], head, uniform) is None


def test_the_share_of_the_gain_takes_the_seeds_that_all_have():
    uniform, oracle = {1: 2.4, 2: 2.5, 3: 9.0}, {1: 2.2, 2: 2.3}
    assert figures.share_of_gain({1: 2.25, 2: 2.35, 4: 0.0}, uniform, oracle) == pytest.approx(0.75)
    assert figures.share_of_gain({1: 2.25}, uniform, {}) is None
    assert figures.share_of_gain({1: 2.25}, uniform, {1: 2.5}) is None


def test_differences_are_paired():
    assert figures.paired({1: 2.0, 2: 3.0, 3: 1.0}, {2: 2.5, 1: 2.2}) == pytest.approx([-0.2, 0.5])
    assert figures.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert figures.standard_error([1.0]) is None


# ----------------------------------------------------------------------------------- tables


def all_results() -> list[dict[str, Any]]:
    weights = {
        "useful": [0.6, 0.7, 0.8, 0.9],
        "effective": [0.9, 0.8, 0.7, 0.6],
        "correlation": [0.1, 0.2, 0.3, None],
        "gate": [0.0, 0.5, 1.0, 1.0],
    }
    found = []
    for seed, shift in ((1, 0.0), (2, 0.02)):
        found += [
            result("uniform", seed, 2.4 + shift),
            result("oracle", seed, 2.2 + shift),
            result("head", seed, 2.25 + shift, kinds=METAS, weights=weights),
        ]
    found += [
        result("uniform-x0.5", 1, 2.6, tokens=500_000, steps=600),
        result("uniform-x2", 1, 2.3, tokens=2_000_000, steps=2400),
        result("uniform-lr0.001", 1, 2.7, lr=1e-3),
        result("head-16", 1, 2.26),
    ]
    return found


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in reversed(cells)}


def test_the_table_has_what_was_measured():
    text = tables.report(figures.Results(all_results()))
    rows = rows_of(text)
    assert rows["head"] == [
        *("2", "2.2600 +- 0.0141", "-0.1500 +- 0.0000", "75%", "1.200"),
        *("+0.0420 +- 0.0000", "-21%", "-0.1237 +- 0.0000", "~2.357 +- 0.000"),
    ]
    assert rows["oracle"][3] == "100%"
    assert rows["head-16"][0] == "1"
    assert rows["final loss"] == ["2.6000", "2.4000", "2.3000"]
    assert "uniform-x2" not in text.replace("tokens of a uniform run", "")
    assert "| head | 0.60 0.70 0.80 0.90 | 0.90 0.80 0.70 0.60 | 0.10 0.20 0.30 - |" in text
    assert "| a | head, of the oracle's gain | 80% | 75% | no |" in text
    assert rows["uniform"] == ["2.7000"] or "| uniform | 2.7000 |" in text


def test_a_table_of_what_is_there_so_far():
    text = tables.report(figures.Results([result("head", 1, 2.3)]))
    assert rows_of(text)["head"][:2] == ["1", "2.3000"]


def test_the_plot_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    plots.draw(figures.Results(all_results()), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


# --------------------------------------------------------------------------------- the runs


WRITES = """
import json, sys
loss = float(sys.argv[2])
steps = [["warm-up", 0.1], ["plain", 0.1]]
curve = [{"step": 2, "seconds": 0.2, "loss": loss}]
json.dump({"curve": curve, "final": loss, "steps": steps}, open(sys.argv[1], "w"))
"""
FAILS = "import os; os.kill(os.getpid(), 9)"


@pytest.fixture
def place(tmp_path: Path) -> runner.Place:
    return runner.Place(tmp_path / "runs", tmp_path / "work", tmp_path / "data")


def commands(monkeypatch: pytest.MonkeyPatch, killed: str = "") -> list[str]:
    """Takes runs by a stand-in for the trainer; returns the list of those that were started."""
    started: list[str] = []

    def command(place: runner.Place, size: plan.Size, run: plan.Run) -> list[str]:
        started.append(run.key)
        code = FAILS if run.key == killed else WRITES
        return [sys.executable, "-c", code, str(place.folder(run) / "result.json"), "2.5"]

    monkeypatch.setattr(runner, "command", command)
    return started


def test_a_killed_run_is_taken_again_and_a_finished_one_is_not(
    place: runner.Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    size = plan.scaled(plan.SIZES["toy"], steps=100)
    runs = plan.full_plan(size)[:3]
    started = commands(monkeypatch, killed=runs[1].key)
    assert runner.take(place, size, runs, "corpus", jobs=2) == 1
    assert f"{runs[1].key} failed (exit code -9)" in capsys.readouterr().out
    assert sorted(started) == sorted(run.key for run in runs)
    assert not place.result(runs[1]).exists()

    started = commands(monkeypatch)
    assert runner.take(place, size, runs, "corpus", jobs=2) == 0
    assert started == [runs[1].key]
    found = json.loads(place.result(runs[1]).read_text())
    assert found["final"] == 2.5
    assert found["kinds"]["plain"]["steps"] == 1
    assert not list(place.work.iterdir())

    started = commands(monkeypatch)
    assert runner.take(place, size, runs, "corpus", jobs=1) == 0
    assert started == []


def test_kept_results_count_as_taken_and_change_none_that_is_there(
    place: runner.Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    size = plan.scaled(plan.SIZES["toy"], steps=100)
    runs = plan.full_plan(size)[:3]
    commands(monkeypatch)
    runner.take(place, size, runs, "corpus", jobs=1)
    kept = tmp_path / "kept.json"
    runner.keep(runner.read_all(place.runs), [], kept)

    own = {**runner.read(place.result(runs[1])), "final": 9.0}
    place.result(runs[0]).unlink()
    place.result(runs[1]).write_text(json.dumps(own))
    runner.take_over(place, kept, size)
    assert runner.read(place.result(runs[0]))["final"] == 2.5
    assert runner.read(place.result(runs[1]))["final"] == 9.0
    started = commands(monkeypatch)
    assert runner.take(place, size, runs, "corpus", jobs=1) == 0
    assert started == []
    with pytest.raises(runner.RunError, match="other settings"):
        runner.take(place, size, runs, "another corpus", jobs=1)
    with pytest.raises(runner.RunError, match="another size than 17m"):
        runner.take_over(place, kept, plan.SIZES["17m"])


def test_a_result_of_other_settings_is_neither_used_nor_lost(
    place: runner.Place, monkeypatch: pytest.MonkeyPatch
):
    size = plan.scaled(plan.SIZES["toy"], steps=100)
    (run,) = plan.full_plan(size)[:1]
    commands(monkeypatch)
    runner.take(place, size, [run], "corpus", jobs=1)
    before = place.result(run).read_text()
    for other_size, other_run, corpus in (
        (size, replace(run, lr=1e-2), "corpus"),
        (plan.scaled(size, micro_batch=8), run, "corpus"),
        (size, run, "another corpus"),
    ):
        with pytest.raises(runner.RunError, match="other settings"):
            runner.take(place, other_size, [other_run], corpus, jobs=1)
    assert place.result(run).read_text() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"final": 1}'])
def test_a_damaged_result_is_named(place: runner.Place, content: str):
    size = plan.SIZES["toy"]
    (run,) = plan.full_plan(size)[:1]
    place.result(run).parent.mkdir(parents=True)
    place.result(run).write_text(content)
    for use in (
        lambda: runner.finished(place, size, run, "corpus"),
        lambda: runner.read_all(place.runs),
    ):
        with pytest.raises(runner.RunError, match=r"runs/shuffled/uniform/1\.json: .*remove it"):
            use()


def test_a_run_that_another_command_takes_is_left_to_it(
    place: runner.Place, monkeypatch: pytest.MonkeyPatch
):
    import fcntl

    size = plan.SIZES["toy"]
    runs = plan.full_plan(size)[:2]
    started = commands(monkeypatch)
    place.folder(runs[0]).mkdir(parents=True)
    with open(place.folder(runs[0]) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runner.take(place, size, runs, "corpus", jobs=1) == 0
    assert started == [runs[1].key]


def test_what_the_weights_were_is_averaged_by_quarter_of_the_weighted_steps():
    run = plan.Run("shuffled", "head", 1, "", 10, 1e-3)  # weighted from step 3
    lines = [
        {
            "iteration": i,
            "effective_sample_size": i / 10,
            "domain_weight": {"books": 1.5, "shuffled_books": 0.5},
            "domain_samples": {"books": 2, "shuffled_books": 6},
            "score_correlation": 0.5,
            "gate": 1.0,
            **({"meta_loss": 2.0} if i in (3, 9) else {}),
        }
        for i in range(1, 11)
    ]
    found = runner.of_weights(lines, run)
    assert found["useful"] == [0.5] * 4  # 3 of 6
    assert found["useful_weight"] == [1.5] * 4
    assert found["effective"] == [0.35, 0.55, 0.75, 0.95]
    assert found["correlation"] == [0.5, None, None, 0.5]
    assert runner.of_weights([], run) == {}


# ------------------------------------------------------------------------------ the command


def command_line(*words: str) -> tuple[int, str]:
    import subprocess

    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "quality.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--only", "z"], "--only z"),
        (["--variant", "x"], "--variant 'x'"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--steps", "5"], "--steps is 5"),
        (["--micro-batch", "5"], "--micro-batch is 5"),
        (["--lr", "nan"], "--lr is nan"),
        (["--table"], "no results in"),
        (["--timing", "--jobs", "2"], "--timing goes with none"),
        (["--known", __file__], "test_quality.py: JSONDecodeError"),
        (["--corpus", "/nonexistent"], "--corpus /nonexistent lacks"),
    ],
)
def test_bad_input_is_named_in_one_line(words: list[str], named: str, tmp_path: Path):
    code, said = command_line(*words, "--out", str(tmp_path))
    assert code == 2
    assert named in said
    assert len(said.splitlines()) == 1
