"""Data order as arithmetic: splits, keyed permutations and the place of every sample, with nothing built or
stored."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from megapt.errors import UserError

SPLITS = ("train", "valid", "test")

Int64 = npt.NDArray[np.int64]
_UInt64 = npt.NDArray[np.uint64]
_ROUNDS = 8


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from the parts: the same on every machine, and different for ("ab", "c") and ("a",
    "bc")."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = (f"str:{part}" if isinstance(part, str) else f"int:{int(part)}").encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


class KeyedPermutation:
    """A pseudo-random bijection of [0, n) computed on demand: O(1) memory for any n up to 2^63.

    An alternating Feistel network over the smallest power of two that holds n, whose round function is the
    splitmix64 finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"). Values
    that fall outside [0, n) are sent through again until they fall inside ("cycle walking", Black & Rogaway
    2002, "Ciphers with arbitrary finite domains"): under two passes on average.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= 2**63:
            raise ValueError(f"a permutation needs 1 <= n <= 2^63, not {n}")
        self.n = n
        bits = (n - 1).bit_length()
        self._low_bits = np.uint64((bits + 1) // 2)
        self._low_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits // 2)) - 1)
        counters = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._keys = _mix(counters + np.uint64(key & (2**64 - 1)))

    def __call__(self, indices: npt.NDArray[np.integer[Any]]) -> Int64:
        """Map indices in [0, n), of any shape, to int64 of the same shape. IndexError outside [0, n)."""
        given = np.asarray(indices)
        if given.size and (int(given.min()) < 0 or int(given.max()) >= self.n):
            raise IndexError(f"indices {int(given.min())} to {int(given.max())} outside [0, {self.n})")
        values = self._pass(given.ravel().astype(np.uint64))
        outside = values >= self.n
        while outside.any():
            values[outside] = self._pass(values[outside])
            outside = values >= self.n
        return values.astype(np.int64).reshape(given.shape)

    def _pass(self, values: _UInt64) -> _UInt64:
        low, high = values & self._low_mask, values >> self._low_bits
        for k in range(0, _ROUNDS, 2):
            high = high ^ (_mix(low + self._keys[k]) & self._high_mask)
            low = low ^ (_mix(high + self._keys[k + 1]) & self._low_mask)
        return (high << self._low_bits) | low


def _mix(values: _UInt64) -> _UInt64:
    """The splitmix64 finaliser: a bijection of 64-bit integers in which every input bit moves every output
    bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SampleOrder:
    """Training order: which tokens sample s reads, a pure function of (num_tokens, sequence, seed, identity).

    The stream of `num_tokens` tokens is read as a ring. In epoch e the ring is cut at offset(e), offset(e) +
    sequence, ..., into num_tokens // sequence samples, and the samples are shuffled by a permutation keyed
    with e. A sample reads sequence + 1 tokens, sharing one with its successor on the ring, so within an epoch
    every token is predicted at most once, and exactly once but for the last `num_tokens % sequence` tokens in
    front of the cut, fewer than one sample; as the offset changes with the epoch, so does this gap. At most
    one sample per epoch runs over the end of the stream and goes on at its start. Every epoch has the same
    number of samples.

    `identity` (a fingerprint or name) keeps apart the orders of data sets that share a seed; `label` only
    says in errors which data is meant. UserError if num_tokens < sequence + 1.
    """

    kind = "arithmetic-1"

    def __init__(self, num_tokens: int, sequence: int, seed: int, identity: str = "",
                 label: str = "") -> None:
        _check_enough(num_tokens, sequence, label)
        self.num_tokens, self.sequence, self.seed, self.identity = num_tokens, sequence, seed, identity
        self.samples_per_epoch = num_tokens // sequence

    def offset(self, epoch: int) -> int:
        """Where epoch `epoch` makes its first cut: a token position in [0, sequence)."""
        return derive_key("offset", self.seed, self.identity, epoch) % self.sequence

    def starts(self, sample_ids: npt.NDArray[np.integer[Any]]) -> tuple[Int64, Int64]:
        """(epochs, starts) of samples [n], numbered from 0 across all epochs; a start is in [0, num_tokens).

        A sample's tokens are start, start + 1, ..., start + sequence, modulo num_tokens.
        """
        ids = np.asarray(sample_ids, dtype=np.int64)
        if ids.size and int(ids.min()) < 0:
            raise IndexError(f"sample {int(ids.min())}: samples are numbered from 0")
        epochs, within = np.divmod(ids, self.samples_per_epoch)
        starts = np.empty_like(ids)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            key = derive_key("shuffle", self.seed, self.identity, epoch)
            shuffle = KeyedPermutation(self.samples_per_epoch, key)
            starts[chosen] = (self.offset(epoch) + shuffle(within[chosen]) * self.sequence) % self.num_tokens
        return epochs, starts


class SequentialOrder:
    """Evaluation order: sample s reads the sequence + 1 tokens from s * sequence; one epoch, no ring.

    The last (num_tokens - 1) % sequence tokens of the stream are left out. UserError if num_tokens < sequence
    + 1.
    """

    kind = "sequential"

    def __init__(self, num_tokens: int, sequence: int, label: str = "") -> None:
        _check_enough(num_tokens, sequence, label)
        self.num_tokens, self.sequence = num_tokens, sequence
        self.samples_per_epoch = (num_tokens - 1) // sequence

    def starts(self, sample_ids: npt.NDArray[np.integer[Any]]) -> tuple[Int64, Int64]:
        """(epochs, starts) of samples [n]; all epochs are 0. IndexError outside [0, samples_per_epoch)."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.samples_per_epoch):
            raise IndexError(f"samples {int(ids.min())} to {int(ids.max())} of {self.samples_per_epoch}")
        return np.zeros_like(ids), ids * self.sequence


def split_ranges(split: str, num_sequences: int,
                 requested: Collection[str] = SPLITS) -> tuple[tuple[int, int], ...]:
    """The sequence ranges [lo, hi) of train, valid and test that Megatron derives from a split such as
    "969,30,1".

    Shares are normalised by their sum and cumulated in float64, and bounds are rounded as Python rounds (half
    to even). A share of zero gives an empty range. UserError if the text is no split, or if one of the
    `requested` splits has a share but gets no sequence.
    """
    found = re.findall(r"[.0-9]+", split)
    try:
        shares = [float(number) for number in found]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or sum(shares) <= 0:
        raise UserError(f'split "{split}" must be one to three numbers for train, valid and test with a '
                        'positive sum, such as "969,30,1"')
    weights = np.array(shares + [0.0] * (3 - len(shares)), np.float64)
    normal: list[float] = (weights / weights.sum()).tolist()
    bounds = [0.0]
    for share in normal:
        bounds.append(bounds[-1] + share)
    cuts = [int(round(bound * num_sequences)) for bound in bounds]
    ranges = tuple(zip(cuts[:-1], cuts[1:], strict=True))
    for name, share, (low, high) in zip(SPLITS, normal, ranges, strict=True):
        if name in requested and share > 0 and low == high:
            counts = ", ".join(f"{other} {hi - lo}" for other, (lo, hi) in zip(SPLITS, ranges, strict=True))
            raise UserError(f'split "{split}" of {num_sequences} sequences leaves {name} empty ({counts}): '
                            f"a share of {share:.3g} rounds to none; give {name} a share of at least "
                            f"{1 / max(num_sequences, 1):.3g} of the whole, or 0")
    return ranges


def _check_enough(num_tokens: int, sequence: int, label: str) -> None:
    if sequence < 1:
        raise UserError(f"a sequence length of {sequence} is not possible; it must be 1 or more")
    if num_tokens < sequence + 1:
        where = f" in {label}" if label else ""
        raise UserError(f"{num_tokens} tokens{where} are too few for one sample of {sequence} + 1 tokens; "
                        f"the longest possible sequence is {max(num_tokens - 1, 0)}")
