"""What a run has consumed, in a form that a checkpoint can carry and a resume can check."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megapt.errors import UserError


@dataclass
class Receipt:
    """The data set's fingerprint, the number of samples consumed, and a hash chain over their ids in order.

    The chain takes one id at a time, so it depends on the samples and their order alone: not on data-parallel
    size, micro-batch size, or where one step ends and the next begins.
    """

    fingerprint: str
    samples: int = 0
    chain: str = ""

    def advance(self, sample_ids: npt.NDArray[np.integer[Any]]) -> None:
        """Take in the sample ids [n] of a whole global batch, in their order."""
        chain = bytes.fromhex(self.chain)
        data = np.ascontiguousarray(sample_ids, dtype="<i8").tobytes()
        for start in range(0, len(data), 8):
            chain = hashlib.blake2b(chain + data[start:start + 8], digest_size=16).digest()
        self.chain = chain.hex()
        self.samples += len(data) // 8

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. UserError if a value is missing or of the wrong type."""
        kinds = {"fingerprint": str, "samples": int, "chain": str}
        wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
        if wrong:
            raise UserError(f"the data receipt lacks a valid {', '.join(wrong)}; it was not written by "
                            "this program")
        return cls(**{name: values[name] for name in kinds})

    def check(self, dataset_fingerprint: str) -> None:
        """UserError unless the data set is the one of this receipt; the message names what differs.

        Fingerprints are `key=value` words, as TokenDataset.fingerprint gives them.
        """
        if dataset_fingerprint == self.fingerprint:
            return
        then, now = _words(self.fingerprint), _words(dataset_fingerprint)
        changes = [f"{key}: {then.get(key, 'absent')} then, {now.get(key, 'absent')} now"
                   for key in {**then, **now} if then.get(key) != now.get(key)]
        raise UserError(f"the data is not what the first {self.samples} samples of this run came from "
                        f"({'; '.join(changes)}); resume with the same data, split, sequence length and "
                        "seed, or begin a new run from these weights")


def _words(fingerprint: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in fingerprint.split())
    return {key: value for key, _, value in pairs}
