from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data.order import KeyedPermutation, SampleOrder, SequentialOrder, derive_key, split_ranges
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


@settings(max_examples=80, deadline=None, derandomize=True)
@given(sequence=st.integers(1, 40), extra=st.integers(1, 400), seed=st.integers(), epoch=st.integers(0, 5))
def test_epoch_predicts_every_token_once_but_for_the_gap(sequence: int, extra: int, seed: int,
                                                         epoch: int) -> None:
    num_tokens = sequence + extra
    order = SampleOrder(num_tokens, sequence, seed)
    n = num_tokens // sequence
    assert order.samples_per_epoch == n
    epochs, starts = order.starts(np.arange(epoch * n, (epoch + 1) * n))
    assert set(epochs.tolist()) == {epoch}
    assert 0 <= starts.min() <= starts.max() < num_tokens
    labels = (starts[:, None] + np.arange(1, sequence + 1)) % num_tokens
    counts = Counter(labels.ravel().tolist())
    assert max(counts.values()) == 1
    gap = {(order.offset(epoch) - k) % num_tokens for k in range(num_tokens % sequence)}
    assert set(range(num_tokens)) - set(counts) == gap


def test_order_is_the_same_however_it_is_asked() -> None:
    order = SampleOrder(10_007, 16, seed=3, identity="x")
    ids = np.arange(5 * order.samples_per_epoch)
    epochs, starts = order.starts(ids)
    shuffled = np.random.default_rng(0).permutation(len(ids))
    again = SampleOrder(10_007, 16, seed=3, identity="x").starts(ids[shuffled])
    assert (again[0] == epochs[shuffled]).all()
    assert (again[1] == starts[shuffled]).all()
    single = [int(order.starts(np.array([i]))[1][0]) for i in (0, 700, 1400, 3000)]
    assert single == starts[[0, 700, 1400, 3000]].tolist()


def test_epochs_seeds_and_identities_differ() -> None:
    def starts(seed: int, identity: str, epoch: int) -> list[int]:
        order = SampleOrder(10_007, 16, seed, identity)
        return order.starts(np.arange(20) + epoch * order.samples_per_epoch)[1].tolist()

    kinds = [(0, "", 0), (0, "", 1), (1, "", 0), (0, "x", 0)]
    assert len({tuple(starts(*kind)) for kind in kinds}) == 4
    order = SampleOrder(10_007, 16, 0)
    n = order.samples_per_epoch
    places = [tuple((order.starts(np.arange(e * n, e * n + n))[1] - order.offset(e)) % 10_007)
              for e in (0, 1)]
    assert sorted(places[0]) == sorted(places[1])
    assert places[0] != places[1]  # not the cuts alone: the shuffle differs too
    assert len({order.offset(epoch) for epoch in range(64)}) == 16  # all cuts occur


def test_order_far_out() -> None:
    order = SampleOrder(10**13 + 7, 8192, seed=1)
    epochs, starts = order.starts(np.array([0, 10**12, 2**62]))
    assert epochs.tolist() == [0, 10**12 // order.samples_per_epoch, 2**62 // order.samples_per_epoch]
    assert 0 <= starts.min() <= starts.max() < 10**13 + 7


def test_sequential_order() -> None:
    order = SequentialOrder(50, 7)
    assert order.samples_per_epoch == 7
    assert order.starts(np.array([0, 6, 3]))[1].tolist() == [0, 42, 21]
    assert SequentialOrder(49, 7).samples_per_epoch == 6
    for bad in (-1, 7):
        with pytest.raises(IndexError):
            order.starts(np.array([bad]))


@pytest.mark.parametrize("kind", [lambda t, s: SampleOrder(t, s, 0), SequentialOrder])
def test_too_few_tokens(kind: type) -> None:
    kind(9, 8)
    with pytest.raises(UserError, match="8 tokens .*8 \\+ 1 .*longest possible sequence is 7"):
        kind(8, 8)
    with pytest.raises(UserError, match="must be 1 or more"):
        kind(8, 0)


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
