"""The meta set's order: a function of the position, whatever the partition over ranks."""

import pytest
import torch

from megatron_dwm.data.meta_dataset import MetaData

LENGTH, BATCH = 30, 24


class Numbers:
    """A data set whose samples say where they come from."""

    def __init__(self, length, name=0):
        self.length, self.name = length, name

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert type(index) is int and 0 <= index < self.length
        return {"tokens": torch.tensor([self.name, index])}


def meta(micro=1, rank=0, size=1, datasets=None, weights=None, batch=BATCH, seed=1234):
    datasets = [Numbers(LENGTH)] if datasets is None else datasets
    return MetaData(datasets, weights, batch, micro, rank, size, seed)


def global_order(parts):
    """Puts the micro-batches of all ranks together: micro-batch by micro-batch, rank by rank."""
    batches = [part.next_batches() for part in parts]
    order = []
    for k in range(parts[0].num_microbatches):
        for of_rank in batches:
            order += [tuple(sample) for sample in of_rank[k]["tokens"].tolist()]
    return order


def stream(data, start, count):
    return [tuple(data.sample(i)["tokens"].tolist()) for i in range(start, start + count)]


SOURCES = pytest.mark.parametrize(
    ("lengths", "weights"), [([LENGTH], None), ([10, 50], [0.25, 0.75])], ids=["one", "blend"]
)


class TestPartitions:
    @SOURCES
    @pytest.mark.parametrize(
        ("micro", "size"), [(1, 1), (24, 1), (2, 3), (3, 2), (1, 8), (4, 6), (12, 2)]
    )
    def test_every_partition_gives_the_same_global_batches(self, lengths, weights, micro, size):
        """So the data-parallel size may change between two runs, and a batch stays that batch."""
        make = lambda *a: meta(*a, [Numbers(n, i) for i, n in enumerate(lengths)], weights)  # noqa: E731
        parts = [make(micro, rank, size) for rank in range(size)]
        assert all(part.num_microbatches == BATCH // (micro * size) for part in parts)
        found = [global_order(parts) for _ in range(4)]
        assert found == [stream(make(1, 0, 1), BATCH * k, BATCH) for k in range(4)]

    def test_each_micro_batch_is_collated(self):
        batches = meta(micro=4, size=2).next_batches()
        assert len(batches) == 3
        assert all(batch["tokens"].shape == (4, 2) for batch in batches)

    def test_ranks_without_data_get_none_and_keep_the_position(self):
        """The position is part of every rank's checkpoint."""
        data = meta(datasets=[])
        assert data.next_batches() is None
        assert data.state_dict() == {"consumed_samples": BATCH}


class TestEpochs:
    def test_every_epoch_is_a_permutation_and_each_another_one(self):
        epochs = [stream(meta(), LENGTH * k, LENGTH) for k in range(4)]
        everything = [(0, i) for i in range(LENGTH)]
        assert all(sorted(epoch) == everything for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert everything not in epochs

    def test_batches_run_over_the_end_of_an_epoch(self):
        """24 of 30 samples a batch: five batches are four epochs, nothing lost or doubled."""
        data, drawn = meta(micro=BATCH), []
        for _ in range(5):
            drawn += [tuple(x) for x in data.next_batches()[0]["tokens"].tolist()]
        assert sorted(drawn) == sorted([(0, i) for i in range(LENGTH)] * 4)

    def test_order_depends_on_the_seed(self):
        assert stream(meta(seed=1), 0, LENGTH) != stream(meta(seed=2), 0, LENGTH)

    @SOURCES
    def test_a_sample_does_not_depend_on_what_was_read_before(self, lengths, weights):
        datasets = [Numbers(n, i) for i, n in enumerate(lengths)]
        forward = stream(meta(datasets=datasets, weights=weights), 0, 70)
        data = meta(datasets=datasets, weights=weights)
        backward = [stream(data, i, 1)[0] for i in reversed(range(70))]
        assert backward[::-1] == forward


class TestResume:
    @SOURCES
    @pytest.mark.parametrize("done", [0, 1, 2, 7])
    def test_goes_on_exactly_from_any_position_at_another_data_parallel_size(
        self, lengths, weights, done
    ):
        make = lambda *a: meta(*a, [Numbers(n, i) for i, n in enumerate(lengths)], weights)  # noqa: E731
        first = [make(2, rank, 2) for rank in range(2)]
        for _ in range(done):
            global_order(first)
        state = first[0].state_dict()
        assert state == {"consumed_samples": done * BATCH} == first[1].state_dict()
        resumed = [make(1, rank, 3) for rank in range(3)]
        for part in resumed:
            part.load_state_dict(state)
        assert [global_order(first) for _ in range(3)] == [global_order(resumed) for _ in range(3)]

    def test_position_survives_as_a_plain_number(self):
        """Checkpoints may hand it back as a tensor."""
        data = meta()
        data.load_state_dict({"consumed_samples": torch.tensor(48)})
        assert data.state_dict() == {"consumed_samples": 48}
        assert type(data.consumed_samples) is int

    def test_looking_at_a_batch_does_not_consume_it(self):
        data = meta(micro=BATCH)
        seen = data.batches_at(0)[0]["tokens"]
        assert data.consumed_samples == 0
        assert torch.equal(seen, data.next_batches()[0]["tokens"])


class TestBlends:
    COUNT = 4000

    def shares(self, lengths, weights):
        data = meta(datasets=[Numbers(n, i) for i, n in enumerate(lengths)], weights=weights)
        drawn = stream(data, 0, self.COUNT)
        return [sum(name == i for name, _ in drawn) / self.COUNT for i in range(len(lengths))]

    @pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [5.0, 3.0, 2.0]])
    def test_draws_follow_the_weights_whatever_the_sizes_and_the_sum(self, weights):
        found = self.shares([1000, 10, 100], weights)
        for share, p in zip(found, (0.5, 0.3, 0.2), strict=True):
            # Five standard deviations of a binomial share.
            assert abs(share - p) < 5 * (p * (1 - p) / self.COUNT) ** 0.5

    def test_without_weights_draws_follow_the_sizes(self):
        found = self.shares([300, 100], None)
        assert abs(found[0] - 0.75) < 5 * (0.75 * 0.25 / self.COUNT) ** 0.5

    def test_every_sample_of_a_data_set_can_come(self):
        data = meta(datasets=[Numbers(7, 0), Numbers(5, 1)], weights=[1.0, 1.0])
        assert len(set(stream(data, 0, 500))) == 12
