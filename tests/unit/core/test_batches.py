"""A step's micro-batches: read once from the trainer's iterator, replayed for every pass."""

import pytest
import torch

from megatron_dwm.core.batches import StepBatches, tokens_of
from megatron_dwm.errors import DWMError


def numbered(start=0):
    while True:
        yield {"tokens": torch.tensor([[start]]), "labels": torch.tensor([[start + 1]])}
        start += 1


def tokens(batches):
    return [batch["tokens"].item() for batch in batches]


class TestReading:
    def test_takes_as_many_as_the_step_has_and_no_more(self):
        """The next step must find the next micro-batch."""
        iterator = numbered()
        StepBatches(iterator, 3)
        assert next(iterator)["tokens"].item() == 3

    def test_replays_the_same_batches_every_time(self):
        batches = StepBatches(numbered(), 3)
        assert tokens(batches.replay()) == tokens(batches.replay()) == [0, 1, 2]

    def test_a_pass_that_changes_its_batch_does_not_change_the_next_passes(self):
        """`get_batch` functions put device tensors back into the dict, or drop keys."""
        batches = StepBatches(numbered(), 1)
        first = next(batches.replay())
        first["tokens"] = None
        del first["labels"]
        again = next(batches.replay())
        assert again["tokens"].item() == 0 and again["labels"].item() == 1

    def test_replayed_tensors_are_the_trainers_own_not_copies(self):
        batches = StepBatches(numbered(), 1)
        assert next(batches.replay())["tokens"] is batches.first()[0]["tokens"]

    def test_batches_that_are_no_dicts_pass_through(self):
        batches = StepBatches(iter([(1, 2), None]), 2)
        assert list(batches.replay()) == [(1, 2), None]

    def test_a_rank_without_data_stays_without(self):
        batches = StepBatches(None, 3)
        assert batches.replay() is None and batches.first() is None and batches.last() is None

    def test_megatrons_replaying_iterator_keeps_nothing_of_other_steps(self):
        """It keeps what it gave for a rerun of the step, and would grow without end."""
        calls = []

        class Replaying:
            def __next__(self):
                calls.append("next")
                return {}

            def advance(self):
                calls.append("advance")

        StepBatches(Replaying(), 2)
        assert calls == ["advance", "next", "next", "advance"]

    def test_wrapping_gives_the_trainer_its_own_kind_of_iterator(self):
        class Wrapped:
            def __init__(self, iterable):
                self.iterable = iterable

        replayed = StepBatches(numbered(), 2).replay(Wrapped)
        assert isinstance(replayed, Wrapped) and tokens(replayed.iterable) == [0, 1]


class TestVirtualPipeline:
    """With virtual stages the trainer hands a list, one iterator (or None) a model chunk."""

    def test_each_chunk_reads_its_own_iterator_and_the_form_is_kept(self):
        batches = StepBatches([numbered(0), None, numbered(10)], 2)
        first, middle, last = batches.replay()
        assert tokens(first) == [0, 1] and middle is None and tokens(last) == [10, 11]
        assert tokens(batches.first()) == [0, 1] and tokens(batches.last()) == [10, 11]

    def test_a_list_of_one_stays_a_list(self):
        assert isinstance(StepBatches([numbered()], 1).replay(), list)


class TestLike:
    def test_gives_batches_to_the_chunks_that_have_data(self):
        """The meta batches go where the training batches go."""
        given = [{"tokens": torch.tensor([[7]])}]
        first, second = StepBatches.like([numbered(), None], given).replay()
        assert tokens(first) == [7] and second is None
        assert tokens(StepBatches.like(numbered(), given).replay()) == [7]

    def test_reads_nothing_from_the_training_iterator(self):
        iterator = numbered()
        StepBatches.like(iterator, [])
        assert next(iterator)["tokens"].item() == 0

    @pytest.mark.parametrize("iterator", [None, [None, None]])
    def test_a_rank_without_training_data_gets_no_meta_data(self, iterator):
        assert StepBatches.like(iterator, [{}]).first() is None


class TestTokens:
    def test_token_ids_of_each_micro_batch(self):
        assert [t.item() for t in tokens_of(StepBatches(numbered(), 2).first())] == [0, 1]

    def test_none_where_there_is_no_data(self):
        assert tokens_of(None) is None

    @pytest.mark.parametrize("batch", [{"text": torch.zeros(1, 2)}, torch.zeros(1, 2), None])
    def test_batches_without_token_ids_are_refused_with_the_field_named(self, batch):
        with pytest.raises(DWMError, match="'tokens'") as caught:
            tokens_of([{"tokens": torch.zeros(1, 2)}, batch])
        # Only the stages that read data can see it.
        assert caught.value.this_rank_only
