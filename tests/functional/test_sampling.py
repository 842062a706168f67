"""Documents drawn by weight in real runs: what every rank reads is what the plan says.

The expected samples are computed here, from the weight files and the history of changes, by
`epoch_plan` alone; the runs go through the trainer, its samplers, checkpoints and data loaders.
What these tests do not exercise: data loaders of several nodes, file systems that are not shared.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.data.epoch_plan import Corpus, first_segment, next_segment
from megatron_dwm.data.index import read_index
from megatron_dwm.data.weight_file import read_weights, write_weights
from tests.functional.corpus import write_dataset
from tests.functional.harness import TINY, Results, Run, run_all

VPP = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
DEEP = "--num-layers 4"
BATCH, SEQUENCE, SEED = 4, 32, 1234
STEPS = 30  # of a run that is not cut short
DOCUMENTS = 20


def words(data: list[str], folder: Path, more: str = "") -> list[str]:
    """Returns the flags of a run on `data` (as for --data-path)."""
    kept = [w for w in TINY if w != "--untie-embeddings-and-output-weights"]
    at = kept.index("--split")
    del kept[at : at + 2]
    return [
        *kept,
        *f"--train-iters {STEPS} --eval-iters 0 --micro-batch-size 1 --split 100,0,0".split(),
        *f"--global-batch-size {BATCH} --num-layers 2 --dwm --dwm-policy uniform".split(),
        *f"--dwm-sampling weights --data-cache-path {folder / 'cache'} --data-path".split(),
        *data,
        *more.split(),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sampling")


def weigh(prefix: str, seed: int | None, path: Path | None = None, **domains) -> Path:
    """Writes random weights (None: equal ones) beside a data set, or elsewhere."""
    index = read_index(prefix)
    rng = np.random.default_rng(seed)
    weights = np.ones(index.documents) if seed is None else rng.random(index.documents) + 0.05
    target = path or Path(f"{prefix}.weights")
    write_weights(target, weights.astype(np.float32), index, **domains)
    return target


def bad(data: dict[str, str]) -> list[tuple[str, list[str], str, str]]:
    """Returns (name, data, flags, what the one line says) of runs that are refused."""
    other, twice = data["unweighted"], [data["equal"], data["equal"]]
    return [
        (
            "missing",
            [other],
            "",
            f"{other}.weights: no such file; make it with megatron-dwm weights",
        ),
        ("foreign", [data["foreign"]], "", f"{data['foreign']}.weights: "),
        ("shares", [data["equal"], data["chain"], data["live"]], "", "needs a share before each"),
        ("twice", ["1", twice[0], "1", twice[1]], "", "more than once"),
        ("cyclic", [data["equal"]], "--dataloader-type cyclic", "--dataloader-type cyclic"),
        (
            "both",
            [data["equal"]],
            "--dwm-sampling stock --dwm-sampling-max-repeats 2",
            "--dwm-sampling-max-repeats is about drawn documents; add --dwm-sampling weights",
        ),
    ]


def corpora(folder: Path) -> dict[str, str]:
    """Writes a data set for every chain of runs, as each changes its weights."""
    found = {}
    for k, name in enumerate(("equal", "chain", "live", "stopped", "layouts", "alone", "other")):
        found[name] = write_dataset(folder / name, k, DOCUMENTS)
        weigh(found[name], None if name == "equal" else k)
    found["unweighted"] = write_dataset(folder / "unweighted", 50, DOCUMENTS)
    found["foreign"] = write_dataset(folder / "foreign", 51, DOCUMENTS + 1)
    Path(f"{found['foreign']}.weights").write_bytes(Path(f"{found['equal']}.weights").read_bytes())
    for k, name in enumerate(("a", "b", "c")):
        found[name] = write_dataset(folder / name, 60 + k, DOCUMENTS)
        weigh(found[name], 60 + k)
    # The same documents and weights under two names.
    for ending in ("idx", "bin", "weights"):
        source = Path(f"{found['live']}.{ending}")
        Path(f"{found['stopped']}.{ending}").write_bytes(source.read_bytes())
    return found


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    return corpora(folder)


@pytest.fixture(scope="module")
def results(folder: Path, data: dict[str, str]) -> dict[int, list[Results]]:
    """Takes all runs: on two ranks, then on one (which resumes what the two began), then on two."""
    news = {
        name: weigh(data["chain"], 100 + k, folder / f"{name}.weights")
        for k, name in enumerate(("second", "third"))
    }
    live = weigh(data["live"], 200, folder / "live_second.weights")
    weigh(data["stopped"], 200, folder / "stopped_second.weights")
    numbers = [0] * 10 + [1] * 10
    weigh(data["layouts"], 7, domains=np.array(numbers, np.int32), domain_names=["good", "bad"])

    def saved(name: str, more: str) -> str:
        return f"--save {folder / name} --load {folder / name} --save-interval 3 {more}"

    def exits(after: int, load: str, save: str) -> str:
        words = f"--load {folder / load} --save {folder / save} --save-interval 50"
        return f"{words} --exit-interval {after}"

    pair = ["0.6", data["a"], "0.4", data["b"]]
    (folder / "a_first.weights").write_bytes(Path(f"{data['a']}.weights").read_bytes())
    weigh(data["a"], 300, folder / "a_second.weights")
    chain, target = [data["chain"]], Path(f"{data['chain']}.weights")
    blend = ["0.7", data["layouts"], "0.3", data["alone"]]
    learned = "--dwm-policy learned --dwm-form model --dwm-rule chain --dwm-schedule joint "
    learned += "--dwm-num-layers 1 --dwm-hidden-size 64 "
    learned += f"--dwm-meta-batch-size 4 --dwm-meta-data-path {data['other']} --train-iters 6 "
    out = folder / "out"
    out.mkdir()

    def runs(ranks: int, wanted: list[Run], part: str) -> Results:
        (out / part).mkdir()
        return run_all(ranks, wanted, out / part)

    two_stages = "--dwm-stages 2 --train-iters 8 --dwm-policy uniform"
    first = runs(
        2,
        [
            Run("equal", words([data["equal"]], folder)),
            # Killed after step 5, saved at step 3.
            Run("chain-1", words(chain, folder, saved("c", "")), {"KILL_AT": "5"}),
            Run(
                "chain-2",
                words(chain, folder, saved("c", "")),
                {"KILL_AT": "8", "REPLACE": f"7:{news['second']}:{target}"},
            ),
            Run(
                "live",
                words([data["live"]], folder, saved("l", two_stages)),
                {"REPLACE": f"2:{live}:{data['live']}.weights"},
            ),
            Run(
                "stopped-1",
                words([data["stopped"]], folder, saved("s", two_stages + " --exit-interval 4")),
                {"REPLACE": f"4:{folder / 'stopped_second.weights'}:{data['stopped']}.weights"},
            ),
            Run("stopped-2", words([data["stopped"]], folder, saved("s", two_stages))),
            Run("dp2", words(blend, folder, f"{learned} --save {folder / 'd'} --save-interval 9")),
            Run("pp2", words(blend, folder, f"{learned} --pipeline-model-parallel-size 2")),
            Run("tp2", words(blend, folder, f"{learned} --tensor-model-parallel-size 2")),
            Run("workers", words(blend, folder, f"{learned} --num-workers 2")),
            # Weights of one of two data sets change at a stage; the one run is not stopped.
            Run(
                "blend-live",
                words(pair, folder, f"{VPP} {two_stages}"),
                {"REPLACE": f"2:{folder / 'a_second.weights'}:{data['a']}.weights"},
            ),
            # A run that began in Megatron's own order.
            Run(
                "stock",
                words([data["c"]], folder, f"{VPP} --dwm-sampling stock {exits(2, 'v', 'v')}"),
            ),
            Run("stock-on", words([data["c"]], folder, f"{VPP} {exits(6, 'v', 'v')}")),
            Run("another-seed", words([data["c"]], folder, f"{VPP} --seed 5 {saved('v', '')}")),
            *(Run(name, words(prefixes, folder, more)) for name, prefixes, more, _ in bad(data)),
        ],
        "first",
    )
    # One rank: another data-parallel size, and new weights in the middle of an epoch.
    then = runs(
        1,
        [
            Run(
                "chain-3",
                words(chain, folder, saved("c", "")),
                {"KILL_AT": "10", "REPLACE": f"9:{news['third']}:{target}"},
            ),
        ],
        "then",
    )
    Path(f"{data['a']}.weights").write_bytes((folder / "a_first.weights").read_bytes())
    last = runs(
        2,
        [
            # Stopped where the weights change, each time with another folder to save to.
            Run(
                "blend-1",
                words(pair, folder, f"{DEEP} {two_stages} {exits(4, 'b1', 'b1')}"),
                {"REPLACE": f"4:{folder / 'a_second.weights'}:{data['a']}.weights"},
            ),
            Run("blend-2", words(pair, folder, f"{DEEP} {two_stages} {exits(6, 'b1', 'b2')}")),
            Run("blend-3", words(pair, folder, f"{DEEP} {two_stages} {exits(99, 'b2', 'b2')}")),
            Run("chain-4", words(chain, folder, saved("c", ""))),
            Run(
                "forgotten",
                [*words(chain, folder, saved("c", "")), "--dwm-sampling", "stock"],
            ),
        ],
        "last",
    )
    return {"first": first, "then": then, "last": last}


def read(results: Results, name: str) -> dict[int, list]:
    """Returns (documents, tokens) of what all ranks read, by step, in no particular order."""
    found: dict[int, list] = {}
    for rank in results.succeeded(name):
        first = rank["steps"][0][0]
        for step, ids, tokens in rank["documents"]:
            found.setdefault(first - 1 + step, []).append((tuple(ids), tuple(tokens)))
    return {step: sorted(samples) for step, samples in found.items()}


class Expected:
    """The samples that a data set's history of weights makes."""

    def __init__(self, prefix: str) -> None:
        self.index = read_index(prefix)
        lengths = np.asarray(self.index.sequence_lengths)
        self.first_tokens = np.cumsum(lengths) - lengths
        self.corpus = Corpus(prefix, lengths, 0, len(lengths), SEQUENCE, True, SEED)
        self.tokens = np.fromfile(f"{prefix}.bin", dtype=self.index.dtype)
        self.segment = None

    def use(self, path: Path | str, position: int = 0) -> None:
        weights = np.asarray(read_weights(path, self.index).weights)
        if self.segment is None:
            self.segment = first_segment(self.corpus, weights, STEPS * BATCH)
        else:
            self.segment = next_segment(self.segment, weights, STEPS * BATCH, position)

    def step(self, number: int) -> list:
        """Returns the samples of a step (from 1), sorted."""
        found = []
        for position in range((number - 1) * BATCH, number * BATCH):
            ids: list[int] = []
            tokens: list[int] = []
            for document, start, count in self.segment.parts(self.segment.row(position)):
                begin = self.first_tokens[document] + start
                ids += [document] * count
                tokens += self.tokens[begin : begin + count].tolist()
            found.append((tuple(ids[:SEQUENCE]), tuple(tokens[:SEQUENCE])))
        return sorted(found)


def test_equal_weights_read_every_document_once_an_epoch(results, data) -> None:
    found, expected = read(results["first"], "equal"), Expected(data["equal"])
    expected.use(f"{data['equal']}.weights")
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, samples in found.items():
        assert samples == expected.step(step), step
    epoch = expected.segment.sample_bounds[1] // BATCH
    assert epoch < STEPS
    counts = np.zeros(DOCUMENTS, dtype=int)
    for step in range(1, epoch + 1):
        for ids, _ in found[step]:
            counts += np.bincount(ids, minlength=DOCUMENTS)
    assert (counts <= expected.corpus.lengths).all()
    # All but what does not fill a batch.
    assert expected.corpus.lengths.sum() - counts.sum() < (BATCH + 1) * SEQUENCE


def test_killed_and_resumed_with_new_weights_in_between(results, data, folder) -> None:
    """Three kills, two changes of the weights, another number of ranks: the plan is followed."""
    expected = Expected(data["chain"])
    original = weigh(data["chain"], 1, folder / "original.weights")
    expected.use(original)
    parts = [read(results["first"], "chain-1"), read(results["first"], "chain-2")]
    assert sorted(parts[0]) == [1, 2, 3, 4, 5]
    # From the checkpoint of step 3 on; the file that came after step 7 waits for the next start.
    assert sorted(parts[1]) == [4, 5, 6, 7, 8]
    for found in parts:
        for step, samples in found.items():
            assert samples == expected.step(step), step
    # On one rank, from step 6 on, by the second weights; killed after step 10.
    expected.use(folder / "second.weights", 6 * BATCH)
    found = read(results["then"], "chain-3")
    assert sorted(found) == [7, 8, 9, 10]
    for step, samples in found.items():
        assert samples == expected.step(step), step
    # On two again, from step 9 on, by the third weights, to the end.
    expected.use(folder / "third.weights", 9 * BATCH)
    found = read(results["last"], "chain-4")
    assert sorted(found) == list(range(10, STEPS + 1))
    for step, samples in found.items():
        assert samples == expected.step(step), step


def test_weights_that_change_at_a_stage_are_taken_over(results, data) -> None:
    """In the running process as by a run that is stopped there and resumed."""
    live = read(results["first"], "live")
    stopped = {**read(results["first"], "stopped-1"), **read(results["first"], "stopped-2")}
    assert sorted(live) == sorted(stopped) == list(range(1, 9))
    assert live == stopped
    out = results["first"].succeeded("live")[0]["stdout"]
    assert f"{data['live']} is drawn by new weights from its sample 16 on" in out
    losses = [*results["first"].losses("stopped-1"), *results["first"].losses("stopped-2")]
    ours = results["first"].losses("live")
    assert [x[2] for x in ours] == pytest.approx([x[2] for x in losses], rel=1e-6)


def test_every_layout_and_loader_reads_the_same(results) -> None:
    first = results["first"]
    reference = read(first, "dp2")
    assert sorted(reference) == list(range(1, 7))
    for name in ("pp2", "tp2"):
        found = first.succeeded(name)
        for rank in found:
            by_step: dict[int, list] = {}
            for step, ids, tokens in rank["documents"]:
                by_step.setdefault(step, []).append((tuple(ids), tuple(tokens)))
            if by_step:
                assert {k: sorted(v) for k, v in by_step.items()} == reference
        assert any(rank["documents"] for rank in found)
    assert read(first, "workers") == reference
    assert first.losses("workers") == first.losses("dp2")


def ranks_agree(results: Results, name: str) -> dict[int, list]:
    """Returns what was read, after checking that every rank with data read the same."""
    found: list[dict[int, list]] = []
    for rank in results.succeeded(name):
        first = rank["steps"][0][0]
        by_step: dict[int, list] = {}
        for step, ids, tokens in rank["documents"]:
            by_step.setdefault(first - 1 + step, []).append((tuple(ids), tuple(tokens)))
        if by_step:
            found.append({step: sorted(samples) for step, samples in by_step.items()})
    assert len(found) == 2
    assert found[0] == found[1]
    return found[0]


def test_blend_changes_at_a_stage_of_a_virtual_pipeline(results) -> None:
    """As two ranks that are stopped there, and again later, and save somewhere else each time."""
    live = ranks_agree(results["first"], "blend-live")
    stopped = {}
    for name in ("blend-1", "blend-2", "blend-3"):
        stopped.update(read(results["last"], name))
    assert sorted(live) == sorted(stopped) == list(range(1, 9))
    assert live == stopped


def test_run_that_began_in_megatrons_order(results, data) -> None:
    """Both ends of a virtual pipeline go on with the same samples, by weight."""
    found, expected = ranks_agree(results["first"], "stock-on"), Expected(data["c"])
    weights = np.asarray(read_weights(f"{data['c']}.weights", expected.index).weights)
    expected.segment = first_segment(expected.corpus, weights, STEPS * BATCH, start=2 * BATCH)
    assert sorted(found) == [3, 4, 5, 6]
    for step, samples in found.items():
        assert samples == expected.step(step), step
    assert "count as unseen" in results["first"]["stock-on"][0]["stdout"]


def test_another_seed_on_resume_is_refused(results) -> None:
    assert all(rank["code"] == 2 for rank in results["first"]["another-seed"])
    error = results["first"]["another-seed"][0]["stderr"]
    assert "--seed was 1234 and is 5" in error
    assert "--dwm-sampling-draws was" not in error


def test_log_has_the_domains_of_the_weight_files(results, folder) -> None:
    results["first"].succeeded("dp2")
    lines = [json.loads(x) for x in (folder / "d" / "dwm_log.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line["domain_samples"]}
    # The second data set of the blend has no domains: it is one by itself.
    assert names == {"good", "bad", "alone"}
    for line in lines:
        assert sum(line["domain_samples"].values()) == BATCH


def test_resuming_without_the_flag_is_refused(results) -> None:
    for rank in results["last"]["forgotten"]:
        assert rank["code"] == 2
    assert "draws documents by weight; resume it with" in results["last"]["forgotten"][0]["stderr"]


@pytest.mark.parametrize("k", range(6))
def test_bad_input_is_one_clear_line(results, data, k) -> None:
    name, _, _, message = bad(data)[k]
    for rank in results["first"][name]:
        assert rank["code"] == 2, rank["stderr"][-2000:]
    lines = results["first"][name][0]["stderr"].strip().splitlines()
    errors = [line for line in lines if line.startswith("megatron_dwm: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
