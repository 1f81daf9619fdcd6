"""Who keeps a run that hangs waiting, and the sentence that says so: from where its ranks are, without a clock.

Where the host waits for operations (gloo; NCCL while it makes a communicator) a rank in one that others have not come
to waits for these, and whoever is waited for and waits for nobody is missing. On a GPU the host runs ahead of the
device and seldom waits; there a rank is missing that has issued less than others, and nowhere more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megapt.operations import Blocked, Place, in_words

# A sentence about a thousand ranks is read at once all the same.
_NAMED_AT_MOST = 8
_DESCRIBED_AT_MOST = 3


@dataclass(frozen=True)
class Diagnosis:
    """missing: the ranks for which the others wait, in the end; empty if that cannot be told. circle: ranks of which
    each waits for the next. waits: per waiting rank, for whom."""

    missing: list[int] = field(default_factory=list)
    circle: list[int] = field(default_factory=list)
    waits: dict[int, set[int]] = field(default_factory=dict)


def diagnose(places: Mapping[int, Place]) -> Diagnosis:
    """Who waits for whom; `places`: of every rank."""
    waits = _by_waiting(places) or _by_counts(places)
    if not waits:
        return Diagnosis()
    waited_for = set().union(*waits.values())
    missing = sorted(rank for rank in waited_for if rank not in waits)
    return Diagnosis(missing, [] if missing else _circle(waits), waits)


def _by_waiting(places: Mapping[int, Place]) -> dict[int, set[int]]:
    """From operations in which the process waits to the ranks that have not issued them."""
    members = _members(places)
    waits = {}
    for rank, place in places.items():
        blocked = place.blocked
        if blocked is None:
            continue
        others = members[blocked.queue] if blocked.peer is None else [blocked.peer]
        behind = {r for r in others if r in places and places[r].issued.get(blocked.queue, 0) < blocked.number}
        if behind:
            waits[rank] = behind
    return waits


def _by_counts(places: Mapping[int, Place]) -> dict[int, set[int]]:
    """From ranks that have issued more collectives of a group than others to these others."""
    waits: dict[int, set[int]] = {}
    for queue, ranks in _members(places).items():
        counts = {rank: places[rank].issued[queue] for rank in ranks}
        last = min(counts.values())
        behind = {rank for rank, count in counts.items() if count == last}
        for rank in counts.keys() - behind:
            waits.setdefault(rank, set()).update(behind)
    return waits


def _members(places: Mapping[int, Place]) -> dict[str, list[int]]:
    """The ranks of each queue. A transfer's is known to both ends only once they have used it."""
    found: dict[str, list[int]] = {}
    for rank, place in places.items():
        for queue in place.issued:
            found.setdefault(queue, []).append(rank)
    return found


def _circle(waits: Mapping[int, set[int]]) -> list[int]:
    """Ranks each of which waits for the next, and the last for the first; everybody in `waits` waits for others."""
    path = [min(waits)]
    while (following := min(waits[path[-1]])) not in path:
        path.append(following)
    return path[path.index(following) :]


def explain(places: Mapping[int, Place], describe: Callable[[int], str]) -> tuple[list[int], str]:
    """The ranks to look at first, and sentences that say why; nothing where the places do not tell.

    describe: a rank in words, such as "rank 5 (pp 1, dp 0, tp 1)".
    """
    found = diagnose(places)
    report = _Report(places, describe, found.waits)
    if found.missing:
        return found.missing, report.missing(found.missing)
    if found.circle:
        links = report.listed(found.circle, _NAMED_AT_MOST)
        return found.circle, f"Ranks wait for each other in a circle: {links}."
    stuck = [rank for rank, place in places.items() if place.blocked is not None]
    if not stuck:
        return [], ""
    return stuck, (
        "No rank is missing: all have issued what is waited for, so look at the network and the devices. Waiting: "
        f"{report.listed(stuck, _DESCRIBED_AT_MOST)}."
    )


@dataclass(frozen=True)
class _Report:
    """Sentences about ranks of which `waits[r]` says for whom rank r waits."""

    places: Mapping[int, Place]
    describe: Callable[[int], str]
    waits: Mapping[int, set[int]]

    def missing(self, ranks: list[int]) -> str:
        named = ranks[:_DESCRIBED_AT_MOST]
        sentences = [self._accusation(rank) for rank in named]
        if rest := ranks[_DESCRIBED_AT_MOST:]:
            sentences.append(f"Missing as well: {_ranks(rest)}.")
        behind = sorted(rank for rank, whom in self.waits.items() if not whom.intersection(named))
        if behind:
            sentences.append(f"Held up by these in turn: {self.listed(behind, _DESCRIBED_AT_MOST)}.")
        return " ".join(sentences)

    def _accusation(self, rank: int) -> str:
        """Where a missing rank is, what it has not come to, who waits there, what it did last and would do next."""
        place = self.places[rank]
        waiters: dict[str, list[int]] = {}
        for waiter, whom in sorted(self.waits.items()):
            if rank in whom:
                waiters.setdefault(self._absence(waiter, rank), []).append(waiter)
        text = f"MISSING: {self.describe(rank)}, in {place.action or 'an unknown place'}."
        # What it would do next stands first, if others wait for that.
        shown = sorted(waiters.items(), key=lambda item: not place.next.startswith(item[0]))[:_DESCRIBED_AT_MOST]
        text += "".join(f" It has not issued {what}, for which {self._waiting(ranks)}." for what, ranks in shown)
        if place.operation:
            progress = f"{place.index}{f' of {place.of}' if place.of else ''}"
            text += f" Its last operation, {progress} in this step, was {place.operation}."
        if place.next and not place.next.startswith(shown[0][0]):
            text += f" Next it would issue {place.next}."
        return text

    def _absence(self, waiter: int, rank: int) -> str:
        """What `rank` has not issued that `waiter` waits for."""
        blocked = self.places[waiter].blocked
        if blocked is None:
            counts = self.places[rank].issued
            ahead = {q: n for q, n in self.places[waiter].issued.items() if n > counts.get(q, n)}
            queue = max(ahead, key=lambda q: ahead[q] - counts[q])
            return f"operation {counts[queue] + 1} over {queue}"
        if blocked.peer is None:
            return self._operation(blocked)
        other = "send" if blocked.kind == "receive" else "receive"
        return in_words(other, blocked.tensor, blocked.queue, waiter)

    def _waiting(self, ranks: list[int]) -> str:
        action = self.places[ranks[0]].action
        if len(ranks) == 1:
            return f"{self.describe(ranks[0])} waits in {action}"
        return f"{_ranks(ranks)} wait in {action}"

    def listed(self, ranks: list[int], most: int) -> str:
        """Ranks, each with what it waits in; no more than so many."""
        shown = "; ".join(self._waits_in(rank) for rank in ranks[:most])
        return shown + (f"; and {len(ranks) - most} more" if len(ranks) > most else "")

    def _waits_in(self, rank: int) -> str:
        place = self.places[rank]
        operation = "" if place.blocked is None else f", waiting in {self._operation(place.blocked)}"
        return f"{self.describe(rank)} in {place.action}{operation}"

    def _operation(self, blocked: Blocked) -> str:
        return in_words(blocked.kind, blocked.tensor, blocked.queue, blocked.peer)


def _ranks(ranks: list[int]) -> str:
    rest = len(ranks) - _NAMED_AT_MOST
    names = ", ".join(map(str, ranks[:_NAMED_AT_MOST])) + (f" and {rest} more" if rest > 0 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {names}"
