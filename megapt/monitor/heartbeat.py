"""Heartbeats and the judgement over them: who is missing, who is stuck; no thread, store or clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from megapt.monitor.hang import explain
from megapt.operations import Place

# A verdict about hundreds of ranks is still one line.
_NAMED_AT_MOST = 8

LOOK_AT_HOST = (
    "Look at the end of that rank's own log, and on its host at `dmesg -T` for the out-of-memory killer and "
    "for GPU faults (Xid)."
)


class State(Enum):
    """A rank's state: ``CLOSING`` waits for the others, ``FINISHED`` ended well, ``LEFT`` read a verdict."""

    RUNNING = "running"
    CLOSING = "closing"
    FINISHED = "finished"
    LEFT = "left"


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself every interval.

    ``count`` grows with every heartbeat (the process lives); ``beats`` grows with every call of ``beat`` (its
    main thread gets on); ``place`` says which operation of the step it is at.
    """

    count: int
    beats: int
    state: State
    step: int
    phase: str
    host: str
    pid: int
    place: Place = Place("")

    def encode(self) -> str:
        return json.dumps(
            [
                self.count, self.beats, self.state.value, self.step, self.phase, self.host, self.pid,
                self.place.to_dict(),
            ],
            separators=(",", ":"),
        )

    @staticmethod
    def decode(data: bytes) -> Heartbeat:
        count, beats, state, step, phase, host, pid, place = json.loads(data)
        return Heartbeat(count, beats, State(state), step, phase, host, pid, Place.from_dict(place))


class Kind(Enum):
    """What a verdict is about; ``UNREACHABLE`` is a rank's own finding, with no store left to share it in."""

    MISSING = "missing"
    STALLED = "stalled"
    FAILED = "failed"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: the ranks accused and one line for the user."""

    kind: Kind
    ranks: tuple[int, ...]
    text: str

    def encode(self) -> str:
        return json.dumps([self.kind.value, self.ranks, self.text])

    @staticmethod
    def decode(data: bytes) -> Verdict:
        kind, ranks, text = json.loads(data)
        return Verdict(Kind(kind), tuple(ranks), text)


class Roster:
    """Judges a set of ranks by looking at their heartbeats now and again.

    A heartbeat is fresh when it differs from the one seen before, so clocks of different hosts never meet.
    Silence is counted on the observer's clock and in pieces of at most two intervals per look: an observer
    that was itself stopped for minutes (a suspended machine, a store that did not answer) accuses nobody when
    it wakes.

    Args:
        ranks: the ranks to look at, in the order in which ``observe`` gets their heartbeats.
        describe: a rank in words, such as ``"rank 5 (pp 1, dp 0, tp 1)"``.
        interval: seconds between two heartbeats.
        timeout: seconds of silence after which a rank is missing.
        start_timeout: the same for a rank that was never heard of.
        stall_timeout: seconds without a ``beat`` of any running rank after which the run is stuck; ``None``
        for never.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        describe: Callable[[int], str],
        *,
        interval: float,
        timeout: float,
        start_timeout: float,
        stall_timeout: float | None,
    ) -> None:
        self._ranks = list(ranks)
        self._describe = describe
        self._interval = interval
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._stall_timeout = stall_timeout
        self._last_look: float | None = None
        self._raw: list[bytes] = [b""] * len(self._ranks)
        self._latest: list[Heartbeat | None] = [None] * len(self._ranks)
        self._silence = [0.0] * len(self._ranks)
        self._stillness = 0.0

    def observe(self, now: float, heartbeats: Sequence[bytes]) -> Verdict | None:
        """Look once at ``heartbeats[i]``, the latest of ``ranks[i]`` or empty, at ``now`` seconds."""
        gap = 0.0 if self._last_look is None else min(now - self._last_look, 2 * self._interval)
        self._last_look = now
        moved = False
        for index, raw in enumerate(heartbeats):
            self._silence[index] += gap
            if raw == self._raw[index]:
                continue
            before, latest = self._latest[index], Heartbeat.decode(raw)
            moved |= before is None or latest.beats != before.beats
            self._raw[index], self._latest[index], self._silence[index] = raw, latest, 0.0
        # The stall clock starts once everybody has: how long that may take is for start_timeout to say.
        self._stillness = self._stillness + gap if self.all_heard() and not moved else 0.0
        return self._missing() or self._stalled()

    def latest(self, rank: int) -> Heartbeat | None:
        """The last heartbeat seen of ``rank``."""
        return self._latest[self._ranks.index(rank)]

    def all_heard(self) -> bool:
        """Whether every rank has sent a heartbeat."""
        return all(latest is not None for latest in self._latest)

    def all_done(self, besides: Sequence[int] = ()) -> bool:
        """Whether every rank has finished or left, not counting those ``besides``."""
        return all(self._done(index) for index, rank in enumerate(self._ranks) if rank not in besides)

    def _done(self, index: int) -> bool:
        latest = self._latest[index]
        return latest is not None and latest.state in (State.FINISHED, State.LEFT)

    def _missing(self) -> Verdict | None:
        watched = [index for index in range(len(self._ranks)) if not self._done(index)]
        if not any(self._silence[index] > self._limit(index) for index in watched):
            return None
        # Ranks of one host die together but beat at different moments: name them in one verdict.
        silent = [
            index for index in watched if self._silence[index] > self._limit(index) - 2 * self._interval
        ]
        longest = max(self._silence[index] for index in silent)
        names = _join([self._name(index) for index in silent])
        verb = "has" if len(silent) == 1 else "have"
        text = (
            f"{names} {verb} sent no heartbeat for {longest:.3g} s: killed, crashed or stopped. "
            f"{LOOK_AT_HOST}"
        )
        return Verdict(Kind.MISSING, tuple(self._ranks[index] for index in silent), text)

    def _limit(self, index: int) -> float:
        return self._start_timeout if self._latest[index] is None else self._timeout

    def _name(self, index: int) -> str:
        return self._describe(self._ranks[index]) + last_seen(self._latest[index])

    def _stalled(self) -> Verdict | None:
        if self._stall_timeout is None or self._stillness <= self._stall_timeout:
            return None
        # The stall clock runs only where everybody has been heard.
        latest = {r: heartbeat for r, heartbeat in zip(self._ranks, self._latest, strict=True) if heartbeat is not None}
        running = {r: heartbeat for r, heartbeat in latest.items() if heartbeat.state is State.RUNNING}
        if not running:
            return None
        lowest = min(heartbeat.step for heartbeat in running.values())
        missing, why = explain({r: heartbeat.place for r, heartbeat in latest.items()}, self._describe)
        text = f"no rank has made progress for {self._stillness:.3g} s; the lowest step is {lowest}"
        if missing:
            first = _join([self._describe(rank) + last_seen(latest[rank]) for rank in missing])
            text += f". {why} Look first at the log of {first}: every rank's log now holds its stacks."
            return Verdict(Kind.STALLED, tuple(missing), text)
        last = {r: heartbeat for r, heartbeat in running.items() if heartbeat.step == lowest}
        text += f", {self._groups(last)}. Every rank's log now holds its stacks."
        return Verdict(Kind.STALLED, tuple(sorted(last)), text)

    def _groups(self, heartbeats: Mapping[int, Heartbeat]) -> str:
        """Ranks by what they do, the fewest first: the others usually wait for these."""
        groups: dict[str, list[int]] = {}
        for rank, heartbeat in heartbeats.items():
            action = f" ({heartbeat.place.action})" if heartbeat.place.action else ""
            groups.setdefault(f"in phase '{heartbeat.phase}'{action}", []).append(rank)
        ordered = sorted(groups.items(), key=lambda item: len(item[1]))
        return "; ".join(f"{what}: {_join([self._describe(rank) for rank in ranks])}" for what, ranks in ordered)


def last_seen(heartbeat: Heartbeat | None) -> str:
    """Where and at what a rank was last seen, to follow its name."""
    if heartbeat is None:
        return " [never heard of]"
    place = f"process {heartbeat.pid} on {heartbeat.host}"
    return f" [{place}, last at step {heartbeat.step}, phase '{heartbeat.phase}']"


def _join(names: list[str]) -> str:
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
