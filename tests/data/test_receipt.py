from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest

from megapt.data.receipt import Receipt
from megapt.errors import UserError


def test_chain_is_a_plain_hash_chain() -> None:
    receipt = Receipt("x")
    receipt.advance(np.array([5, 2**40]))
    chain = b""
    for sample in (5, 2**40):
        chain = hashlib.blake2b(chain + struct.pack("<q", sample), digest_size=16).digest()
    assert (receipt.chain, receipt.samples) == (chain.hex(), 2)


def test_chain_depends_on_the_order_of_samples_alone() -> None:
    def chain(*batches: list[int]) -> tuple[str, int]:
        receipt = Receipt("x")
        for batch in batches:
            receipt.advance(np.array(batch, np.int32))
        return receipt.chain, receipt.samples

    assert chain([0, 1, 2, 3]) == chain([0, 1], [2, 3]) == chain([0], [], [1, 2, 3])
    assert len({chain([0, 1, 2]), chain([1, 0, 2]), chain([0, 1]), chain([0, 1, 3])}) == 4


def test_resume_through_json() -> None:
    whole, first = Receipt("x"), Receipt("x")
    whole.advance(np.arange(10))
    first.advance(np.arange(4))
    resumed = Receipt.from_dict(json.loads(json.dumps(first.to_dict())))
    resumed.advance(np.arange(4, 10))
    assert resumed == whole
    with pytest.raises(UserError, match="lacks a valid samples, chain"):
        Receipt.from_dict({"fingerprint": "x", "samples": "4"})


def test_check_names_what_differs() -> None:
    receipt = Receipt("files=ab split=train sequence=16 seed=1", samples=40)
    receipt.check("files=ab split=train sequence=16 seed=1")
    with pytest.raises(UserError) as error:
        receipt.check("files=ab split=train sequence=32 seed=1 blend=2")
    assert "(sequence: 16 then, 32 now; blend: absent then, 2 now)" in str(error.value)
    assert "40 samples" in str(error.value)
