from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from megapt.data import baselines
from megapt.errors import UserError


def by_hand(tokens: list[int]) -> tuple[float, float]:
    unigram = -sum(c / len(tokens) * math.log(c / len(tokens)) for c in Counter(tokens).values())
    pairs = Counter(zip(tokens, tokens[1:], strict=False))
    contexts = Counter(tokens[:-1])
    bigram = -sum(c / (len(tokens) - 1) * math.log(c / contexts[a]) for (a, _), c in pairs.items())
    return unigram, bigram


@pytest.mark.parametrize("chunk", [1, 2, 7, 5000])
def test_against_counting(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(baselines, "_CHUNK", chunk)
    tokens = np.random.default_rng(1).zipf(1.4, 500) % 50
    found = baselines.token_entropies(tokens.astype(np.uint16), 50)
    assert found == pytest.approx(by_hand(tokens.tolist()), abs=1e-12)
    assert found.bigram < found.unigram < math.log(50)


def test_known_values() -> None:
    alternating = np.array([0, 1] * 100, np.int32)
    assert baselines.token_entropies(alternating, 2) == pytest.approx((math.log(2), 0.0), abs=1e-12)
    assert baselines.token_entropies(np.full(10, 3), 4) == (0.0, 0.0)
    large = np.array([2**31 - 2, 5, 2**31 - 2, 5])[:0]
    with pytest.raises(UserError, match="at least 2"):
        baselines.token_entropies(large, 2**31)


@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_outside(bad: int) -> None:
    with pytest.raises(UserError, match=f"token id {bad} is outside the vocabulary of 4"):
        baselines.token_entropies(np.array([0, 1, bad]), 4)
