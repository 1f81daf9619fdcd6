from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data.order import (
    ItemOrder,
    KeyedPermutation,
    SampleOrder,
    SequentialOrder,
    derive_key,
    split_ranges,
)
from megapt.errors import UserError


def test_permutation_is_bijective_for_every_small_n() -> None:
    for n in range(1, 301):
        for key in (0, 1, 2**64 - 1):
            assert sorted(KeyedPermutation(n, key)(np.arange(n)).tolist()) == list(range(n)), (n, key)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(301, 2**63), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permutation_of_large_n_is_injective_into_range(n: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    near = sorted({*indices, 0, n - 1, n // 2, *range(20)})
    image = KeyedPermutation(n, key)(np.array(near, np.uint64))
    assert image.min() >= 0
    assert int(image.max()) < n
    assert len(set(image.tolist())) == len(near)


def test_permutation_is_pinned() -> None:
    """A run must see the same samples after an upgrade: change these numbers only with SampleOrder.kind."""
    assert KeyedPermutation(10, 7)(np.arange(10)).tolist() == [5, 6, 0, 2, 7, 8, 3, 1, 4, 9]
    assert KeyedPermutation(10**12, 7)(np.arange(3)).tolist() == [150092507411, 60962704893, 662641824966]
    assert derive_key("shuffle", 1234, "x", 0) == 5957564450917095694


def test_permutation_takes_any_shape_and_refuses_the_outside() -> None:
    permutation = KeyedPermutation(12, 3)
    square = permutation(np.arange(12).reshape(3, 4))
    assert square.shape == (3, 4)
    assert square.ravel().tolist() == permutation(np.arange(12)).tolist()
    assert permutation(np.int64(5)).tolist() == square[1, 1]
    for bad in (-1, 12):
        with pytest.raises(IndexError):
            permutation(np.array([bad]))


@pytest.mark.parametrize("n", [3, 5, 8, 13])
def test_permutation_is_uniform_over_keys(n: int) -> None:
    """Chi-square of (position, value) counts over keys; 99.99% bound for (n-1)^2 degrees of freedom."""
    trials = 4000
    counts = np.zeros((n, n))
    for key in range(trials):
        counts[np.arange(n), KeyedPermutation(n, derive_key(key))(np.arange(n))] += 1
    expected = trials / n
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8


def test_permutation_has_no_visible_order() -> None:
    n = 100_000
    image = KeyedPermutation(n, 5)(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert (image == np.arange(n)).sum() < 10
    other = KeyedPermutation(n, 6)(np.arange(n))
    assert (image == other).sum() < 10


def test_keys_tell_parts_apart() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (12,), ("1", "2"), (-1,), (), (2**70,)]
    assert len({derive_key(*p) for p in parts}) == len(parts)
    assert derive_key(np.int64(3)) == derive_key(3)  # type: ignore[arg-type]


def test_permutation_is_fast() -> None:
    ids = np.arange(10**6)
    permutation = KeyedPermutation(2**29 + 1, 1)  # just past a power of two: the most cycle walking
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        permutation(ids)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.2


def test_every_small_stream_is_partitioned_by_its_labels() -> None:
    """All num_tokens and sequences up to 60, several epochs: the ring's tokens in the order of the cuts."""
    for num_tokens in range(2, 61):
        for sequence in range(1, num_tokens):
            order = SampleOrder(num_tokens, sequence, seed=num_tokens)
            epochs = 4 if math.gcd(num_tokens, sequence) > 1 else 3
            total = order.first_sample(epochs)
            owners, starts = order.starts(np.arange(total))
            sizes = np.bincount(owners, minlength=epochs).tolist()
            assert sizes == [order.samples_in_epoch(e) for e in range(epochs)]
            assert set(sizes) <= {num_tokens // sequence, -(-num_tokens // sequence)}
            predicted = np.zeros(num_tokens, np.int64)
            for epoch in range(epochs):
                labels = (starts[owners == epoch][:, None] + np.arange(1, sequence + 1)) % num_tokens
                np.add.at(predicted, labels, 1)
                # Each epoch tops its predecessors up to one more reading; less than one sample is left open.
                assert predicted.max() - predicted.min() <= 1, (num_tokens, sequence, epoch)
                surplus = order.first_sample(epoch + 1) * sequence - (epoch + 1) * num_tokens
                assert 0 <= surplus < sequence
                assert predicted.sum() - (epoch + 1) * num_tokens == surplus
                assert (predicted == epoch + 1 + (predicted > epoch + 1)).all()


def test_samples_lie_end_to_end_on_the_stream() -> None:
    """Undone of its permutation, an epoch is a chain of samples, and epochs of a round chain up too."""
    order = SampleOrder(1007, 30, seed=4)
    owners, starts = order.starts(np.arange(order.first_sample(30)))
    cut = int(starts[owners == 0][np.argmin((starts[owners == 0] - order._beginning(0)) % 1007)])
    assert cut == order._beginning(0)
    for epoch in range(30):  # 30 / gcd(1007, 30) epochs are one round
        remaining = set(starts[owners == epoch].tolist())
        assert len(remaining) == order.samples_in_epoch(epoch)
        while remaining:
            remaining.remove(cut)
            cut = (cut + 30) % 1007
    assert cut == order._beginning(29)  # the round closes where it began


@settings(max_examples=60, deadline=None, derandomize=True)
@given(num_tokens=st.integers(10**12, 4 * 10**12), sequence=st.integers(2, 2**20), seed=st.integers(),
       epoch=st.integers(1, 1000))
def test_a_trillion_tokens(num_tokens: int, sequence: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_tokens, sequence, seed)
    first, size = order.first_sample(epoch), order.samples_in_epoch(epoch)
    assert (first - 1) * sequence < epoch * num_tokens <= first * sequence
    assert size in (num_tokens // sequence, num_tokens // sequence + 1)
    ids = np.unique(np.concatenate([first + np.arange(50), first + size - 1 - np.arange(50)]))
    owners, starts = order.starts(ids)
    assert set(owners.tolist()) == {epoch}
    assert order.epoch_of(np.array([first - 1, first + size])).tolist() == [epoch - 1, epoch + 1]
    assert 0 <= starts.min() <= starts.max() < num_tokens
    # On the stream, all cuts of one epoch are the same modulo the sequence.
    places = [(int(start) - order._beginning(epoch)) % num_tokens + epoch * num_tokens for start in starts]
    assert {place % sequence for place in places} == {0}
    assert len({place // sequence for place in places}) == len(ids)
    assert all(first <= place // sequence < first + size for place in places)


def test_order_is_the_same_however_it_is_asked() -> None:
    order = SampleOrder(10_007, 16, seed=3, identity="x")
    ids = np.arange(order.first_sample(5))
    epochs, starts = order.starts(ids)
    assert (order.epoch_of(ids) == epochs).all()
    shuffled = np.random.default_rng(0).permutation(len(ids))
    again = SampleOrder(10_007, 16, seed=3, identity="x").starts(ids[shuffled])
    assert (again[0] == epochs[shuffled]).all()
    assert (again[1] == starts[shuffled]).all()
    single = [int(order.starts(np.array([i]))[1][0]) for i in (0, 700, 1400, 3000)]
    assert single == starts[[0, 700, 1400, 3000]].tolist()
    assert order.lengths(ids).tolist() == [16] * len(ids)


def test_order_is_pinned() -> None:
    """A run must see the same samples after an upgrade: change these numbers only with SampleOrder.kind."""
    epochs, starts = SampleOrder(1000, 48, 7, "x").starts(np.array([0, 1, 20, 21, 500]))
    assert epochs.tolist() == [0, 0, 0, 1, 24]
    assert starts.tolist() == [390, 438, 870, 446, 217]
    assert ItemOrder(10, 7, "x").items(np.arange(10, 20))[1].tolist() == [7, 6, 5, 2, 8, 0, 1, 4, 3, 9]


def test_epochs_seeds_and_identities_differ() -> None:
    def starts(seed: int, identity: str, epoch: int) -> list[int]:
        order = SampleOrder(10_007, 16, seed, identity)
        return order.starts(np.arange(20) + order.first_sample(epoch))[1].tolist()

    kinds = [(0, "", 0), (0, "", 1), (1, "", 0), (0, "x", 0)]
    assert len({tuple(starts(*kind)) for kind in kinds}) == 4
    # Two seeds do not cut alike, nor do two epochs, whether or not the sequence divides the tokens.
    assert len({SampleOrder(10_007, 16, seed)._beginning(0) % 16 for seed in range(256)}) == 16
    for num_tokens in (10_000, 10_007):
        order = SampleOrder(num_tokens, 16, 0)
        cuts = {int(order.starts(np.array([order.first_sample(e)]))[1][0]) % 16 for e in range(64)}
        assert len(cuts) > 8


def test_order_far_out() -> None:
    order = SampleOrder(10**13 + 7, 8192, seed=1)
    epochs, starts = order.starts(np.array([0, 10**12, order._last]))
    assert epochs.tolist() == [0, 10**12 * 8192 // (10**13 + 7), order._last * 8192 // (10**13 + 7)]
    assert 0 <= starts.min() <= starts.max() < 10**13 + 7
    with pytest.raises(UserError, match=f"place fits 63 bits is {order._last}"):
        order.starts(np.array([order._last + 1]))
    with pytest.raises(UserError, match="too many"):
        SampleOrder(2**62, 8192, seed=1)
    edge = SampleOrder(2**61 - 1, 2**60 + 3, seed=1)
    assert edge.starts(np.array([edge._last]))[0].tolist() == [edge._last * (2**60 + 3) // (2**61 - 1)]


def test_negative_samples() -> None:
    for ask in (SampleOrder(9, 2, 0).starts, SampleOrder(9, 2, 0).epoch_of, ItemOrder(3, 0).items,
                ItemOrder(3, 0).epoch_of, SequentialOrder(9, 2).starts):
        with pytest.raises(IndexError, match="numbered from 0"):
            ask(np.array([-1]))


def test_items_are_permuted_anew_in_every_epoch() -> None:
    order = ItemOrder(100, seed=1)
    epochs, items = order.items(np.arange(300))
    assert (epochs == order.epoch_of(np.arange(300))).all()
    assert [order.first_sample(e) for e in range(3)] == [0, 100, 200]
    assert {order.samples_in_epoch(e) for e in range(3)} == {100}
    rows = items.reshape(3, 100)
    assert (np.sort(rows, axis=1) == np.arange(100)).all()
    assert len({tuple(row) for row in rows.tolist()}) == 3
    assert ItemOrder(100, 1, "x").items(np.arange(100))[1].tolist() != rows[0].tolist()
    assert ItemOrder(100, 2).items(np.arange(100))[1].tolist() != rows[0].tolist()
    assert ItemOrder(1, 0).items(np.arange(3))[1].tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="nothing to train on in here: 0 samples"):
        ItemOrder(0, 0, label="here")


def test_sequential_order_predicts_every_token_but_the_first() -> None:
    for num_tokens in range(2, 60):
        for sequence in range(1, 61):
            order = SequentialOrder(num_tokens, sequence)
            ids = np.arange(order.num_samples)
            labels = [start + 1 + k for start, length in
                      zip(order.starts(ids)[1].tolist(), order.lengths(ids).tolist(), strict=True)
                      for k in range(length)]
            assert labels == list(range(1, num_tokens))
            assert set(order.lengths(ids[:-1]).tolist()) <= {sequence}
            with pytest.raises(IndexError):
                order.starts(np.array([order.num_samples]))


def test_too_few_tokens() -> None:
    SampleOrder(9, 8, 0)
    with pytest.raises(UserError, match="8 tokens .*8 \\+ 1 .*longest possible sequence is 7"):
        SampleOrder(8, 8, 0)
    with pytest.raises(UserError, match="1 tokens in here are too few to evaluate"):
        SequentialOrder(1, 8, "here")
    for bad in (lambda: SampleOrder(8, 0, 0), lambda: SequentialOrder(8, 0)):
        with pytest.raises(UserError, match="must be 1 or more"):
            bad()


@pytest.mark.parametrize(("split", "n", "expected"), [
    ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
    ("100,0,0", 5, [(0, 5), (5, 5), (5, 5)]),
    ("100", 5, [(0, 5), (5, 5), (5, 5)]),
    ("0.9, 0.1", 25, [(0, 22), (22, 25), (25, 25)]),  # round(22.5) is 22: half to even
    ("1,1,2", 10, [(0, 2), (2, 5), (5, 10)]),  # round(2.5) is 2
    ("99,1,0", 10**12, [(0, 99 * 10**10), (99 * 10**10, 10**12), (10**12, 10**12)]),
])
def test_split_ranges(split: str, n: int, expected: list[tuple[int, int]]) -> None:
    assert list(split_ranges(split, n)) == expected


def test_split_errors() -> None:
    with pytest.raises(UserError, match=r"300 sequences leaves test empty \(train 291, valid 9, test 0\)"):
        split_ranges("969,30,1", 300)
    assert split_ranges("969,30,1", 300, requested=("train", "valid"))[2] == (300, 300)
    for bad in ("", "0,0", "1,2,3,4", "a,b", "1..2", "."):
        with pytest.raises(UserError, match="one to three numbers"):
            split_ranges(bad, 100)
