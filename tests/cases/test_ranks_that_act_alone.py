"""What one rank does alone, or sees alone: no other rank waits for it, and all decide alike.

Real runs on two ranks, which are not ended when one of them fails (as with srun): a rank that
waited would do so until the timeout, and have another exit code. Files are put where folders should
be, as a test may run as root, who may write everywhere.

NOT exercised: file systems that are not shared, but for a rank that does not see some files; NCCL.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.data.index import read_index
from megatron_dwm.data.weight_file import read_weights
from tests.functional.corpus import write_dataset
from tests.functional.harness import ROOT, Results, Run, run_all
from tests.functional.test_sampling import BATCH, DOCUMENTS, Expected, weigh, words

pytestmark = pytest.mark.timeout(900)

TP2, STEPS = "--tensor-model-parallel-size 2", 8
STAGES = f"--dwm-stages 2 --train-iters {STEPS} --distributed-timeout-minutes 3"
# Name of the run -> what its one line says.
ALONE = {
    "history": ["cannot be copied there", "give another --save"],
    "current": ["cannot be copied there", "give another --save"],
    "unshared": ["rank 1: ", "is not what rank 0 has read", "does not see the same files"],
    "foreign": ["needs Megatron's GPTDataset", "training data is Subset"],
    "snapshot": ["dwm_stage_001 cannot be written", "another --save"],
    "swap": ["dwm_stage_001 cannot be written", "another --save"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    """Writes data sets of the same documents and first weights, as runs change their weights."""
    found = {name: write_dataset(folder / name, 3, DOCUMENTS) for name in ("few", "all", "other")}
    for prefix in found.values():
        weigh(prefix, 1)
    weigh(found["few"], 2, folder / "second.weights")
    return found


def digest(path: Path | str, prefix: str) -> str:
    return read_weights(path, read_index(prefix)).digest


@pytest.fixture(scope="module")
def results(folder: Path, data: dict[str, str]) -> Results:
    second, few = folder / "second.weights", data["few"]
    tp2 = f"{TP2} {STAGES}"

    def replaced(name: str) -> dict[str, str]:
        return {"REPLACE": f"2:{second}:{data[name]}.weights"}

    def saves(name: str, more: str = "") -> list[str]:
        save = f"--save {folder / name} --save-interval 50"
        return words([data["other"]], folder, f"{STAGES} {save} {more}")

    head = "--dwm-policy learned --dwm-meta-batch-size 4 --dwm-schedule staged "
    head += f"--dwm-meta-data-path {few}"
    for name, place in (
        # In the place of the run's weight files, of a snapshot that is written, of an older one.
        ("current", "dwm_weights"),
        ("snapshot", ".dwm_stage_001.new"),
        ("swap", "dwm_stage_001"),
    ):
        (folder / name).mkdir()
        (folder / name / place).write_text("in the way")
    # The weights of the run that is resumed cannot be copied, those of today can.
    first = digest(f"{data['other']}.weights", data["other"])
    (folder / "history" / "dwm_weights" / f"{first}.weights.tmp").mkdir(parents=True)
    resumed = f"--load {folder / 'begun'}"
    begun = saves("begun", "--exit-interval 2")
    runs = [
        Run("data-ranks", words([few], folder, tp2), {**replaced("few"), "DATA_RANKS": "1"}),
        Run("all-ranks", words([data["all"]], folder, tp2), replaced("all")),
        Run("current", saves("current")),
        Run("unshared", saves("unshared"), {"UNSHARED": "1"}),
        Run("snapshot", saves("snapshot", head)),
        Run("swap", saves("swap", head)),
        Run("begun", begun, {"REPLACE": f"2:{second}:{data['other']}.weights"}),
        Run("history", saves("history", resumed)),
        Run("foreign", saves("foreign", TP2), {"DATA_RANKS": "1", "FOREIGN": "1"}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_SCRIPT", str(ROOT / "tests" / "cases" / "_pretrain_alone.py"))
        return run_all(2, runs, folder)


def test_new_weights_at_a_stage_with_a_provider_of_data_ranks(
    results: Results, data: dict[str, str], folder: Path
) -> None:
    """Under tensor parallelism only rank 0 calls the provider, and both take the new weights over.

    What is read is what the plan says, and losses are those of a provider that all ranks call.
    """
    first, second = results.succeeded("data-ranks")
    assert first["steps"] == second["steps"] and len(first["steps"]) == STEPS
    assert first["documents"] and not second["documents"]
    expected = Expected(data["few"])
    expected.use(weigh(data["few"], 1, folder / "first.weights"))
    for step in range(1, STEPS + 1):
        if step == STEPS // 2 + 1:
            expected.use(folder / "second.weights", STEPS // 2 * BATCH)
        found = [(tuple(ids), tuple(t)) for k, ids, t in first["documents"] if k == step]
        assert sorted(found) == expected.step(step), step
    line = f"{data['few']} is drawn by new weights from its sample {STEPS // 2 * BATCH} on"
    assert line in first["stdout"]
    everywhere = results.succeeded("all-ranks")
    assert [rank["steps"] for rank in everywhere] == [first["steps"], second["steps"]]
    assert [rank["parameters"] for rank in everywhere] == [
        rank["parameters"] for rank in (first, second)
    ]


@pytest.mark.parametrize("name", ALONE)
def test_what_one_rank_meets_ends_all_with_one_line(results: Results, name: str) -> None:
    results.succeeded("begun")
    found = results[name]
    assert [rank["code"] for rank in found] == [2, 2], found[0]["stderr"][-2000:]
    errors = [x for r in found for x in r["stderr"].splitlines() if "megatron_dwm: error" in x]
    assert len(errors) == 1 and all(word in errors[0] for word in ALONE[name]), errors
    assert all("Traceback" not in rank["stderr"] for rank in found)
