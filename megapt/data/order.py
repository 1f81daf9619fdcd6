"""Data order as arithmetic: splits, keyed permutations and the place of every sample, with nothing built or
stored. docs/data-order.md works an example."""

from __future__ import annotations

import hashlib
import math
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
_BLOCK = 1 << 14  # indices permuted at a time: they and their temporaries stay in a core's cache
_LARGEST = 2**63 - 1


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
        self._keys = mix(counters + np.uint64(key & (2**64 - 1)))

    def __call__(self, indices: npt.NDArray[np.integer[Any]]) -> Int64:
        """Map indices in [0, n), of any shape, to int64 of the same shape. IndexError outside [0, n)."""
        given = np.asarray(indices)
        if given.size and (int(given.min()) < 0 or int(given.max()) >= self.n):
            raise IndexError(f"indices {int(given.min())} to {int(given.max())} outside [0, {self.n})")
        flat = given.ravel()
        image = np.empty(flat.shape, np.int64)
        for start in range(0, len(flat), _BLOCK):
            values = self._pass(flat[start:start + _BLOCK].astype(np.uint64))
            outside = np.flatnonzero(values >= self.n)
            while len(outside):
                values[outside] = again = self._pass(values[outside])
                outside = outside[again >= self.n]
            image[start:start + _BLOCK] = values
        return image.reshape(given.shape)

    def _pass(self, values: _UInt64) -> _UInt64:
        low, high = values & self._low_mask, values >> self._low_bits
        for k in range(0, _ROUNDS, 2):
            high = high ^ (mix(low + self._keys[k]) & self._high_mask)
            low = low ^ (mix(high + self._keys[k + 1]) & self._low_mask)
        return (high << self._low_bits) | low


def mix(values: _UInt64) -> _UInt64:
    """The splitmix64 finaliser: a bijection of 64-bit integers in which every input bit moves every output
    bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SampleOrder:
    """Training order: which tokens sample s reads, a pure function of (num_tokens, sequence, seed, identity).

    The `num_tokens` tokens form a ring that is read over and over: an endless stream, cut every `sequence`
    tokens without a gap. The sample cut at stream position p reads the sequence + 1 tokens from p and predicts
    those at p + 1, ..., p + sequence, so the samples' labels cover the stream exactly once. Epoch e owns the
    samples whose cut lies in [e * num_tokens, (e + 1) * num_tokens), floor or ceil of num_tokens / sequence
    of them, and permutes them among themselves. An epoch's last sample may run on into the next reading of the
    ring, whose first cut then comes later: the cuts move through the ring from epoch to epoch by themselves.

    Where the ring begins is drawn from the seed. After sequence / gcd(num_tokens, sequence) epochs the cuts
    fall on the ring's beginning again; from there on another beginning is drawn, so that the cuts move even
    where `sequence` divides `num_tokens`.

    `identity` (a fingerprint or name) keeps apart the orders of data sets that share a seed; `label` only
    says in errors which data is meant. UserError if num_tokens < sequence + 1, or if a sample's place in the
    stream does not fit 63 bits.
    """

    kind = "arithmetic-2"

    def __init__(self, num_tokens: int, sequence: int, seed: int, identity: str = "",
                 label: str = "") -> None:
        _check_enough(num_tokens, sequence, label)
        if num_tokens > _LARGEST // 4:
            raise UserError(f"{num_tokens} tokens{_where(label)} are too many; at most {_LARGEST // 4} are possible")
        self.num_tokens, self.sequence, self.seed, self.identity = num_tokens, sequence, seed, identity
        self._round = sequence // math.gcd(num_tokens, sequence)  # epochs until the cuts meet the ring's beginning
        self._last = (_LARGEST - 2 * num_tokens) // sequence

    def first_sample(self, epoch: int) -> int:
        """The number of epoch `epoch`'s first sample: how many samples all epochs before it have."""
        return -(-epoch * self.num_tokens // self.sequence)

    def samples_in_epoch(self, epoch: int) -> int:
        """num_tokens / sequence, rounded down or up."""
        return self.first_sample(epoch + 1) - self.first_sample(epoch)

    def epoch_of(self, sample_ids: npt.NDArray[np.integer[Any]]) -> Int64:
        """The epochs of samples [n]. IndexError below sample 0; UserError past 63 bits."""
        ids = _from_zero(sample_ids)
        if ids.size and int(ids.max()) > self._last:
            raise UserError(f"sample {int(ids.max())} of {self.sequence} tokens lies too far out; the last one whose "
                            f"place fits 63 bits is {self._last}")
        return ids * self.sequence // self.num_tokens

    def starts(self, sample_ids: npt.NDArray[np.integer[Any]]) -> tuple[Int64, Int64]:
        """(epochs, starts) of samples [n], numbered from 0 across all epochs; a start is in [0, num_tokens).

        A sample's tokens are start, start + 1, ..., start + sequence, modulo num_tokens.
        """
        ids = _from_zero(sample_ids)
        epochs = self.epoch_of(ids)
        starts = np.empty_like(ids)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            first = self.first_sample(epoch)
            key = derive_key("shuffle", self.seed, self.identity, epoch)
            within = KeyedPermutation(self.samples_in_epoch(epoch), key)(ids[chosen] - first)
            cuts = (first + within) * self.sequence - epoch * self.num_tokens
            starts[chosen] = (cuts + self._beginning(epoch)) % self.num_tokens
        return epochs, starts

    def lengths(self, sample_ids: npt.NDArray[np.integer[Any]]) -> Int64:
        """How many tokens samples [n] predict: `sequence`, all of them."""
        return np.full(np.shape(sample_ids), self.sequence, np.int64)

    def _beginning(self, epoch: int) -> int:
        return derive_key("beginning", self.seed, self.identity, epoch // self._round) % self.num_tokens


class ItemOrder:
    """Training order over `num_items` whole items (packed bins, rows): every epoch is all of them, permuted.

    Item ids are a pure function of (num_items, seed, identity). UserError if there is no item.
    """

    kind = "items-1"

    def __init__(self, num_items: int, seed: int, identity: str = "", label: str = "") -> None:
        if num_items < 1:
            raise UserError(f"there is nothing to train on{_where(label)}: {num_items} samples; "
                            "at least 1 is needed")
        self.num_items, self.seed, self.identity = num_items, seed, identity

    def first_sample(self, epoch: int) -> int:
        """The number of epoch `epoch`'s first sample."""
        return epoch * self.num_items

    def samples_in_epoch(self, epoch: int) -> int:
        """`num_items`, in every epoch."""
        return self.num_items

    def epoch_of(self, sample_ids: npt.NDArray[np.integer[Any]]) -> Int64:
        """The epochs of samples [n]. IndexError below sample 0."""
        return _from_zero(sample_ids) // self.num_items

    def items(self, sample_ids: npt.NDArray[np.integer[Any]]) -> tuple[Int64, Int64]:
        """(epochs, items) of samples [n], numbered from 0 across all epochs; an item is in [0, num_items)."""
        ids = _from_zero(sample_ids)
        epochs, within = np.divmod(ids, self.num_items)
        items = np.empty_like(ids)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            key = derive_key("items", self.seed, self.identity, epoch)
            items[chosen] = KeyedPermutation(self.num_items, key)(within[chosen])
        return epochs, items


class SequentialOrder:
    """Evaluation order: sample s reads on from token s * sequence; one epoch, no ring.

    Every token but the first is predicted exactly once: the last sample takes what is left and may be
    shorter. UserError if num_tokens < 2.
    """

    kind = "sequential-2"

    def __init__(self, num_tokens: int, sequence: int, label: str = "") -> None:
        _check_sequence(sequence)
        if num_tokens < 2:
            raise UserError(f"{num_tokens} tokens{_where(label)} are too few to evaluate; there must be one to predict "
                            "and one to predict it from")
        self.num_tokens, self.sequence = num_tokens, sequence
        self.num_samples = -(-(num_tokens - 1) // sequence)

    def starts(self, sample_ids: npt.NDArray[np.integer[Any]]) -> tuple[Int64, Int64]:
        """(epochs, starts) of samples [n]; all epochs are 0. IndexError outside [0, num_samples)."""
        ids = _from_zero(sample_ids)
        if ids.size and int(ids.max()) >= self.num_samples:
            raise IndexError(f"sample {int(ids.max())} of {self.num_samples}")
        return np.zeros_like(ids), ids * self.sequence

    def lengths(self, sample_ids: npt.NDArray[np.integer[Any]]) -> Int64:
        """How many tokens samples [n] predict, from length + 1 tokens each: `sequence`, or fewer for the last."""
        _, starts = self.starts(sample_ids)
        return np.minimum(self.num_tokens - 1 - starts, self.sequence)


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


def _from_zero(sample_ids: npt.NDArray[np.integer[Any]]) -> Int64:
    ids = np.asarray(sample_ids, dtype=np.int64)
    if ids.size and int(ids.min()) < 0:
        raise IndexError(f"sample {int(ids.min())}: samples are numbered from 0")
    return ids


def _where(label: str) -> str:
    return f" in {label}" if label else ""


def _check_sequence(sequence: int) -> None:
    if sequence < 1:
        raise UserError(f"a sequence length of {sequence} is not possible; it must be 1 or more")


def _check_enough(num_tokens: int, sequence: int, label: str) -> None:
    _check_sequence(sequence)
    if num_tokens < sequence + 1:
        raise UserError(f"{num_tokens} tokens{_where(label)} are too few for one sample of {sequence} + 1 tokens; "
                        f"the longest possible sequence is {max(num_tokens - 1, 0)}")
