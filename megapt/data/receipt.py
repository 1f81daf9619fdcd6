"""What a run has consumed, in a form that a checkpoint can carry and a resume can check."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from megapt.errors import UserError

LINK_EVERY = 1 << 16  # samples between two links that are kept
_CHUNK = 1 << 16  # samples recomputed at a time

Ids = npt.NDArray[np.integer[Any]]


class Recorded(Protocol):
    """What a receipt asks of a data set; CompositeDataset answers it."""

    def facts(self) -> dict[str, str]: ...

    def records(self, ids: Ids) -> npt.NDArray[np.int64]: ...

    def token_counts(self, ids: Ids) -> dict[str, int]: ...

    def source_samples(self, samples: int) -> dict[str, int]: ...


@dataclass
class Receipt:
    """What was read: facts on the data, samples and tokens of each source, and a hash chain over every sample.

    The chain's value after sample n is blake2b-128(value before | n | record of n), where the record says what the
    sample's number stands for: its source, its number there, the epoch, and its place in the data. It takes one sample
    at a time, so it depends on the samples and their order alone: not on data-parallel size, micro-batch size, or where
    one step ends and the next begins.

    links: [samples, value] of the chain at the last two multiples of LINK_EVERY samples, the start included. From the
    first of them `check` computes the chain again, so that a resume looks at LINK_EVERY to 2 * LINK_EVERY samples
    however long the run was; `verify` computes all of it.
    """

    facts: dict[str, str]
    samples: int = 0
    chain: str = ""
    source_samples: dict[str, int] = field(default_factory=dict)
    source_tokens: dict[str, int] = field(default_factory=dict)
    links: list[tuple[int, str]] = field(default_factory=lambda: [(0, "")])

    @classmethod
    def of(cls, data: Recorded) -> Self:
        """The receipt of a run that has read nothing yet."""
        none = dict.fromkeys(data.source_samples(0), 0)
        return cls(data.facts(), source_samples=none, source_tokens=dict(none))

    def advance(self, data: Recorded, sample_ids: Ids) -> None:
        """Take in the samples [n] of a whole global batch, in their order."""
        ids = np.asarray(sample_ids, np.int64)
        records = data.records(ids)
        number = np.bincount(records[:, 0], minlength=len(self.source_samples))
        for name, more in zip(self.source_samples, number.tolist(), strict=True):
            self.source_samples[name] += more
        for name, more in data.token_counts(ids).items():
            self.source_tokens[name] += more
        rows = np.column_stack([ids, records]).astype("<i8")
        chain, step = bytes.fromhex(self.chain), rows.shape[1] * rows.itemsize
        memory = memoryview(rows.tobytes())
        for start in range(0, len(memory), step):
            chain = hashlib.blake2b(chain + memory[start:start + step], digest_size=16).digest()
            self.samples += 1
            if self.samples % LINK_EVERY == 0:
                self.links = [*self.links[-1:], (self.samples, chain.hex())]
        self.chain = chain.hex()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"links": [list(link) for link in self.links]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. UserError if a value is missing or of the wrong type."""
        kinds = {"facts": dict, "samples": int, "chain": str}
        kinds |= {"source_samples": dict, "source_tokens": dict, "links": list}
        wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
        if not wrong and not all(isinstance(link, list) and len(link) == 2 for link in values["links"]):
            wrong = ["links"]
        if wrong:
            raise UserError(f"the data receipt lacks a valid {', '.join(wrong)}; it was not written by this program")
        receipt = cls(**{name: values[name] for name in kinds})
        receipt.links = [(int(samples), str(chain)) for samples, chain in values["links"]]
        return receipt

    def check(self, data: Recorded) -> None:
        """UserError unless the data, as it is opened now, gives what this receipt says was read: the message names
        what differs. Looks at the facts, each source's number of samples, and the chain from the older link on."""
        self._check_facts(data.facts())
        expected = data.source_samples(self.samples)
        if self.source_samples != expected:
            raise self._differs(_changes(self.source_samples, expected, " samples"))
        self._check_chain(data, *(self.links[0] if self.links else (0, "")))

    def verify(self, data: Recorded) -> None:
        """As `check`, with the chain of the whole run and each source's tokens computed again from sample 0."""
        self.check(data)
        again = self._check_chain(data, 0, "")
        if again.source_tokens != self.source_tokens:
            raise self._differs(_changes(self.source_tokens, again.source_tokens, " tokens"))

    def _check_facts(self, now: dict[str, str]) -> None:
        if now != self.facts:
            raise self._differs(_changes(self.facts, now))

    def _check_chain(self, data: Recorded, samples: int, chain: str) -> Receipt:
        again = Receipt.of(data)
        again.samples, again.chain = samples, chain
        for start in range(samples, self.samples, _CHUNK):
            again.advance(data, np.arange(start, min(start + _CHUNK, self.samples)))
        if again.chain != self.chain:
            place = f"samples {samples} to {self.samples - 1}"
            raise self._differs([f"{place}: chain {self.chain} then, {again.chain} now"])
        return again

    def _differs(self, changes: list[str]) -> UserError:
        return UserError(
            f"the data is not what the first {self.samples} samples of this run came from ({'; '.join(changes)}); "
            "resume with the same files, split, blend, packing, order, sequence length, objective and seed, or begin a "
            "new run from these weights (checkpoint.load)"
        )


def _changes(then: dict[str, Any], now: dict[str, Any], unit: str = "") -> list[str]:
    return [
        f"{key}{unit}: {then.get(key, 'absent')} then, {now.get(key, 'absent')} now"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
