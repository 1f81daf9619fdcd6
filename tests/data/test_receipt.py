from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megapt.data.receipt import LINK_EVERY, Receipt
from megapt.errors import UserError

Ids = npt.NDArray[np.integer[Any]]


@dataclass
class Data:
    """Two sources in turn, each of ten samples per epoch; `shift` is what a changed order would change."""

    known: dict[str, str] = field(default_factory=lambda: {"a files": "ab", "seed": "1"})
    shift: int = 0
    computed: int = 0

    def facts(self) -> dict[str, str]:
        return self.known

    def records(self, ids: Ids) -> npt.NDArray[np.int64]:
        ids = np.asarray(ids, np.int64)
        self.computed += len(ids)
        return np.stack([ids % 2, ids // 2, ids // 20, (ids // 2 * 7 + self.shift) % 10], axis=1)

    def token_counts(self, ids: Ids) -> dict[str, int]:
        odd = int((np.asarray(ids) % 2).sum())
        return {"a": 16 * (len(ids) - odd), "b": 16 * odd}

    def source_samples(self, samples: int) -> dict[str, int]:
        return {"a": (samples + 1) // 2, "b": samples // 2}


def advanced(data: Data, *batches: range) -> Receipt:
    receipt = Receipt.of(data)
    for batch in batches:
        receipt.advance(data, np.array(batch, np.int64))
    return receipt


def test_chain_is_a_plain_hash_chain() -> None:
    receipt = advanced(Data(), range(5, 7))
    chain = b""
    for record in ((5, 1, 2, 0, 4), (6, 0, 3, 0, 1)):
        chain = hashlib.blake2b(chain + struct.pack("<5q", *record), digest_size=16).digest()
    assert (receipt.chain, receipt.samples) == (chain.hex(), 2)
    assert receipt.source_samples == {"a": 1, "b": 1} and receipt.source_tokens == {"a": 16, "b": 16}


def test_chain_depends_on_the_order_of_samples_alone() -> None:
    data = Data()
    whole = advanced(data, range(4))
    assert whole == advanced(data, range(2), range(2, 4)) == advanced(data, range(1), range(0), range(1, 4))
    others = [advanced(data, range(3)), advanced(data, range(3, -1, -1)), advanced(Data(shift=1), range(4))]
    assert len({whole.chain, *(other.chain for other in others)}) == 4


def test_resume_through_json() -> None:
    data = Data()
    first = advanced(data, range(4))
    resumed = Receipt.from_dict(json.loads(json.dumps(first.to_dict())))
    assert resumed == first
    resumed.check(data)
    resumed.advance(data, np.arange(4, 10))
    assert resumed == advanced(data, range(10))
    with pytest.raises(UserError, match="lacks a valid samples, chain"):
        Receipt.from_dict(first.to_dict() | {"samples": "4", "chain": None})
    with pytest.raises(UserError, match="lacks a valid links"):
        Receipt.from_dict(first.to_dict() | {"links": [1]})


def test_check_names_the_facts_that_differ() -> None:
    receipt = advanced(Data(), range(40))
    with pytest.raises(UserError) as error:
        receipt.check(Data({"a files": "cd", "seed": "1", "blend": "2"}))
    assert "(a files: ab then, cd now; blend: absent then, 2 now)" in str(error.value)
    assert "first 40 samples" in str(error.value)


def test_check_counts_samples_and_follows_the_chain() -> None:
    data = Data()
    receipt = advanced(data, range(40))
    receipt.source_samples["a"] += 1
    with pytest.raises(UserError, match="a samples: 21 then, 20 now"):
        receipt.check(data)
    with pytest.raises(UserError, match="samples 0 to 39: chain [0-9a-f]{32} then, [0-9a-f]{32} now"):
        advanced(data, range(40)).check(Data(shift=1))


def test_a_resume_looks_at_a_bounded_number_of_samples() -> None:
    data = Data()
    total = 3 * LINK_EVERY + 5
    receipt = advanced(data, *(range(k, min(k + 1000, total)) for k in range(0, total, 1000)))
    assert [samples for samples, _ in receipt.links] == [2 * LINK_EVERY, 3 * LINK_EVERY]
    data.computed = 0
    receipt.check(data)
    assert data.computed == LINK_EVERY + 5
    # What was read long ago is looked at on request.
    first = receipt.links[0][1]
    receipt.links[0] = (receipt.links[0][0], "0" * 32)
    with pytest.raises(UserError, match=f"samples {2 * LINK_EVERY} to {total - 1}: chain"):
        receipt.check(data)
    receipt.links[0] = (receipt.links[0][0], first)
    data.computed = 0
    receipt.verify(data)
    assert data.computed == total + LINK_EVERY + 5
    receipt.source_tokens["b"] -= 1
    with pytest.raises(UserError, match="b tokens: "):
        receipt.verify(data)
