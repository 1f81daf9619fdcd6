"""Blends of sources: whose sample the n-th of a run is, and which of its own, as pure functions of n."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megapt.errors import UserError

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer[Any]]

LONGEST_PERIOD = 1 << 16
_LARGEST_RUN = 2**50  # samples; keeps `_share` exact


class BlendLike(Protocol):
    """What all blends answer. Sources are numbered as in `names`, samples from 0, and each source's own too."""

    names: tuple[str, ...]

    @property
    def fingerprint(self) -> str: ...

    def locate(self, sample_ids: Ids) -> tuple[Int64, Int64]:
        """(sources, ordinals) of samples [n]: sample ids[j] is the ordinals[j]-th of source sources[j]."""
        ...

    def counts(self, samples: int) -> Int64:
        """How many of the first `samples` samples each source gives: [k], summing to `samples`."""
        ...


class Blend:
    """A blend in constant shares: after every n samples each source has given floor or ceil of n * share.

    Shares are the weights over their sum, as exact fractions of the decimal numbers given, if their common
    denominator, the period, is at most 65,536; otherwise multiples of 1 / 65,536, rounded by largest remainder
    (`error` is the largest change). One period is a table, and sample n is looked up at n modulo the period.

    The table is a Pfair schedule on one machine (Baruah, Cohen, Plaxton & Varvel 1996, "Proportionate
    progress"): the j-th sample (from 0) of a source of share w is due in the slots floor(j / w) to
    ceil((j + 1) / w) - 1, and each slot takes the sample whose last slot comes first. This always succeeds: a
    source has at most floor(b * w) - ceil(a * w) samples due within slots [a, b), all sources together at most
    b - a, so no interval is overfull (Hall) and, as all last b * w jobs fill the period, no slot stays empty.
    A sample given in its slots keeps the source strictly within one sample of n * w at every n.

    Attributes: `names`; `weights` (float64 [k], the shares as used); `period`; `error`. UserError for weights that are
    negative, not finite or all zero, and for a share that is positive but below 1 / 65,536.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.names = tuple(weights)
        asked = _shares(weights)
        self._quota = _quotas(self.names, asked)
        self.period = int(self._quota.sum())
        self.weights: Float64 = self._quota / self.period
        exact = [Fraction(int(count), self.period) for count in self._quota]
        self.error = float(max(abs(used - wanted) for used, wanted in zip(exact, asked, strict=True)))
        self._sources, self._ordinals = _pfair_period(self._quota)

    @property
    def fingerprint(self) -> str:
        """One word that names the sources, their shares and the rule."""
        return _fingerprint("pfair-1", self.names, self._quota.tolist())

    def locate(self, sample_ids: Ids) -> tuple[Int64, Int64]:
        """(sources, ordinals), each int64 [n], of samples [n]. IndexError below sample 0."""
        periods, slots = np.divmod(_from_zero(sample_ids), self.period)
        sources = self._sources[slots]
        return sources, periods * self._quota[sources] + self._ordinals[slots]

    def counts(self, samples: int) -> Int64:
        """How many of the first `samples` samples each source gives: int64 [k]."""
        periods, slots = divmod(samples, self.period)
        return periods * self._quota + np.bincount(self._sources[:slots], minlength=len(self.names))


class BudgetBlend:
    """A blend that gives every source a budget of tokens, used up by all at once after `total` samples.

    A budget is rounded to whole samples of `sequence` tokens (`budgets`, int64 [k]) and met exactly at
    `total`, however long the run; `weights` (float64 [k]) are their shares of it. Past `total` the same begins
    anew.

    The sources are the leaves of a Huffman tree. At an inner node the left side has been given
    round(m * left / (left + right)) of the node's first m samples. Each rounding is off by at most 1/2, and an
    ancestor's error passes on in proportion, so a source of budget w strays from its share by at most
    1/2 * (1 + the sum of w / budget over the inner nodes between it and the root) samples. `deviation` is the
    largest of these: often below 1, and below 1.7 for any budgets, as in a Huffman tree a node's budget
    is at least the sum of a child's and that child's child's, and so grows like Fibonacci's numbers.

    UserError for budgets that are negative, all zero, or too large.
    """

    def __init__(self, tokens: Mapping[str, int], sequence: int) -> None:
        self.names = tuple(tokens)
        if not self.names or any(count < 0 for count in tokens.values()):
            raise UserError(f"token budgets must be 0 or more, and there must be one; given: {_listed(tokens)}")
        samples = [(int(count) + sequence // 2) // sequence for count in tokens.values()]
        self.total = sum(samples)
        if not 0 < self.total <= _LARGEST_RUN:
            raise UserError(f"the token budgets ({_listed(tokens)}) make {self.total} samples of {sequence} tokens; "
                            f"there must be 1 to {_LARGEST_RUN}")
        self.budgets: Int64 = np.array(samples, np.int64)
        self.weights: Float64 = self.budgets / self.total
        self._tree = _huffman(samples)
        self.deviation = max(_stray(self._tree, 0.0))

    @property
    def fingerprint(self) -> str:
        """One word that names the sources, their budgets and the rule."""
        return _fingerprint("budgets-1", self.names, self.budgets.tolist())

    def locate(self, sample_ids: Ids) -> tuple[Int64, Int64]:
        """(sources, ordinals), each int64 [n], of samples [n]. IndexError below sample 0."""
        ids = _from_zero(sample_ids)
        rounds: Int64 = ids // self.total
        within: Int64 = ids - rounds * self.total
        sources, ordinals = np.empty_like(ids), np.empty_like(ids)
        pending = [(self._tree, np.arange(ids.size), within.ravel())]
        while pending:
            node, places, slots = pending.pop()
            if node.sides is None:
                sources.flat[places], ordinals.flat[places] = node.source, slots
                continue
            left, right = node.sides
            before = _share(slots, left.budget, node.budget)
            goes_left = _share(slots + 1, left.budget, node.budget) > before
            pending.append((left, places[goes_left], before[goes_left]))
            pending.append((right, places[~goes_left], (slots - before)[~goes_left]))
        return sources, ordinals + rounds * self.budgets[sources]

    def counts(self, samples: int) -> Int64:
        """How many of the first `samples` samples each source gives: int64 [k]."""
        rounds, within = divmod(samples, self.total)
        counts = rounds * self.budgets
        pending = [(self._tree, within)]
        while pending:
            node, given = pending.pop()
            if node.sides is None:
                counts[node.source] += given
                continue
            left, right = node.sides
            first = (2 * given * left.budget + node.budget) // (2 * node.budget)
            pending += [(left, first), (right, given - first)]
        return counts


class PhasedBlend:
    """Blends that follow one another: `phases` are (first sample, weights), the first of them from sample 0.

    Each phase is a `Blend` that begins at its first sample, with all that a `Blend` promises from there on; the
    sources' ordinals run on from phase to phase. The names are those of the first phase, which gives 0 to
    sources that come later; a name left out of a later phase has weight 0 there. Attributes: `names`; `firsts` (first
    samples) and `blends` of the phases.

    UserError if the phases do not begin at 0 and increase, or a later one names a source that the first lacks.
    """

    def __init__(self, phases: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        firsts = [first for first, _ in phases]
        if not firsts or firsts[0] != 0 or any(b <= a for a, b in zip(firsts, firsts[1:], strict=False)):
            raise UserError(f"the phases of a blend begin at samples {firsts}; the first must be 0 and each later "
                            "one greater than the one before it")
        self.names = tuple(phases[0][1])
        for first, weights in phases:
            unknown = [name for name in weights if name not in self.names]
            if unknown:
                raise UserError(f"the phase from sample {first} has weights for {', '.join(unknown)}, but the sources "
                                f"are {', '.join(self.names)}")
        self.blends = [Blend({name: weights.get(name, 0) for name in self.names}) for _, weights in phases]
        self.firsts = firsts
        self._firsts = np.array(firsts, np.int64)
        given = [blend.counts(end - begin)
                 for blend, begin, end in zip(self.blends, firsts, firsts[1:], strict=False)]
        self._given: Int64 = np.cumsum([np.zeros(len(self.names), np.int64), *given], axis=0)

    @property
    def fingerprint(self) -> str:
        """One word that names the sources, the phases, their shares and the rule."""
        parts = [(int(first), blend.fingerprint) for first, blend in zip(self._firsts, self.blends, strict=True)]
        return _fingerprint("phases-1", self.names, parts)

    def locate(self, sample_ids: Ids) -> tuple[Int64, Int64]:
        """(sources, ordinals), each int64 [n], of samples [n]. IndexError below sample 0."""
        ids = _from_zero(sample_ids)
        phases = np.searchsorted(self._firsts, ids, side="right") - 1
        sources, ordinals = np.empty_like(ids), np.empty_like(ids)
        for phase in np.unique(phases).tolist():
            chosen = phases == phase
            found, within = self.blends[phase].locate(ids[chosen] - self._firsts[phase])
            sources[chosen], ordinals[chosen] = found, within + self._given[phase][found]
        return sources, ordinals

    def counts(self, samples: int) -> Int64:
        """How many of the first `samples` samples each source gives: int64 [k]."""
        phase = max(int(np.searchsorted(self._firsts, samples, side="left")) - 1, 0)
        return self._given[phase] + self.blends[phase].counts(samples - int(self._firsts[phase]))


class _Node:
    """A subtree of the budget tree: `source` of a leaf, or the two `sides` of an inner node."""

    def __init__(self, budget: int, source: int, sides: tuple[_Node, _Node] | None = None) -> None:
        self.budget, self.source, self.sides = budget, source, sides


def _huffman(budgets: Sequence[int]) -> _Node:
    """The tree of all sources with a budget: the two smallest nodes are joined until one is left."""
    heap = [(budget, source, _Node(budget, source)) for source, budget in enumerate(budgets) if budget]
    heapq.heapify(heap)
    for label in range(len(budgets), len(budgets) + len(heap) - 1):
        small, _, left = heapq.heappop(heap)
        large, _, right = heapq.heappop(heap)
        heapq.heappush(heap, (small + large, label, _Node(small + large, label, (left, right))))
    return heap[0][2]


def _stray(node: _Node, above: float) -> list[float]:
    """Each leaf's bound of deviation, given the bound of the node itself (0 for the root, which is exact)."""
    if node.sides is None:
        return [above]
    return [bound for side in node.sides for bound in _stray(side, 0.5 + above * side.budget / node.budget)]


def _share(samples: Int64, part: int, whole: int) -> Int64:
    """round(samples * part / whole), half up, exactly, for samples <= whole and part <= whole up to 2^50.

    The products need more than 64 bits. The quotient is estimated in float64, off by a few at most; what then
    remains is small, so that its value modulo 2^64 is its value, and corrects the estimate.
    """
    estimate = (samples * (part / whole)).astype(np.int64)
    values = samples.astype(np.uint64) * np.uint64(2 * part) + np.uint64(whole)
    remains = (values - estimate.astype(np.uint64) * np.uint64(2 * whole)).view(np.int64)
    return estimate + remains // (2 * whole)


def _shares(weights: Mapping[str, float]) -> list[Fraction]:
    values = {name: float(weight) for name, weight in weights.items()}
    if any(not math.isfinite(value) or value < 0 for value in values.values()) or not any(values.values()):
        raise UserError("the weights of a blend must be finite, 0 or more, and not all 0; given: "
                        f"{_listed(values) or 'none'}")
    exact = [Fraction(repr(value)) for value in values.values()]  # 0.1 is one tenth, as it was written
    return [value / sum(exact) for value in exact]


def _quotas(names: Sequence[str], shares: Sequence[Fraction]) -> Int64:
    """Samples per period [k]."""
    period = math.lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        period = LONGEST_PERIOD
        for name, share in zip(names, shares, strict=True):
            if 0 < share < Fraction(1, period):
                raise UserError(f"source {name} has a share of {float(share):.3g} of the blend; the smallest possible "
                                f"one is 1/{period} ({1 / period:.3g}): raise its weight, or give the sources token "
                                "budgets, which may be as small as one sample")
    ideal = [share * period for share in shares]
    quotas = [math.floor(value) for value in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: quotas[i] - ideal[i])
    for i in by_remainder[:period - sum(quotas)]:
        quotas[i] += 1
    return np.array(quotas, np.int64)


def _pfair_period(quotas: Int64) -> tuple[Int64, Int64]:
    """(sources, ordinals within the period), each [period]; see Blend."""
    period = int(quotas.sum())
    job_sources = np.repeat(np.arange(len(quotas)), quotas)
    job_ordinals = np.arange(period) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    released = job_ordinals * period // quotas[job_sources]
    due = -(-(job_ordinals + 1) * period // quotas[job_sources])
    order = np.argsort(released, kind="stable")
    arrivals = released[order].tolist()
    # The heap holds (due, source) as one number: comparing whole numbers is fastest.
    keys = (due * len(quotas) + job_sources)[order].tolist()
    waiting: list[int] = []
    chosen = []
    at = 0
    for slot in range(period):
        while at < period and arrivals[at] <= slot:
            heapq.heappush(waiting, keys[at])
            at += 1
        chosen.append(heapq.heappop(waiting))
    last, sources = np.divmod(np.array(chosen, np.int64), len(quotas))
    assert (last > np.arange(period)).all(), "a sample came after its last slot"
    ordinals = np.empty(period, np.int64)
    ordinals[np.argsort(sources, kind="stable")] = job_ordinals
    return sources, ordinals


def _from_zero(sample_ids: Ids) -> Int64:
    ids = np.asarray(sample_ids, np.int64)
    if ids.size and int(ids.min()) < 0:
        raise IndexError(f"sample {int(ids.min())}: samples are numbered from 0")
    return ids


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _fingerprint(rule: str, names: Sequence[str], parts: Sequence[Any]) -> str:
    digest = hashlib.blake2b(repr((rule, list(names), list(parts))).encode(), digest_size=16)
    return f"{rule}:{digest.hexdigest()}"
