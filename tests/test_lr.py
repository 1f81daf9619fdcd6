from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapt.errors import UserError
from megapt.lr import KINDS, LearningRate


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_linear_and_starts_above_zero(kind: str) -> None:
    rate = LearningRate(8e-4, 100, 8, kind, 0.0, decay_steps=20 if kind == "wsd" else None)
    assert [rate(step) for step in range(8)] == pytest.approx([1e-4 * (step + 1) for step in range(8)])


def test_cosine_values() -> None:
    rate = LearningRate(1.0, 11, 2, "cosine", 0.1)
    assert rate(1) == 1.0
    assert rate(6) == pytest.approx(0.1 + 0.9 * 0.5)  # halfway between step 1 and step 11
    assert rate(10) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.9)))
    assert rate(11) == rate(5000) == pytest.approx(0.1)


def test_linear_values_without_warmup() -> None:
    rate = LearningRate(1.0, 4, 0, "linear", 0.0)
    assert [rate(step) for step in range(6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_constant_values() -> None:
    rate = LearningRate(0.5, 4, 2, "constant", 0.0)
    assert [rate(step) for step in (0, 1, 2, 3, 100)] == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_wsd_is_flat_then_falls_over_the_last_decay_steps() -> None:
    rate = LearningRate(1.0, 20, 5, "wsd", 0.2, decay_steps=4)
    assert all(rate(step) == 1.0 for step in range(4, 16))
    assert [rate(step) for step in range(16, 21)] == pytest.approx([0.84, 0.68, 0.52, 0.36, 0.2])


def test_wsd_may_decay_over_everything_after_the_warmup() -> None:
    rate = LearningRate(1.0, 6, 2, "wsd", 0.0, decay_steps=4)
    assert [rate(step) for step in range(7)] == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


@given(st.sampled_from(KINDS), st.integers(1, 60), st.integers(0, 60), st.floats(0, 1))
def test_rises_once_then_never_rises_and_stays_in_bounds(
    kind: str, steps: int, warmup: int, share: float
) -> None:
    warmup = min(warmup, steps - 1 if kind == "wsd" else steps)
    minimum = 0.0 if kind == "constant" else 3e-4 * share
    rate = LearningRate(
        3e-4, steps, warmup, kind, minimum, decay_steps=steps - warmup if kind == "wsd" else None
    )
    values = [rate(step) for step in range(steps)]
    top = max(warmup - 1, 0)
    assert values[top] == 3e-4
    assert all(a < b for a, b in zip(values[:top], values[1 : top + 1], strict=True))
    assert all(a >= b for a, b in zip(values[top:], values[top + 1 :], strict=False))
    assert all(0 < value <= 3e-4 for value in values)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.0, 10, 11, "cosine", 0.0), "0 to 10"),
        ((1.0, 10, -1, "cosine", 0.0), "0 to 10"),
        ((0.0, 10, 1, "cosine", 0.0), "above 0"),
        ((math.nan, 10, 1, "cosine", 0.0), "above 0"),
        ((1.0, 10, 1, "cosine", 2.0), "between 0 and the peak 1.0"),
        ((1.0, 10, 1, "cosine", math.nan), "between 0 and the peak"),
        ((1.0, 0, 0, "cosine", 0.0), "at least 1 step"),
        ((1.0, 10, 1, "sine", 0.0), "cosine, linear, constant, wsd"),
        ((1.0, 10, 1, "constant", 0.5), "no effect"),
        ((1.0, 10, 1, "cosine", 0.0, 3), "belongs to kind wsd"),
        ((1.0, 10, 1, "wsd", 0.0), "1 to 9"),
        ((1.0, 10, 1, "wsd", 0.0, 10), "1 to 9"),
        ((1.0, 10, 1, "wsd", 0.0, 0), "1 to 9"),
        ((1.0, 10, 10, "wsd", 0.0, 1), "shorten it to 9"),
    ],
)
def test_refusals_name_the_rule_and_the_legal_values(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LearningRate(*arguments)


def test_negative_step_is_refused() -> None:
    with pytest.raises(UserError, match="count from 0"):
        LearningRate(1.0, 10, 1, "cosine", 0.0)(-1)
