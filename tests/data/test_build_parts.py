"""The parts of a build by themselves: sentences, hashes seen, counts of lengths."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapt.data.dedup import HASH, SeenHashes
from megapt.data.sentences import split_sentences
from megapt.data.statistics import LengthCounts


@pytest.mark.parametrize("sentences", [
    ["He came.", " She left!", " Why?", " Nobody knows."],
    ["Dr. J. S. Bach of St. Thomas met Mr. Smith.", ' "Go!"', " Then he went."],
    ["It cost 3.50 dollars, i.e. nothing.", " (It did.)", " See Fig. 3 for that."],
    ["Wait... what?!", " No."],
    ["A title\n", "Its text.", " More\n\n\n", "  Indented."],
    ["日本。", "東京！", "「はい。」", "と言った。"],
    ["The U.S. Army left.", " It was over."],
    ["no end here and e.g. small letters. and so on"],
    [" \n\n"], ["\n\nText after blank lines."], ["One.  \n"],
])
def test_sentences(sentences: list[str]) -> None:
    assert split_sentences("".join(sentences)) == sentences


def test_empty_text_has_no_sentences() -> None:
    assert split_sentences("") == []


@given(st.text(alphabet=" \n\tabAB.!?。」\"')…1\u00a0\u3000", max_size=60))
def test_sentences_are_the_text(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences)
    assert len(sentences) <= 1 or not any(sentence.isspace() for sentence in sentences)


def test_long_runs_take_no_time() -> None:
    for text in (" " * 300_000, "." * 300_000, "\n" * 300_000, "a." * 100_000, "\n " * 100_000, ". " * 100_000):
        assert "".join(split_sentences(text + "x")) == text + "x"


def test_seen_hashes() -> None:
    chance = random.Random(0)
    for start in (0, 50):
        digests = [hashlib.blake2b(bytes([i % 256, i // 256]), digest_size=16).digest() for i in range(3000)]
        digests[:3] = [b"\0" * 16, b"\1" + b"\0" * 15, b"a" * 15 + b"\0"]
        known = set(digests[:start])
        seen = SeenHashes(np.array(digests[:start], HASH))
        for size in (0, 1, 7, 500, 3, 1000, 1, 1, 2000, 64):
            block = chance.choices(digests, k=size)
            fresh = seen.add(np.array(block, HASH))
            for digest, is_fresh in zip(block, fresh, strict=True):
                assert is_fresh == (digest not in known)
                known.add(digest)
        assert sum(map(len, seen._runs)) == len(known)
        assert len(seen._runs) < 12


def test_length_counts() -> None:
    chance = np.random.default_rng(0)
    lengths = np.concatenate([chance.geometric(0.002, 5000), [0, 0, 2**20 - 1, 2**20, 2**20, 3_000_000_000]])
    chance.shuffle(lengths)
    counts = LengthCounts(np.array_split(lengths, 7))
    ordered = np.sort(lengths)
    assert counts.quantiles() == {f"{q:g}": int(ordered[int(q * (len(ordered) - 1))])
                                  for q in (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)}
    for values in ([5], [1, 1, 2], [0, 10**9], [7] * 1000):
        assert LengthCounts([np.array(values)]).picture("a$b$_$").startswith(b"\x89PNG")  # no formula
