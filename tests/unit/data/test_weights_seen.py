"""What a run keeps of its documents, and the weight files that are made of it."""

import numpy as np
import pytest

from megatron_dwm.cli import weights as command
from megatron_dwm.data import weights_seen
from megatron_dwm.data.document_weights import ranks_of
from megatron_dwm.data.index import read_index
from megatron_dwm.data.weight_file import read_weights
from megatron_dwm.data.weights_from_run import weights_of_documents, write_from_run
from megatron_dwm.data.weights_seen import DocumentWeightsSeen
from megatron_dwm.errors import DWMError
from tests.functional.corpus import write_dataset


@pytest.fixture
def samples():
    """Documents of each token, data set and weight of 40 samples, in no order."""
    rng = np.random.default_rng(3)
    ids = rng.integers(-1, 30, size=(40, 8))
    return ids, rng.integers(0, 2, size=40), rng.random(40)


def by_hand(samples):
    tokens, weighted = np.zeros((2, 30)), np.zeros((2, 30))
    for row, k, weight in zip(*samples, strict=True):
        for document in row:
            if document >= 0:
                tokens[k, document] += 1
                weighted[k, document] += weight
    return tokens, weighted


def filled(samples, part=slice(None), prefixes=("a", "b")):
    seen = DocumentWeightsSeen(list(prefixes))
    ids, sets, weights = (values[part] for values in samples)
    for row, k, weight in zip(ids, sets, weights, strict=True):
        seen.add(row[None], np.array([k]), np.array([weight]))
    return seen


def padded(sums):
    return np.pad(sums, (0, 30))[:30]


def test_each_token_counts_at_the_weight_of_its_sample(samples):
    seen, (tokens, weighted) = filled(samples), by_hand(samples)
    at_once = DocumentWeightsSeen(["a", "b"])
    at_once.add(*samples)
    for k in range(2):
        assert np.array_equal(padded(seen.tokens[k]), tokens[k])
        assert np.allclose(padded(seen.weighted[k]), weighted[k], rtol=1e-12)
        assert np.allclose(padded(at_once.weighted[k]), weighted[k], rtol=1e-12)
    assert seen.shares() == pytest.approx(list(tokens.sum(1) / tokens.sum()))


def test_ranks_are_added_up_and_a_resumed_run_goes_on(tmp_path, samples):
    tokens, weighted = by_hand(samples)
    run = str(tmp_path)
    for rank, part in enumerate((slice(0, 11), slice(11, 25))):
        filled(samples, part).save(run, 7, rank, 2)
    resumed = DocumentWeightsSeen(["a", "b"])
    resumed.load(run, 7)
    rest = tuple(values[25:] for values in samples)
    resumed.add(*rest)
    resumed.save(run, 9, 0, 1)
    whole = weights_seen.read(run, 9)
    for k in range(2):
        assert np.array_equal(padded(whole.tokens[k]), tokens[k])
        assert np.allclose(padded(whole.weighted[k]), weighted[k], rtol=1e-12)
    assert weights_seen.iterations(run) == [7, 9]


def test_what_belongs_to_no_checkpoint_any_more_is_removed(tmp_path, samples):
    for iteration in (3, 5, 7):
        filled(samples).save(str(tmp_path), iteration, 0, 1)
    (tmp_path / "iter_0000005").mkdir()
    weights_seen.make_room(str(tmp_path), 9)
    assert weights_seen.iterations(str(tmp_path)) == [5]


def test_an_earlier_save_of_the_same_iteration_counts_no_more(tmp_path, samples):
    """A run of two ranks that was killed in its save goes on on one."""
    run = str(tmp_path)
    for rank in range(2):
        filled(samples).save(run, 7, rank, 2)
    weights_seen.make_room(run, 7)
    assert weights_seen.iterations(run) == []
    filled(samples).save(run, 7, 0, 1)
    assert np.array_equal(weights_seen.read(run, 7).tokens[0], filled(samples).tokens[0])


def test_a_set_with_a_rank_missing_is_not_taken(tmp_path, samples):
    run = str(tmp_path)
    filled(samples).save(run, 3, 0, 1)
    filled(samples).save(run, 7, 1, 2)
    assert weights_seen.iterations(run) == [3]
    with pytest.raises(DWMError, match="files of 1 ranks, but 2 were to write one"):
        weights_seen.read(run, 7)


def test_what_cannot_be_read_is_one_line(tmp_path, samples):
    with pytest.raises(DWMError, match="--dwm-document-weights"):
        weights_seen.read(str(tmp_path), 1)
    filled(samples).save(str(tmp_path), 1, 0, 1)
    with pytest.raises(DWMError, match="is of the data a, b, not of a, c"):
        DocumentWeightsSeen(["a", "c"]).load(str(tmp_path), 1)
    path = tmp_path / weights_seen.FOLDER / "iter_0000001" / "rank_0.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DWMError, match="rank_0.npz: damaged"):
        weights_seen.read(str(tmp_path), 1)


def test_a_visit_counts_against_the_mean_of_the_data_set():
    tokens, weighted = np.array([100.0, 0, 300]), np.array([150.0, 0, 150])
    found, mean = weights_of_documents(tokens, weighted, 5, prior=100)
    assert mean == pytest.approx(0.75)
    assert found == pytest.approx([225 / 200, 0.75, 225 / 400, 0.75, 0.75])
    assert weights_of_documents(np.zeros(0), np.zeros(0), 2, 100)[0].tolist() == [1.0, 1.0]


def test_shares_follow_the_means_of_the_data_sets(tmp_path):
    prefixes = [write_dataset(tmp_path / name, k, 10) for k, name in enumerate("ab")]
    seen = DocumentWeightsSeen(prefixes)
    seen.add(np.full((6, 4), 2), np.array([0, 0, 1, 1, 1, 1]), np.array([2, 1, 0.5, 0.5, 0, 1.0]))
    outputs = [f"{prefix}.weights" for prefix in prefixes]
    found = write_from_run(seen, prefixes, outputs, [0.5, 0.5], 100)
    assert [one.mean for one in found] == [1.5, 0.5]
    assert [one.share for one in found] == [0.75, 0.25]
    assert [one.seen for one in found] == [0.1, 0.1]
    assert read_weights(outputs[0], read_index(prefixes[0])).weights[0] == np.float32(1.5)


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path):
        prefix = write_dataset(tmp_path / "data", 1, 10)
        seen = DocumentWeightsSeen([prefix])
        seen.add(np.arange(8)[None], np.array([0]), np.array([0.5]))
        seen.save(str(tmp_path / "run"), 4, 0, 1)
        return tmp_path / "run", prefix

    def test_it_makes_the_files_of_the_runs_own_data(self, run, capsys):
        folder, prefix = run
        assert command.main(["from-run", str(folder)]) == 0
        assert read_weights(f"{prefix}.weights").documents == 10
        out = capsys.readouterr().out
        assert "read 80.0% of" in out and "--data-path" not in out  # one data set has no shares

    @pytest.mark.parametrize(
        ("words", "part"),
        [
            (["{run}", "--iteration", "3"], "of iteration 3 of all ranks; found 4"),
            (["{run}x"], "no document weights of all ranks; found none"),
            (["{run}", "{prefix}", "{prefix}"], "PREFIX: 2 given, but the run has read 1"),
            (["{run}", "--shares", "1", "2"], "--shares: 2 given"),
            (["{run}", "--shares", "-1"], "--shares -1.0: must be finite"),
            (["{run}", "--shares", "0"], "--shares 0.0: must be finite and at least 0, one"),
            (["{run}", "--prior-tokens", "0"], "--prior-tokens 0: must be above 0"),
            (["{run}", "{small}"], "has 3 documents, but the run has read its document 7"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, run, tmp_path, capsys, words, part):
        small = write_dataset(tmp_path / "small", 2, 3)
        places = {"run": run[0], "prefix": run[1], "small": small}
        assert command.main(["from-run", *(word.format(**places) for word in words)]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and part in error[0]


def test_ranks_are_places_among_all_tokens():
    """Documents of 1, 2 and 3 tokens in one data set, 4 in another, numbers 5, 1, 1 and 9."""
    numbers = [np.array([5.0, 1.0, 1.0]), np.array([9.0])]
    tokens = [np.array([1, 2, 3]), np.array([4])]
    ranks = ranks_of(numbers, tokens, 4)
    assert ranks(numbers[0]).tolist() == pytest.approx([0.55, 0.25, 0.25])
    assert ranks(numbers[1]).tolist() == pytest.approx([0.8])


def test_many_numbers_have_places_to_within_a_row():
    rng = np.random.default_rng(1)
    numbers, tokens = rng.lognormal(size=20_000), rng.integers(1, 50, 20_000)
    exact = ranks_of([numbers], [tokens], 20_000)
    few = ranks_of([numbers], [tokens], 500)
    assert len(exact.values) == 20_000 and len(few.values) <= 500
    assert np.abs(few(numbers) - exact(numbers)).max() < 1 / 500
