from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megapt.data.dataset import TokenDataset
from megapt.data.indexed import IndexedWriter
from megapt.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """100 documents of 20 tokens; token i of the stream is i."""
    with IndexedWriter(tmp_path / "corpus", "u2") as writer:
        for k in range(100):
            writer.add_document(range(20 * k, 20 * k + 20))
    return tmp_path / "corpus"


def test_train_covers_its_split_in_every_epoch(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "train", "90,10", sequence=32, seed=5)
    assert dataset.num_tokens == 1800
    n = dataset.num_samples_per_epoch
    assert n == 56
    orders = []
    for epoch in range(3):
        rows = dataset.sample(np.arange(epoch * n, (epoch + 1) * n))
        assert rows.dtype == np.int64
        assert rows.shape == (n, 33)
        assert ((rows[:, 1:] - rows[:, :-1]) % 1800 == 1).all()  # the tokens in their order, round the ring
        assert len(set(rows[:, 1:].ravel().tolist())) == n * 32
        orders.append(rows[:, 0].tolist())
    assert len({tuple(order) for order in orders}) == 3
    assert dataset.loss_tokens(np.arange(5)) == 5 * 32


def test_some_sample_runs_over_the_end(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "train", "90,10", sequence=32, seed=5)
    n = dataset.num_samples_per_epoch
    rows = dataset.sample(np.arange(5 * n)).reshape(5, n, 33)
    wrapping = rows[:, :, 0] > rows[:, :, -1]
    assert wrapping.any()
    assert (wrapping.sum(axis=1) <= 1).all()


def test_validation_is_sequential_and_starts_where_training_ends(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "valid", "90,10", sequence=32, seed=5)
    assert dataset.num_samples_per_epoch == 199 // 32
    rows = dataset.sample(np.arange(6))
    assert rows[:, 0].tolist() == [1800 + 32 * k for k in range(6)]
    assert (rows == rows[:, :1] + np.arange(33)).all()
    with pytest.raises(IndexError):
        dataset.sample(np.array([6]))


def test_fingerprint_names_what_decides_the_samples(corpus: Path) -> None:
    def fingerprint(name: str = "train", split: str = "90,10", sequence: int = 32, seed: int = 5) -> str:
        return TokenDataset(corpus, name, split, sequence, seed).fingerprint

    variants = [fingerprint(), fingerprint(name="valid"), fingerprint(split="80,20"),
                fingerprint(sequence=16), fingerprint(seed=6)]
    assert len(set(variants)) == 5
    assert fingerprint() == variants[0]
    assert "split=train tokens=0:1800 sequence=32 seed=5 order=arithmetic-1" in variants[0]


def test_corpora_of_equal_size_are_shuffled_differently(corpus: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "other", "u2") as writer:
        for k in range(100):
            writer.add_document(range(20 * k + 1, 20 * k + 21))
    first = TokenDataset(corpus, "train", "90,10", 32, 5).sample(np.arange(20))
    second = TokenDataset(tmp_path / "other", "train", "90,10", 32, 5).sample(np.arange(20))
    assert (first[:, 0] + 1).tolist() != second[:, 0].tolist()


def test_errors(corpus: Path) -> None:
    with pytest.raises(UserError, match='no split "training"'):
        TokenDataset(corpus, "training", "90,10", 32, 5)
    with pytest.raises(UserError, match="gives test no share"):
        TokenDataset(corpus, "test", "90,10", 32, 5)
    with pytest.raises(UserError, match="leaves test empty"):
        TokenDataset(corpus, "test", "999,0,1", 32, 5)
    TokenDataset(corpus, "train", "999,0,1", 32, 5)  # another split's emptiness is not this one's
    with pytest.raises(UserError, match=r"200 tokens in .*corpus \(valid\) are too few .* 200 \+ 1"):
        TokenDataset(corpus, "valid", "90,10", 200, 5)
