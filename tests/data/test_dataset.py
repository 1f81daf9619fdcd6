from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapt.data.dataset import PAD, TokenDataset
from megapt.data.index_format import Header
from megapt.data.indexed import IndexedWriter
from megapt.data.megatron_order import MegatronOrder
from megapt.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """100 documents of 20 tokens; token i of the stream is i."""
    with IndexedWriter(tmp_path / "corpus", "u2") as writer:
        for k in range(100):
            writer.add_document(range(20 * k, 20 * k + 20))
    return tmp_path / "corpus"


def test_every_token_is_predicted_once_per_epoch(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "train", "90,10", sequence=32, seed=5)
    assert dataset.num_tokens == 1800
    ids = np.arange(4 * 225)  # 1800 / 32 = 56.25: four epochs are whole
    assert dataset.epochs(225) == 4
    rows = dataset.sample(ids)
    assert rows.dtype == np.int64
    assert rows.shape == (900, 33)
    assert ((rows[:, 1:] - rows[:, :-1]) % 1800 == 1).all()  # the tokens in their order, round the ring
    assert (np.bincount(rows[:, 1:].ravel(), minlength=1800) == 16).all()
    epochs, places = dataset.places(ids)
    assert epochs.tolist() == (ids * 32 // 1800).tolist() and places.tolist() == rows[:, 0].tolist()
    assert [array.tolist() for array in dataset.counts(ids[:5])] == [[32] * 5] * 2


def test_some_sample_runs_over_the_end(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "train", "90,10", sequence=32, seed=5)
    rows = dataset.sample(np.arange(225))
    wrapping = np.flatnonzero(rows[:, 0] > rows[:, -1])
    assert 1 <= len(wrapping) <= 4
    pieces = dataset.pieces(wrapping[:1], documents=True)
    ring_end = pieces.start + pieces.length == 1800
    assert ring_end.any() and pieces.start[int(np.argmax(ring_end)) + 1] == 0
    assert pieces.length.sum() == 33


def test_validation_is_sequential_and_starts_where_training_ends(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "valid", "90,10", sequence=32, seed=5)
    assert dataset.num_samples_per_epoch == 7  # 199 labels: the last sample has 7 of them
    rows = dataset.sample(np.arange(7))
    assert rows[:, 0].tolist() == [1800 + 32 * k for k in range(7)]
    assert (rows[:6] == rows[:6, :1] + np.arange(33)).all()
    assert rows[6].tolist() == [*range(1992, 2000), *[PAD] * 25]
    assert [array.tolist() for array in dataset.counts(np.array([5, 6]))] == [[32, 8], [32, 7]]
    with pytest.raises(IndexError):
        dataset.sample(np.array([7]))


def test_facts_name_what_decides_the_samples(corpus: Path, tmp_path: Path) -> None:
    def facts(name: str = "train", split: str = "90,10", sequence: int = 32, seed: int = 5, **more: Any) -> str:
        return repr(TokenDataset(corpus, name, split, sequence, seed, cache=tmp_path / "cache", **more).facts)

    variants = [
        facts(), facts(name="valid"), facts(split="80,20"), facts(sequence=16), facts(seed=6),
        facts(packing="best_fit"), facts(packing="document"), facts(order="megatron", total_samples=50),
        facts(order="megatron", total_samples=60),
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert facts() == variants[0]
    for key, value in {"split": "train", "tokens": "0:1800", "sequence": "32", "seed": "5"}.items():
        assert f"'{key}': '{value}'" in variants[0]


def test_documents_are_the_sequences_of_the_index(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "train", "90,10", sequence=32, seed=5)
    pieces = dataset.pieces(np.arange(50), documents=True)
    assert (pieces.start // 20 == (pieces.start + pieces.length - 1) // 20).all()
    assert (pieces.ends == ((pieces.start + pieces.length) % 20 == 0)).all()
    assert np.bincount(pieces.row, pieces.length).tolist() == [33] * 50
    rows = np.zeros((50, 33), np.int64)
    dataset.read(pieces, rows)
    assert (rows == dataset.sample(np.arange(50))).all()


def test_megatron_order_is_read_as_megatron_would(corpus: Path, tmp_path: Path) -> None:
    dataset = TokenDataset(
        corpus, "train", "90,10", 32, 5, order="megatron", total_samples=100, cache=tmp_path / "cache"
    )
    lengths = dataset.reader.lengths[:90]
    order = MegatronOrder(lengths, 32, 5, 100, "train")
    rows = dataset.sample(np.arange(100))
    for row, found in zip(rows, order.pieces(np.arange(100)), strict=True):
        tokens = [np.arange(20 * s + o, 20 * s + o + n) for s, o, n in zip(*found, strict=True)]
        assert row.tolist() == np.concatenate(tokens).tolist()
    pieces = dataset.pieces(np.arange(100))
    assert (pieces.ends == ((pieces.start + pieces.length) % 20 == 0)).all()
    assert len(set(dataset.places(np.arange(100))[1].tolist())) == 100


def test_corpora_of_equal_size_are_shuffled_differently(corpus: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "other", "u2") as writer:
        for k in range(100):
            writer.add_document(range(20 * k + 1, 20 * k + 21))
    first = TokenDataset(corpus, "train", "90,10", 32, 5).sample(np.arange(20))
    second = TokenDataset(tmp_path / "other", "train", "90,10", 32, 5).sample(np.arange(20))
    assert (first[:, 0] + 1).tolist() != second[:, 0].tolist()


def test_errors(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='no split "training"'):
        TokenDataset(corpus, "training", "90,10", 32, 5)
    with pytest.raises(UserError, match="gives test no share"):
        TokenDataset(corpus, "test", "90,10", 32, 5)
    with pytest.raises(UserError, match=r"corpus: split .* leaves test empty \(train"):
        TokenDataset(corpus, "test", "999,0,1", 32, 5)
    TokenDataset(corpus, "train", "999,0,1", 32, 5)  # another split's emptiness is not this one's
    with pytest.raises(UserError, match=r"1800 tokens in .*corpus \(train\) are too few .* 1800 \+ 1"):
        TokenDataset(corpus, "train", "90,10", 1800, 5)
    with IndexedWriter(tmp_path / "one", "u2") as writer:
        writer.add_document([3])
    with pytest.raises(UserError, match="1 tokens in .*one .valid. are too few"):
        TokenDataset(tmp_path / "one", "valid", "0,1", 4, 5)


def test_a_corpus_that_changes_under_the_run(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "train", "90,10", 32, 5)
    dataset.sample(np.arange(3))
    with open(corpus.with_suffix(".bin"), "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="corpus.bin changed while it was in use"):
        dataset.sample(np.arange(3))


def test_a_trillion_tokens_are_opened_without_reading_them(tmp_path: Path) -> None:
    sequences, tokens = 10**9, 10**12
    header = Header(np.dtype("<u2"), sequences, 2)
    try:
        with open(tmp_path / "giant.bin", "wb") as file:
            file.truncate(2 * tokens)
        with open(tmp_path / "giant.idx", "wb") as file:  # a file of holes: all but the last two sequences are empty
            file.write(header.pack())
            file.truncate(header.end)
            file.seek(header.lengths_at + 4 * (sequences - 2))
            file.write(np.array([10**9, 10**9], "<i4").tobytes())
            file.seek(header.offsets_at + 8 * (sequences - 2))
            file.write(np.array([2 * (tokens - 2 * 10**9), 2 * (tokens - 10**9), 0, sequences], "<i8").tobytes())
    except OSError:
        pytest.skip("no sparse files of this size here")
    tracemalloc.start()
    dataset = TokenDataset(tmp_path / "giant", "train", "1", 8192, 5)
    pieces = dataset.pieces(np.arange(16), documents=True)
    rows = np.zeros((16, 8193), np.int32)
    dataset.read(pieces, rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.num_tokens == tokens and np.bincount(pieces.row, pieces.length).tolist() == [8193] * 16
    assert peak < 10 * 2**20
