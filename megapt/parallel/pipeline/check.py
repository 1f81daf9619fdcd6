"""Proof that a schedule computes everything once, in a legal order, and cannot deadlock."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product

from megapt.parallel.pipeline.actions import Action, Channel, Kind, Message, Placement
from megapt.parallel.pipeline.schedules import Schedule


class ScheduleError(AssertionError):
    """A schedule that must not run; the message names the first offending rank and action."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found out on the way.

    `peak_live[rank]` is the largest number of (micro-batch, chunk) forwards that a rank holds at once while
    their backward is still to come; 0 where there are no backwards.
    """

    peak_live: list[int]


def check(schedule: Schedule, outstanding: int | None = None) -> Report:
    """Check `schedule` on all its ranks at once; pure arithmetic, no process group.

    Shown: every forward and backward of every (micro-batch, virtual stage) runs exactly once, after its
    receive was posted or its input made on the same rank, a backward after its forward; both ends of each
    channel agree on the order of messages; and execution ends if a compute waits for its input to be sent and
    sends never block. With `outstanding`, execution must also end if a send is complete only when its receive
    was posted and a sender with more than `outstanding` incomplete sends on a channel waits; 0 is a
    rendezvous.

    Raises ScheduleError.
    """
    assert outstanding is None or outstanding >= 0, f"outstanding must not be negative, got {outstanding}"
    placement = schedule.placement
    if len(schedule.actions) != placement.stages:
        raise ScheduleError(f"{placement.stages} ranks need one list each, got {len(schedule.actions)} lists")
    peak_live = [_RankCheck(schedule, rank).run() for rank in range(placement.stages)]
    _check_channels(schedule)
    _execute(schedule, None)
    if outstanding is not None:
        _execute(schedule, outstanding)
    return Report(peak_live)


class _RankCheck:
    """What one rank's list shows by itself."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule = schedule
        self.placement: Placement = schedule.placement
        self.rank = rank
        self.done: set[Action] = set()
        self.sendable: set[Action] = set()
        self.kinds = (Kind.FORWARD, Kind.BACKWARD) if schedule.has_backward else (Kind.FORWARD,)

    def run(self) -> int:
        """Check the list; returns the peak of live forwards."""
        live = peak = 0
        for position, action in enumerate(self.schedule.actions[self.rank]):
            broken = self._broken_rule(action)
            if broken:
                raise ScheduleError(f"{_where(self.rank, position, action)}: {broken}")
            self.done.add(action)
            if action.kind.is_compute:
                self.sendable.add(action.send())
            if self.schedule.has_backward:
                live += (action.kind is Kind.FORWARD) - (action.kind is Kind.BACKWARD)
            peak = max(peak, live)
        every = product(self.kinds, range(self.schedule.micro_batches), range(self.placement.chunks))
        for kind, micro_batch, chunk in every:
            action = Action(kind, micro_batch, chunk)
            if action not in self.done:
                raise ScheduleError(f"rank {self.rank}: {action} is missing")
        return peak

    def _broken_rule(self, action: Action) -> str | None:
        """The rule that `action` breaks, given what the rank did before it."""
        if not 0 <= action.micro_batch < self.schedule.micro_batches:
            return f"micro-batch outside 0..{self.schedule.micro_batches - 1}"
        if not 0 <= action.chunk < self.placement.chunks:
            return f"chunk outside 0..{self.placement.chunks - 1}"
        if action in self.done:
            return "occurs twice"
        if action.kind.is_compute:
            return self._broken_compute_rule(action)
        if self.placement.message(self.rank, action) is None:
            return "no other rank is at the other end"
        if action.kind.is_send and action not in self.sendable:
            return "sends what was not computed yet"
        return None

    def _broken_compute_rule(self, action: Action) -> str | None:
        if action.kind not in self.kinds:
            return f"a schedule without backward holds {action.kind.name}"
        forward = Action(Kind.FORWARD, action.micro_batch, action.chunk)
        if action.kind is Kind.BACKWARD and forward not in self.done:
            return f"runs before its forward {forward}"
        source = self.placement.source(self.rank, action)
        if source is None:
            return None
        source_rank, source_chunk = source
        if source_rank == self.rank:
            producer = Action(action.kind, action.micro_batch, source_chunk)
            return None if producer in self.done else f"runs before its input {producer} on the same rank"
        return None if action.recv() in self.done else f"runs before its receive {action.recv()} was posted"


def _check_channels(schedule: Schedule) -> None:
    """Both ends of every channel list the same messages in the same order."""
    sent: dict[Channel, list[Message]] = defaultdict(list)
    received: dict[Channel, list[Message]] = defaultdict(list)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if not action.kind.is_compute:
                message = _message(schedule.placement, rank, action)
                (sent if action.kind.is_send else received)[message.channel].append(message)
    for channel in dict.fromkeys([*sent, *received]):
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


def _execute(schedule: Schedule, outstanding: int | None) -> None:
    """Run all ranks as far as they can go; raise if that is not to the end.

    The lists passed the checks above: the n-th send on a channel meets its n-th receive, and a compute's
    receive was posted before it, so its input is there as soon as the send was executed.
    """
    placement = schedule.placement
    sent: Counter[Channel] = Counter()
    posted: Counter[Channel] = Counter()
    arrived: set[Message] = set()

    def blocked(rank: int, action: Action) -> str | None:
        if action.kind.is_compute:
            message = placement.message(rank, action.recv())
            if message is not None and message not in arrived:
                return f"waits for {_describe([message], 0)} on channel {message.channel}"
        elif action.kind.is_send and outstanding is not None:
            channel = _message(placement, rank, action).channel
            if sent[channel] + 1 - posted[channel] > outstanding:
                return f"waits for rank {channel.destination} to post a receive on channel {channel}"
        return None

    positions = [0] * placement.stages
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while positions[rank] < len(actions) and blocked(rank, actions[positions[rank]]) is None:
                action = actions[positions[rank]]
                if not action.kind.is_compute:
                    message = _message(placement, rank, action)
                    if action.kind.is_send:
                        sent[message.channel] += 1
                        arrived.add(message)
                    else:
                        posted[message.channel] += 1
                positions[rank] += 1
                moved = True
    stuck = [rank for rank, actions in enumerate(schedule.actions) if positions[rank] < len(actions)]
    if stuck:
        bound = "any number of" if outstanding is None else f"at most {outstanding}"
        waits = []
        for rank in stuck:
            action = schedule.actions[rank][positions[rank]]
            waits.append(f"{_where(rank, positions[rank], action)} {blocked(rank, action)}")
        raise ScheduleError(f"deadlock with {bound} incomplete sends per channel: " + "; ".join(waits))


def _message(placement: Placement, rank: int, action: Action) -> Message:
    message = placement.message(rank, action)
    assert message is not None, f"{action} on rank {rank} has no other end"
    return message


def _where(rank: int, position: int, action: Action) -> str:
    return f"rank {rank}, action {position} ({action})"
