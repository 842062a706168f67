"""What weighted sampling relies on in Megatron's data sets, builders and iterators."""

import inspect

import numpy as np
import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.datasets import blended_megatron_dataset_builder as builder  # noqa: E402
from megatron.core.datasets import gpt_dataset  # noqa: E402
from megatron.core.datasets.blended_dataset import BlendedDataset  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.training import training  # noqa: E402

from megatron_dwm.core.provenance import DOCUMENT_NUMBERS, with_provenance  # noqa: E402
from megatron_dwm.core.weighted_dataset import (  # noqa: E402
    DocumentWeights,
    SamplingSettings,
    Stage,
    WeightedGPTDataset,
    weighted,
)
from tests.functional.corpus import write_dataset  # noqa: E402


class Tokenizer:
    """As much of a tokenizer as the data sets ask for."""

    vocab_size, eod, pad = 256, 0, -1
    unique_identifiers = {"class": "Tokenizer"}  # noqa: RUF012
    special_tokens_dict = {"eod_token": 0}  # noqa: RUF012


def parameters_of(function):
    return list(inspect.signature(function).parameters)


def test_the_trainer_builds_its_loaders_as_a_stage_change_does():
    assert parameters_of(training.build_train_valid_test_data_iterators) == [
        "build_train_valid_test_datasets_provider"
    ]
    assert parameters_of(training.build_pretraining_data_loader)[:2] == [
        "dataset",
        "consumed_samples",
    ]
    source = inspect.getsource(training.build_train_valid_test_data_iterators)
    assert "RerunDataIterator(iter(dataloader))" in source
    source = inspect.getsource(training.build_train_valid_test_data_loaders)
    assert 'getattr(build_train_valid_test_datasets_provider, "is_distributed", False)' in source


def test_an_iterator_can_be_given_other_samples():
    iterator = RerunDataIterator(iter([1, 2, 3]))
    assert next(iterator) == 1
    iterator.iterable = iter([7, 8])
    iterator.advance()
    assert next(iterator) == 7


def test_the_builder_takes_the_class_and_the_config():
    assert parameters_of(builder.BlendedMegatronDatasetBuilder.__init__)[:5] == [
        "self",
        "cls",
        "sizes",
        "is_built_on_rank",
        "config",
    ]


def test_methods_that_are_replaced_are_the_ones_that_are_called():
    assert parameters_of(GPTDataset._build_document_sample_shuffle_indices) == ["self"]
    assert parameters_of(GPTDataset._query_document_sample_shuffle_indices) == ["self", "idx"]
    source = inspect.getsource(GPTDataset)
    assert "= self._query_document_sample_shuffle_indices(0)" in source  # for padding
    assert "self._build_document_sample_shuffle_indices()" in inspect.getsource(GPTDataset.__init__)
    assert "dataset_index" in inspect.getsource(BlendedDataset.__getitem__)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("contract") / "data", 3, 40)


def build(prefix, folder, weights, cls, num_samples=200, split="80,20,0", **config):
    settings = SamplingSettings(
        weights=lambda path, digest: DocumentWeights(weights, None, np.array([0])),
        lengths={prefix: "digest of the lengths"},
        stages={prefix: [Stage(0, "digest")]},
    )
    made = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=([prefix], None),
        split=split,
        tokenizer=Tokenizer(),
        path_to_cache=str(folder),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **config,
    )
    made.dwm_sampling = settings
    sizes = [num_samples, 20, None]
    return builder.BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, made).build()


def test_batches_have_megatrons_fields_and_the_documents(prefix, tmp_path):
    """The tokens of every sample are those that its document numbers name."""
    weights = np.ones(40, np.float32)
    train, valid, _ = build(prefix, tmp_path, weights, WeightedGPTDataset)
    stock, stock_valid, _ = build(prefix, tmp_path, weights, GPTDataset)
    sample, other = train[0], stock[0]
    assert set(sample) == {*other, "document_ids", "domain_id"}
    for name, value in other.items():
        assert (sample[name].dtype, sample[name].shape) == (value.dtype, value.shape), name
    low = train.dataset
    for k in range(len(train)):
        sample = train[k]
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        ids = sample["document_ids"]
        assert int(ids.max()) < 32  # the training split's share
        for document in ids.unique().tolist():
            part = sample["tokens"][ids == document].numpy()
            whole = low[document]
            windows = np.lib.stride_tricks.sliding_window_view(whole, len(part))
            assert (windows == part).all(axis=1).any()
    # Validation is Megatron's own.
    assert len(valid) == len(stock_valid)
    for k in range(len(valid)):
        assert set(valid[k]) == set(stock_valid[k])
        assert torch.equal(valid[k]["tokens"], stock_valid[k]["tokens"])


def test_equal_weights_read_the_documents_that_megatron_reads(prefix, tmp_path):
    """One epoch of either: the same tokens, but for those too few for a last sample."""
    counts = []
    for cls in (WeightedGPTDataset, GPTDataset):
        train = build(prefix, tmp_path, np.ones(40, np.float32), cls, None, "100,0,0")[0]
        tokens = np.concatenate([train[k]["tokens"].numpy() for k in range(len(train))])
        counts.append((len(train), np.bincount(tokens, minlength=256)))
    assert counts[0][0] == counts[1][0]
    assert np.abs(counts[0][1] - counts[1][1]).sum() < 2 * 17


def test_a_second_build_reads_the_plan_from_the_cache(prefix, tmp_path, monkeypatch):
    weights = np.linspace(0.1, 1, 40).astype(np.float32)
    first = build(prefix, tmp_path, weights, WeightedGPTDataset)[0]

    def planned(*args, **kwargs):
        raise AssertionError("planned again")

    monkeypatch.setattr("megatron_dwm.core.weighted_dataset.first_segment", planned)
    again = build(prefix, tmp_path, weights, WeightedGPTDataset)[0]
    assert isinstance(again.segment.sample_index, np.memmap)
    for k in range(0, len(first), 7):
        assert torch.equal(first[k]["tokens"], again[k]["tokens"])


def test_padding_and_a_class_of_ones_own(prefix, tmp_path):
    class Own(GPTDataset):
        """A user's data set."""

        def __getitem__(self, idx):
            return {**super().__getitem__(idx), "own": torch.tensor(1)}

    train = build(prefix, tmp_path, np.ones(40, np.float32), weighted(Own))[0]
    assert int(train[3]["own"]) == 1
    assert "document_ids" in train[3]
    assert not train[None]["loss_mask"].any()
    assert weighted(type(train)) is type(train)
    assert type(train).__name__ == "WeightedGPTDataset"
    assert train.index_split == Split.train
    assert gpt_dataset.GPTDataset.__getitem__ is GPTDataset.__getitem__


def test_without_the_extra_token(prefix, tmp_path):
    train = build(
        prefix,
        tmp_path,
        np.ones(40, np.float32),
        WeightedGPTDataset,
        add_extra_token_to_sequence=False,
    )[0]
    for k in range(0, len(train), 11):
        assert train[k]["tokens"].shape == (16,)
        assert int(train[k]["document_ids"].min()) >= 0


@pytest.mark.parametrize("base", [GPTDataset, WeightedGPTDataset])
def test_samples_say_what_is_known_of_their_documents(prefix, tmp_path, base):
    """Nothing else changes, the order of the samples least of all."""
    weights = np.ones(40, np.float32)
    numbers = np.arange(40, dtype=np.float32) ** 2
    train, valid, _ = build(prefix, tmp_path, weights, with_provenance(base))
    for part in (train, valid):
        setattr(part.config, DOCUMENT_NUMBERS, {"static_weights": {prefix: numbers.__getitem__}})
    stock, _, _ = build(prefix, tmp_path, weights, base)
    for k in range(0, len(train), 3):
        sample, other = train[k], stock[k]
        assert all(torch.equal(sample[name], value) for name, value in other.items())
        ids = sample["document_ids"]
        for document in ids.unique().tolist():
            part, whole = sample["tokens"][ids == document].numpy(), train.dataset[document]
            windows = np.lib.stride_tricks.sliding_window_view(whole, len(part))
            assert (windows == part).all(axis=1).any()
        expected = numbers[ids.numpy()].mean(dtype=np.float64)
        assert sample["dwm_static_weights"].dtype == torch.float64
        assert sample["dwm_static_weights"].item() == pytest.approx(expected, rel=1e-12)
    assert set(valid[0]) == set(build(prefix, tmp_path, weights, base)[1][0])
