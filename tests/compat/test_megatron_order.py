"""Our indices against megatron-core's own GPTDataset, BlendedDataset and compiled index builders."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megapt.data.indexed import IndexedReader, IndexedWriter
from megapt.data.megatron_order import MegatronOrder, megatron_blend, megatron_blend_sizes
from megapt.data.order import SPLITS, split_ranges

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    helpers = pytest.importorskip("megatron.core.datasets.helpers", exc_type=ImportError)
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset", exc_type=ImportError)
    blended = pytest.importorskip("megatron.core.datasets.blended_dataset", exc_type=ImportError)
    builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder", exc_type=ImportError)

SPLIT = "80,15,5"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of 1 to 120 tokens; every token is unlike its neighbours."""
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    random = np.random.default_rng(3)
    with IndexedWriter(prefix, "u2") as writer:
        for length in random.integers(1, 120, 400).tolist():
            writer.add_document(random.integers(0, 60000, length))
    return prefix


def config_of(sequence: int, extra: bool, drop_last: bool, seed: int) -> Any:
    return gpt_dataset.GPTDatasetConfig(
        random_seed=seed, sequence_length=sequence, blend=(["unused"], None), split=SPLIT, path_to_cache=None,
        tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=60000, unique_identifiers={}, special_tokens_dict={}),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        add_extra_token_to_sequence=extra, drop_last_partial_validation_sequence=drop_last)


def theirs(corpus: Path, name: str, samples: int | None, sequence: int = 64, extra: bool = True,
           drop_last: bool = True, seed: int = 1234) -> Any:
    config = config_of(sequence, extra, drop_last, seed)
    config.mock = True  # or it would write a cache beside the corpus
    data = gpt_dataset.IndexedDataset(str(corpus), multimodal=False, mmap=True)
    ranges = dict(zip(SPLITS, split_ranges(SPLIT, len(data.sequence_lengths)), strict=True))
    ids = np.arange(*ranges[name], dtype=np.int32)
    return gpt_dataset.GPTDataset(data, str(corpus), ids, samples, gpt_dataset.Split[name], config)


def ours(corpus: Path, name: str, samples: int | None, sequence: int = 64, extra: bool = True,
         drop_last: bool = True, seed: int = 1234) -> tuple[IndexedReader, MegatronOrder]:
    reader = IndexedReader(corpus)
    first, last = dict(zip(SPLITS, split_ranges(SPLIT, reader.num_sequences), strict=True))[name]
    return reader, MegatronOrder(reader.lengths[first:last], sequence, seed, samples, name, first, extra, drop_last)


CASES = [(name, samples, sequence, extra, True) for name in SPLITS for samples in (None, 1, 17, 400, 1300)
         for sequence in (16, 64, 257) for extra in (True, False)]
CASES += [("valid", samples, sequence, extra, False) for samples in (None, 40, 300) for sequence in (16, 64, 257)
          for extra in (True, False)]


def test_indices_and_tokens_equal_theirs(corpus: Path) -> None:
    compared, kinds = 0, set()
    for name, samples, sequence, extra, drop_last in CASES:
        case = (name, samples, sequence, extra, drop_last)
        their = theirs(corpus, name, samples, sequence, extra, drop_last)
        reader, our = ours(corpus, name, samples, sequence, extra, drop_last)
        for index in ("document_index", "sample_index", "shuffle_index"):
            expected, got = getattr(their, index), getattr(our, index)
            assert got.dtype == expected.dtype, (case, index)
            assert np.array_equal(got, expected), (case, index)
        assert our.num_samples == len(their)
        kinds.add(our._plan(samples, their._get_num_tokens_per_epoch()).separate)
        chosen = np.unique(np.linspace(0, our.num_samples - 1, 12).astype(np.int64))
        for i, pieces in zip(chosen.tolist(), our.pieces(chosen), strict=True):
            text, documents = their._query_document_sample_shuffle_indices(i)
            got = np.concatenate([reader.sequence(s)[at:at + n] for s, at, n in
                                  zip(*(part.tolist() for part in pieces), strict=True)])
            assert np.array_equal(got, text[:len(got)]), case
            assert (text[len(got):] == -1).all(), case  # their padding
            assert len(got) == len(text) or not drop_last, case
            assert set(pieces.sequences.tolist()) <= set(documents.tolist())
            compared += 1
    assert compared > 800
    assert kinds == {True, False}  # last epochs shuffled by themselves, and not


def test_sample_index_equals_theirs_on_random_documents() -> None:
    """The compiled builder directly, with empty documents (at both ends, too) and several epochs."""
    random = np.random.default_rng(5)
    compared = 0
    for trial in range(400):
        n, sequence = int(random.integers(1, 40)), int(random.integers(2, 50))
        lengths = random.integers(0, int(random.integers(2, 90)), n).astype(np.int32)
        epochs, extra, drop_last = int(random.integers(1, 4)), trial % 2 == 0, trial % 5 != 0
        tokens = int(lengths.sum())
        if tokens * epochs <= sequence + extra or tokens < 2:
            continue
        requested = max(1, (tokens * epochs - extra) // sequence)
        order = MegatronOrder(lengths, sequence, 7, requested, "valid", 0, extra, drop_last)
        times = len(order.document_index) // n
        expected = helpers.build_sample_idx_int32(lengths, order.document_index, sequence, times, tokens,
                                                  drop_last, int(extra))
        assert np.array_equal(order.sample_index, expected), trial
        assert order.sample_index.dtype == expected.dtype
        compared += 1
    assert compared > 300


@pytest.mark.parametrize(("labels", "sequence", "off"), [(20_000_001, 1000, -1), (31 * 645_161, 31, 1)])
def test_sample_count_past_float32(labels: int, sequence: int, off: int) -> None:
    """Without dropping the last sample their count is computed in float32, and may miss above 2^24 tokens."""
    lengths = np.full(2, (labels + 1) // 2, np.int32)
    lengths[0] += (labels + 1) % 2
    order = MegatronOrder(lengths, sequence, 7, None, "valid", drop_last=False)
    expected = helpers.build_sample_idx(lengths, order.document_index, sequence, 1, labels + 1, False, True)
    assert len(expected) - 1 == math.ceil(labels / sequence) + off
    assert np.array_equal(order.sample_index, expected)


def weights_to_try() -> list[list[float]]:
    random = np.random.default_rng(11)
    tried = [[1.0], [0.5, 0.5], [0.1, 0.2, 0.7], [1.0] * 7, [3.0, 1.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.1]]
    tried += [(random.integers(1, 10, k) / 10).tolist() for k in (2, 5, 9, 31)]
    return tried + [np.exp(random.normal(0, 3, k)).tolist() for k in (2, 3, 8, 40)]


def test_blends_equal_theirs() -> None:
    for weights in weights_to_try():
        for size in (1, 100, 4096 * 3 + 17, 100_000):
            expected = np.zeros(size, np.int16), np.zeros(size, np.int64)
            helpers.build_blending_indices(*expected, blended.normalize(weights), len(weights), size, False)
            got = megatron_blend(weights, size)
            for mine, their in zip(got, expected, strict=True):
                assert mine.dtype == their.dtype
                assert np.array_equal(mine, their), (weights, size)


def test_exhaustive_blends_equal_theirs() -> None:
    random = np.random.default_rng(12)
    sizes = [[5], [1, 1, 1], [3, 100, 7], [40_000, 1, 30_000], random.integers(1, 3000, 30).tolist(),
             np.exp(random.uniform(0, 11, 9)).astype(int).tolist()]
    for counts in sizes:
        total = sum(counts)
        expected = np.zeros(total, np.int16), np.zeros(total, np.int64)
        helpers.build_exhaustive_blending_indices(*expected, np.array(counts), len(counts))
        got = megatron_blend(counts, None)
        for mine, their in zip(got, expected, strict=True):
            assert np.array_equal(mine, their), counts
        assert np.bincount(got[0]).tolist() == counts


def test_blended_dataset_equals_ours(corpus: Path) -> None:
    """Their three ways to blend, through BlendedDataset and the builder's own arithmetic of sizes."""
    requested, given = 500, [0.21, 0.3, 0.17]
    normal, used, built = megatron_blend_sizes(given, requested)
    assert normal == blended.normalize(given)
    assert [[n] for n in used] == builder._get_size_per_split_per_dataset(normal, [requested])
    assert [[n] for n in built] == builder._get_size_per_split_per_dataset(normal, [requested], surplus=0.005)
    config = config_of(64, True, True, 1)
    datasets = [theirs(corpus, "train", n, seed=k) for k, n in enumerate(built)]
    lengths = [len(dataset) for dataset in datasets]
    for weights, size in ((normal, sum(used)), (lengths, 300), (lengths, None)):
        their = blended.BlendedDataset(datasets, weights, size, config)
        got = megatron_blend(weights, size)
        assert np.array_equal(got[0], their.dataset_index)
        assert np.array_equal(got[1], their.dataset_sample_index)
