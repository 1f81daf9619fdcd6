"""Proof that a schedule computes everything once, in a legal order, and cannot deadlock."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product

from megapt.parallel.pipeline.actions import Action, Channel, Kind, Message, Placement
from megapt.parallel.pipeline.schedules import Schedule

_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


class ScheduleError(AssertionError):
    """A schedule that must not run; the message names the first offending rank and action."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found out on the way: per rank, how many (micro-batch, chunk) it holds at its peak.

    `peak_live`: those whose forward is done and whose input gradient is not (no BACKWARD or BACKWARD_INPUT yet).
    `peak_weight`: those that only wait for their weights' gradients (BACKWARD_INPUT, but not BACKWARD_WEIGHT done).
    `peak_held`: both together, at most the sum of the two peaks. All are 0 where there are no backwards.
    """

    peak_live: list[int]
    peak_weight: list[int]
    peak_held: list[int]


def check(schedule: Schedule, outstanding: int | None = None) -> Report:
    """Check `schedule` on all its ranks at once; pure arithmetic, no process group.

    Shown: every (micro-batch, virtual stage) has exactly one forward and one backward (a BACKWARD, or a
    BACKWARD_INPUT and after it a BACKWARD_WEIGHT), each after its receive was posted or its input made on the same
    rank, a backward after its forward; both ends of each channel agree on the order of messages; and execution ends
    if a compute waits for its input to be sent and sends never block. With `outstanding`, execution must also end if
    a send is complete only when its receive was posted and a sender with more than `outstanding` incomplete sends on
    a channel waits; 0 is a rendezvous.

    Raises ScheduleError.
    """
    assert outstanding is None or outstanding >= 0, f"outstanding must not be negative, got {outstanding}"
    placement = schedule.placement
    if len(schedule.actions) != placement.stages:
        raise ScheduleError(f"{placement.stages} ranks need one list each, got {len(schedule.actions)} lists")
    peaks = [_RankCheck(schedule, rank).run() for rank in range(placement.stages)]
    messages = resolve(schedule)
    _check_channels(schedule, messages)
    _execute(schedule, messages, None)
    if outstanding is not None:
        _execute(schedule, messages, outstanding)
    live, weight, held = (list(peak) for peak in zip(*peaks, strict=True))
    return Report(live, weight, held)


def resolve(schedule: Schedule) -> list[list[Message | None]]:
    """Per rank and action: the message that a send or receive moves, or that a compute waits for."""
    placement = schedule.placement
    result = []
    for rank, actions in enumerate(schedule.actions):
        # Only the micro-batch differs between actions of one kind and chunk.
        routes: dict[tuple[Kind, int], tuple[Channel, int] | None] = {}
        messages: list[Message | None] = []
        for action in actions:
            key = (action.kind, action.chunk)
            if key not in routes:
                routes[key] = _route(placement, rank, action)
            route = routes[key]
            messages.append(None if route is None else Message(route[0], action.micro_batch, route[1]))
        result.append(messages)
    return result


def _route(placement: Placement, rank: int, action: Action) -> tuple[Channel, int] | None:
    if action.kind.is_compute:
        if not action.kind.passes_on:
            return None
        action = action.recv()
    message = placement.message(rank, action)
    return None if message is None else (message.channel, message.virtual)


class _RankCheck:
    """What one rank's list shows by itself."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule = schedule
        self.placement: Placement = schedule.placement
        self.rank = rank
        self.done: set[Action] = set()
        self.sendable: set[Action] = set()

    def run(self) -> tuple[int, int, int]:
        """Check the list; returns the peaks of what is live, of what waits for its W, and of both."""
        live = weight = peak_live = peak_weight = peak_held = 0
        for position, action in enumerate(self.schedule.actions[self.rank]):
            broken = self._broken_rule(action)
            if broken:
                raise ScheduleError(f"{_where(self.rank, position, action)}: {broken}")
            self.done.add(action)
            kind = action.kind
            if kind.passes_on:
                self.sendable.add(action.send())
            if kind.is_compute and self.schedule.has_backward:
                live += (kind is Kind.FORWARD) - (kind in _BACKWARDS)
                weight += (kind is Kind.BACKWARD_INPUT) - (kind is Kind.BACKWARD_WEIGHT)
                peak_live, peak_weight = max(peak_live, live), max(peak_weight, weight)
                peak_held = max(peak_held, live + weight)
        self._require_all()
        return peak_live, peak_weight, peak_held

    def _require_all(self) -> None:
        for micro_batch, chunk in product(range(self.schedule.micro_batches), range(self.placement.chunks)):
            needed = [Action(Kind.FORWARD, micro_batch, chunk)]
            if self.schedule.has_backward and Action(Kind.BACKWARD, micro_batch, chunk) not in self.done:
                cut = Action(Kind.BACKWARD_INPUT, micro_batch, chunk)
                weight = Action(Kind.BACKWARD_WEIGHT, micro_batch, chunk)
                needed += [cut, weight] if cut in self.done else [Action(Kind.BACKWARD, micro_batch, chunk)]
            for action in needed:
                if action not in self.done:
                    raise ScheduleError(f"rank {self.rank}: {action} is missing")

    def _broken_rule(self, action: Action) -> str | None:
        """The rule that `action` breaks, given what the rank did before it."""
        if not 0 <= action.micro_batch < self.schedule.micro_batches:
            return f"micro-batch outside 0..{self.schedule.micro_batches - 1}"
        if not 0 <= action.chunk < self.placement.chunks:
            return f"chunk outside 0..{self.placement.chunks - 1}"
        if action in self.done:
            return "occurs twice"
        if action.kind.is_compute:
            return self._broken_order(action) or self._missing_input(action)
        if self.placement.message(self.rank, action) is None:
            return "no other rank is at the other end"
        if action.kind.is_send and action not in self.sendable:
            return "sends what was not computed yet"
        return None

    def _broken_order(self, action: Action) -> str | None:
        """What must, or must not, have run for the same (micro-batch, chunk)."""
        if action.kind is Kind.FORWARD:
            return None
        if not self.schedule.has_backward:
            return f"a schedule without backward holds {action.kind.name}"
        if action.kind is Kind.BACKWARD_WEIGHT:
            cut = Action(Kind.BACKWARD_INPUT, action.micro_batch, action.chunk)
            return None if cut in self.done else f"runs before its {cut}"
        forward = Action(Kind.FORWARD, action.micro_batch, action.chunk)
        if forward not in self.done:
            return f"runs before its forward {forward}"
        (other,) = (kind for kind in _BACKWARDS if kind is not action.kind)
        twin = Action(other, action.micro_batch, action.chunk)
        return f"repeats {twin}" if twin in self.done else None

    def _missing_input(self, action: Action) -> str | None:
        source = self.placement.source(self.rank, action)
        if source is None:
            return None
        source_rank, source_chunk = source
        if source_rank != self.rank:
            return None if action.recv() in self.done else f"runs before its receive {action.recv()} was posted"
        kinds = (Kind.FORWARD,) if action.kind is Kind.FORWARD else _BACKWARDS
        producers = [Action(kind, action.micro_batch, source_chunk) for kind in kinds]
        if any(producer in self.done for producer in producers):
            return None
        return f"runs before its input {' or '.join(map(str, producers))} on the same rank"


def _check_channels(schedule: Schedule, messages: list[list[Message | None]]) -> None:
    """Both ends of every channel list the same messages in the same order."""
    sent: dict[Channel, list[Message]] = defaultdict(list)
    received: dict[Channel, list[Message]] = defaultdict(list)
    for actions, moved in zip(schedule.actions, messages, strict=True):
        for action, message in zip(actions, moved, strict=True):
            if message is not None and not action.kind.is_compute:
                (sent if action.kind.is_send else received)[message.channel].append(message)
    for channel in dict.fromkeys([*sent, *received]):
        if sent[channel] == received[channel]:
            continue
        for place in range(max(len(sent[channel]), len(received[channel]))):
            out, into = _describe(sent[channel], place), _describe(received[channel], place)
            if out != into:
                raise ScheduleError(
                    f"channel {channel}, message {place}: rank {channel.source} sends {out}, "
                    f"rank {channel.destination} receives {into}"
                )


def _describe(messages: list[Message], place: int) -> str:
    if place >= len(messages):
        return "nothing"
    return f"micro-batch {messages[place].micro_batch} for virtual stage {messages[place].virtual}"


def _execute(schedule: Schedule, messages: list[list[Message | None]], outstanding: int | None) -> None:
    """Run all ranks as far as they can go; raise if that is not to the end.

    The lists passed the checks above: the n-th send on a channel meets its n-th receive, and a compute's
    receive was posted before it, so its input is there as soon as the send was executed.
    """
    sent: Counter[Channel] = Counter()
    posted: Counter[Channel] = Counter()
    arrived: set[Message] = set()

    def blocked(action: Action, message: Message | None) -> str | None:
        if message is None:
            return None
        if action.kind.is_compute and message not in arrived:
            return f"waits for {_describe([message], 0)} on channel {message.channel}"
        if action.kind.is_send and outstanding is not None:
            channel = message.channel
            if sent[channel] + 1 - posted[channel] > outstanding:
                return f"waits for rank {channel.destination} to post a receive on channel {channel}"
        return None

    positions = [0] * len(schedule.actions)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while positions[rank] < len(actions):
                action, message = actions[positions[rank]], messages[rank][positions[rank]]
                if blocked(action, message) is not None:
                    break
                if message is not None and action.kind.is_send:
                    sent[message.channel] += 1
                    arrived.add(message)
                elif message is not None and action.kind.is_recv:
                    posted[message.channel] += 1
                positions[rank] += 1
                moved = True
    waits = [
        f"{_where(rank, place, actions[place])} {blocked(actions[place], messages[rank][place])}"
        for rank, (place, actions) in enumerate(zip(positions, schedule.actions, strict=True))
        if place < len(actions)
    ]
    if waits:
        bound = "any number of" if outstanding is None else f"at most {outstanding}"
        raise ScheduleError(f"deadlock with {bound} incomplete sends per channel: " + "; ".join(waits))


def _where(rank: int, position: int, action: Action) -> str:
    return f"rank {rank}, action {position} ({action})"
