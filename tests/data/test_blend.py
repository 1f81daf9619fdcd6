from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data.blend import LONGEST_PERIOD, Blend, BlendLike, BudgetBlend, PhasedBlend, _share
from megapt.errors import UserError


def named(weights: list[float]) -> dict[str, float]:
    return {f"s{i}": weight for i, weight in enumerate(weights)}


def check_ordinals(blend: BlendLike, first: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Every source's own numbers follow one another without a gap, from what `counts` says."""
    sources, ordinals = blend.locate(np.arange(first, first + samples))
    before, after = blend.counts(first), blend.counts(first + samples)
    assert before.sum() == first
    assert after.sum() == first + samples
    for i in range(len(blend.names)):
        assert ordinals[sources == i].tolist() == list(range(before[i], after[i]))
    return sources, ordinals


def largest_stray(sources: np.ndarray, given: np.ndarray, whole: int) -> float:
    """The largest |counts - n * given / whole| over all prefixes n; all but the last division in whole numbers."""
    n = np.arange(1, len(sources) + 1)
    worst = 0
    for i, quota in enumerate(given.tolist()):
        counts = np.cumsum(sources == i)
        worst = max(worst, int(np.abs(counts * whole - n * quota).max()))
    return worst / whole


def test_every_prefix_is_within_one_sample() -> None:
    """Some millions of prefixes, exact and quantised shares, skewed ones and many sources."""
    random = np.random.default_rng(0)
    tried = [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [1, 1, 1], [1 / 3, 0.21, 0.4], [1, 2, 3, 4, 5, 6, 7], [65535, 1]]
    tried += [random.random(k).tolist() for k in (2, 3, 4, 9, 40)]
    tried += [np.exp(random.normal(0, 1.5, k)).tolist() for k in (3, 6, 20)]
    for weights in tried:
        blend = Blend(named(weights))
        sources, _ = check_ordinals(blend, 0, 2 * blend.period + 17)
        assert largest_stray(sources, blend._quota, blend.period) < 1
        assert np.array_equal(blend.weights * blend.period, blend._quota)
        assert np.abs(blend.weights - np.array(weights) / sum(weights)).max() <= blend.error + 1e-15


@settings(max_examples=150, deadline=None, derandomize=True)
@given(quotas=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any))
def test_small_periods_exhaustively(quotas: list[int]) -> None:
    blend = Blend(named([float(quota) for quota in quotas]))
    divisor = math.gcd(*quotas)
    assert (blend.period, blend.error) == (sum(quotas) // divisor, 0.0)
    sources, _ = blend.locate(np.arange(blend.period))
    counts = np.zeros(len(quotas), int)
    for n, source in enumerate(sources.tolist(), 1):
        counts[source] += 1
        for count, quota in zip(counts.tolist(), quotas, strict=True):
            ideal = Fraction(n * quota, sum(quotas))
            assert count in (math.floor(ideal), math.ceil(ideal))
        assert blend.counts(n).tolist() == counts.tolist()


def test_shares_are_exact_where_a_short_period_holds_them() -> None:
    blend = Blend({"web": 0.7, "code": 0.2, "books": 0.1})
    assert (blend.names, blend.period, blend.error) == (("web", "code", "books"), 10, 0.0)
    assert blend.weights.tolist() == [0.7, 0.2, 0.1]
    assert Blend({"a": 70, "b": 30}).period == 10
    rough = Blend({"a": math.pi, "b": math.e})
    assert rough.period == LONGEST_PERIOD
    assert 0 < rough.error <= 1 / LONGEST_PERIOD
    assert rough.error == pytest.approx(abs(rough.weights[0] - math.pi / (math.pi + math.e)), rel=1e-6)
    assert np.bincount(Blend({"a": 1, "none": 0, "b": 1}).locate(np.arange(10))[0]).tolist() == [5, 0, 5]


def test_far_out_and_in_any_order() -> None:
    blend = Blend(named([0.31, 0.17, 0.52, math.pi]))
    far = 10**12
    sources, ordinals = check_ordinals(blend, far - 1000, 3000)
    assert largest_stray_at(blend, far) < 1
    shuffled = np.random.default_rng(0).permutation(3000)
    again = blend.locate(far - 1000 + shuffled)
    assert np.array_equal(again[0], sources[shuffled])
    assert np.array_equal(again[1], ordinals[shuffled])
    with pytest.raises(IndexError):
        blend.locate(np.array([-1]))


def largest_stray_at(blend: Blend, n: int) -> Fraction:
    return max(abs(int(count) - Fraction(n * int(quota), blend.period))
               for count, quota in zip(blend.counts(n), blend._quota, strict=True))


def test_blends_are_pinned() -> None:
    """A run must see the same samples after an upgrade: change these only together with the rule's name."""
    blend = Blend({"a": 0.5, "b": 0.3, "c": 0.2})
    assert "".join("abc"[s] for s in blend.locate(np.arange(20))[0]) == "abacababacabacababac"
    assert blend.fingerprint == "pfair-1:3af7da4e6374bef5d27959e4f3cb3b3b"
    budgets = BudgetBlend({"a": 50, "b": 30, "c": 20}, 10)
    assert "".join("abc"[s] for s in budgets.locate(np.arange(10))[0]) == "abacabacab"


def test_fingerprints_tell_blends_apart() -> None:
    prints = [Blend({"a": 1, "b": 2}), Blend({"b": 2, "a": 1}), Blend({"a": 1, "b": 3}), Blend({"a": 1, "c": 2}),
              BudgetBlend({"a": 1, "b": 2}, 1), PhasedBlend([(0, {"a": 1, "b": 2})]),
              PhasedBlend([(0, {"a": 1, "b": 2}), (5, {"a": 1})]), PhasedBlend([(0, {"a": 1, "b": 2}), (6, {"a": 1})])]
    assert len({blend.fingerprint for blend in prints}) == len(prints)
    assert all(" " not in blend.fingerprint for blend in prints)
    assert Blend({"a": 1, "b": 2}).fingerprint == Blend({"a": 0.5, "b": 1}).fingerprint


@pytest.mark.parametrize(("weights", "message"), [
    ({}, "not all 0; given: none"), ({"a": 0.0}, "given: a 0.0"), ({"a": 1, "b": -1}, "b -1.0"),
    ({"a": float("nan")}, "finite"), ({"a": float("inf"), "b": 1}, "finite"),
    ({"a": 1, "b": 1e-9}, r"source b has a share of 1e-09 .* 1/65536 .* token budgets"),
])
def test_impossible_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Blend(weights)


def test_budgets_are_met_exactly_and_on_the_way() -> None:
    random = np.random.default_rng(1)
    tried = [[7], [1, 1], [5, 3, 2], [100_000, 1], [0, 4, 9], [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377]]
    tried += [random.integers(0, 10**e, k).tolist() for e, k in ((1, 5), (3, 9), (4, 30))]
    tried += [np.exp(random.normal(5, 3, 12)).astype(int).tolist()]
    for budgets in tried:
        blend = BudgetBlend({f"s{i}": 16 * n for i, n in enumerate(budgets)}, 16)
        assert blend.budgets.tolist() == budgets
        assert blend.total == sum(budgets)
        sources, _ = check_ordinals(blend, 0, blend.total)
        assert np.bincount(sources, minlength=len(budgets)).tolist() == budgets
        assert largest_stray(sources, blend.budgets, blend.total) <= blend.deviation < 1.7
        for n in (1, blend.total // 3, blend.total):
            assert blend.counts(n).tolist() == np.bincount(sources[:n], minlength=len(budgets)).tolist()
        check_ordinals(blend, blend.total - 3 if blend.total > 3 else 0, 40)  # anew past the total


def test_budgets_of_trillions_of_tokens() -> None:
    tokens = {"web": 13_000_000_000_001, "code": 1_700_000_000_007, "maths": 299_999_999_999, "rare": 5_000_000}
    blend = BudgetBlend(tokens, 4096)
    assert np.abs(blend.budgets * 4096 - np.array(list(tokens.values()))).max() <= 2048
    assert blend.counts(blend.total).tolist() == blend.budgets.tolist()
    for first in (0, blend.total // 7, blend.total - 1500, 10**12):
        check_ordinals(blend, first, 3000)
    n = blend.total // 2
    assert np.abs(blend.counts(n) - n * blend.weights).max() < blend.deviation + 1e-3
    with pytest.raises(IndexError):
        blend.locate(np.array([-1]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(whole=st.integers(1, 2**50), data=st.data())
def test_shares_of_huge_numbers_are_exact(whole: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, whole))
    samples = data.draw(st.lists(st.integers(0, whole), min_size=1, max_size=20))
    exact = [(2 * n * part + whole) // (2 * whole) for n in samples]
    assert _share(np.array(samples, np.int64), part, whole).tolist() == exact


@pytest.mark.parametrize(("tokens", "message"), [
    ({}, "there must be one"), ({"a": -1, "b": 5}, "0 or more"), ({"a": 3}, "make 0 samples of 8"),
    ({"a": 2**60}, "make 144115188075855872 samples"),
])
def test_impossible_budgets(tokens: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BudgetBlend(tokens, 8)


def test_phases_hold_their_quotas_and_run_on() -> None:
    phases = [(0, {"web": 0.8, "code": 0.2, "best": 0}), (1003, {"web": 0.5, "best": 0.5}),
              (1010, {"web": 1, "code": 1, "best": 1}), (5000, {"best": 3.0, "code": math.pi})]
    blend = PhasedBlend(phases)
    assert blend.names == ("web", "code", "best")
    sources, _ = check_ordinals(blend, 0, 80_000)
    check_ordinals(blend, 990, 30)
    for k, (first, _) in enumerate(phases):
        end = phases[k + 1][0] if k + 1 < len(phases) else 80_000
        inner = blend.blends[k]
        assert largest_stray(sources[first:end], inner._quota, inner.period) < 1
        for n in (first, first + 1, end - 1, end):
            assert blend.counts(n).tolist() == np.bincount(sources[:n], minlength=3).tolist()
    assert blend.counts(1003)[2] == 0
    single = PhasedBlend([(0, {"a": 0.7, "b": 0.3})])
    plain = Blend({"a": 0.7, "b": 0.3}).locate(np.arange(100))
    assert all(np.array_equal(a, b) for a, b in zip(single.locate(np.arange(100)), plain, strict=True))


@pytest.mark.parametrize(("phases", "message"), [
    ([], r"samples \[\]"), ([(1, {"a": 1})], r"\[1\]; the first must be 0"),
    ([(0, {"a": 1}), (5, {"a": 1}), (5, {"a": 1})], r"\[0, 5, 5\]"),
    ([(0, {"a": 1, "b": 1}), (9, {"a": 1, "c": 2})], "phase from sample 9 has weights for c, .* are a, b"),
    ([(0, {"a": 1, "b": 1}), (9, {"b": 0})], "not all 0"),
])
def test_impossible_phases(phases: list[tuple[int, dict[str, float]]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PhasedBlend(phases)
