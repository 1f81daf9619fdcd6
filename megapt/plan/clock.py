"""How long a pipeline's pass takes: `pipeline.simulate`'s clock, made fast enough for thousands of layouts.

The dependencies of a schedule are worked out once, and times then follow in one sweep. With many micro-batches a
schedule repeats itself, and so do its times after a while: once they do, the rest is a multiplication.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megapt.parallel.pipeline.actions import Action, Channel, Kind, Placement
from megapt.parallel.pipeline.schedules import (
    ComputeOrder,
    gpipe,
    interleaved,
    one_f_one_b,
    placement,
    zb_h1,
    zb_v,
)
from megapt.parallel.pipeline.simulate import Costs

_ORDERS: dict[str, Callable[[int, int, int], ComputeOrder]] = {
    "gpipe": lambda stages, chunks, micro_batches: gpipe(stages, micro_batches),
    "1f1b": lambda stages, chunks, micro_batches: one_f_one_b(stages, micro_batches),
    "interleaved": interleaved,
    "zb-h1": lambda stages, chunks, micro_batches: zb_h1(stages, micro_batches),
    "zb-v": lambda stages, chunks, micro_batches: zb_v(stages, micro_batches),
}


@dataclass(frozen=True)
class Pass:
    """One pass of all micro-batches: seconds in all; per rank when its first action starts and its last one ends, and
    per chunk of each rank when the action that makes the last gradients of its weights starts and ends."""

    seconds: float
    first: list[float]
    last: list[float]
    final: list[list[tuple[float, float]]]


def pipeline_pass(name: str, stages: int, chunks: int, micro_batches: int, costs: Costs) -> Pass:
    """What `simulate(schedule(name, stages, chunks, micro_batches), costs)` takes, exactly up to rounding.

    Times count from the pass's start, except that where micro-batches in the middle were left out, `last` and `final`
    have been moved to the end.
    """
    where = placement(name, stages, chunks)
    if stages == 1 and chunks == 1 and name != "gpipe":
        return _alone(micro_batches, costs)
    seconds = _seconds(where, costs)
    unit = stages if name == "interleaved" else 1
    count = min(micro_batches, (2 * stages // unit + 6) * unit + (micro_batches % unit))
    if name == "zb-v":
        count = min(micro_batches, 3 * stages + 6)
    if name == "gpipe":  # all forwards come first: nothing repeats itself in between
        count = micro_batches
    while True:
        order = _order(name, stages, chunks, count)
        ends = order.ends(seconds, costs.transfer)
        left = micro_batches - count
        if left == 0:
            return order.result(ends, seconds, 0.0)
        found = order.period(ends, unit)
        if found is not None:
            cycle, growth = found
            more = left % (cycle * unit)
            if more == 0:
                return order.result(ends, seconds, growth * (left // (cycle * unit)))
            count = min(micro_batches, count + more)
        else:
            count = min(micro_batches, count + max(2 * unit, count // unit * unit))


def _alone(micro_batches: int, costs: Costs) -> Pass:
    forward, backward = costs.seconds(Kind.FORWARD, 0), costs.seconds(Kind.BACKWARD, 0)
    total = micro_batches * (forward + backward)
    return Pass(total, [0.0], [total], [[(total - backward, total)]])


_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


def _seconds(where: Placement, costs: Costs) -> list[float]:
    """By kind and virtual stage, as `_Order` numbers them."""
    return [costs.seconds(kind, virtual) for kind in _KINDS for virtual in range(where.virtual_stages)]


@lru_cache(maxsize=2048)
def _order(name: str, stages: int, chunks: int, micro_batches: int) -> _Order:
    return _Order(_ORDERS[name](stages, chunks, micro_batches), placement(name, stages, chunks), micro_batches)


class _Order:
    """A schedule as a list of nodes, each behind the nodes that it waits for.

    A node is an action or a transfer: (the node before it on the same rank or channel, two more that it waits for, what
    it takes: an index into the seconds of `_seconds`, or -2 for a transfer's). Node 0 is the beginning.
    """

    def __init__(self, orders: ComputeOrder, where: Placement, micro_batches: int) -> None:
        self.where, self.micro_batches, self.orders = where, micro_batches, orders
        self.nodes: list[tuple[int, int, int, int]] = [(0, 0, 0, -1)]
        self.at: list[list[int]] = [[] for _ in orders]
        """Per rank, the nodes of its actions in order."""
        self._steady_of: list[tuple[int, int, int]] = []
        self._link()

    def _link(self) -> None:
        """Go through all ranks' lists as far as each can go, until all are through."""
        steps = _steps(self.orders, self.where, self.micro_batches)
        channels = _channels(steps)
        made: dict[int, int] = {}  # tensor: the node that made it
        moved = True
        while moved:
            moved = False
            for rank, own in enumerate(steps):
                at = self.at[rank]
                while len(at) < len(own):
                    step = own[len(at)]
                    arrival = 0
                    if step.needs is not None and step.channel is None:
                        arrival = made.get(step.needs, 0)
                    elif step.channel is not None:
                        arrival = channels[step.channel].arrival(step.needs, made, at, self.nodes)
                    if step.needs is not None and not arrival:
                        break
                    self.nodes.append((at[-1] if at else 0, arrival, 0, step.takes))
                    at.append(len(self.nodes) - 1)
                    if step.makes is not None:
                        made[step.makes] = len(self.nodes) - 1
                    moved = True
        assert all(len(at) == len(own) for at, own in zip(self.at, steps, strict=True)), "the schedule deadlocks"

    def ends(self, seconds: list[float], transfer: float) -> list[float]:
        """When each node ends."""
        takes = [*seconds, transfer, 0.0]  # reached as -2 and -1
        ends: list[float] = []
        append = ends.append
        nodes = iter(self.nodes)
        next(nodes)
        append(0.0)
        for before, one, other, kind in nodes:
            time = ends[before]
            if ends[one] > time:
                time = ends[one]
            if ends[other] > time:
                time = ends[other]
            append(time + takes[kind])
        return ends

    def period(self, ends: list[float], unit: int) -> tuple[int, float] | None:
        """(cycle, growth): from some place on, all times grow by `growth` with every `cycle` units of micro-batches.

        Every action depends on the last two units of all ranks' lists at most, and in the middle of the lists always in
        the same way. So where three units in a row have the times of earlier ones and a constant, all later ones do.
        """
        window = 3
        shortest = min(self._units(rank, unit) for rank in range(len(self.orders)))
        for cycle in range(1, max(1, shortest - window) + 1):
            growth: float | None = None
            for rank in range(len(self.orders)):
                growth = self._growth(rank, ends, unit, cycle, window, growth)
                if growth is None:
                    break
            if growth is not None:
                return cycle, growth
        return None

    def _units(self, rank: int, unit: int) -> int:
        start, stop, length = self._steady(rank, unit)
        return (stop - start) // length

    def _steady(self, rank: int, unit: int) -> tuple[int, int, int]:
        """Positions of the rank's list between which it repeats itself, and the length of what it repeats."""
        if not self._steady_of:
            self._steady_of = [_repeats(order, unit, self.micro_batches) for order in self.orders]
        return self._steady_of[rank]

    def _growth(
        self, rank: int, ends: list[float], unit: int, cycle: int, window: int, growth: float | None
    ) -> float | None:
        """The growth over `cycle` units at the end of the rank's steady part, if it is `growth` (None: any)."""
        _, stop, length = self._steady(rank, unit)
        at, back = self.at[rank], cycle * length
        for position in range(stop - window * length, stop):
            here = ends[at[position]] - ends[at[position - back]]
            if growth is None:
                growth = here
            elif abs(here - growth) > 1e-9 * max(abs(growth), 1e-12):
                return None
        return growth

    def result(self, ends: list[float], seconds: list[float], more: float) -> Pass:
        """more: seconds of the micro-batches that were left out."""
        kinds = {kind: number * self.where.virtual_stages for number, kind in enumerate(_KINDS)}

        def start(rank: int, position: int) -> float:
            action = self.orders[rank][position]
            index = kinds[action.kind] + self.where.virtual(rank, action.chunk)
            return ends[self.at[rank][position]] - seconds[index]

        final = []
        for rank, order in enumerate(self.orders):
            spans: list[tuple[float, float]] = [(0.0, 0.0)] * self.where.chunks
            for position in reversed(range(len(order))):
                action = order[position]
                if action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT) and spans[action.chunk] == (0.0, 0.0):
                    spans[action.chunk] = (start(rank, position) + more, ends[self.at[rank][position]] + more)
                    if (0.0, 0.0) not in spans:
                        break
            final.append(spans)
        last = [ends[at[-1]] + more for at in self.at]
        return Pass(max(last), [start(rank, 0) for rank in range(len(self.at))], last, final)


class _Step(NamedTuple):
    """An action: what it takes, the tensors that it needs and makes (numbers of direction, virtual stage and
    micro-batch), the channels on which these travel, if they do."""

    takes: int
    needs: int | None
    channel: Channel | None
    makes: int | None
    onward: Channel | None


def _steps(orders: ComputeOrder, where: Placement, micro_batches: int) -> list[list[_Step]]:
    """The actions of every rank."""
    wires: dict[tuple[int, Kind, int], _Step] = {}

    def step(rank: int, action: Action) -> _Step:
        key = rank, action.kind, action.chunk
        if key not in wires:
            wires[key] = _wire(where, rank, action, micro_batches)
        takes, needs, channel, makes, onward = wires[key]
        at = action.micro_batch
        return _Step(
            takes, None if needs is None else needs + at, channel, None if makes is None else makes + at, onward
        )

    return [[step(rank, action) for action in order] for rank, order in enumerate(orders)]


def _wire(where: Placement, rank: int, action: Action, micro_batches: int) -> _Step:
    """An action's step, with the tensors of micro-batch 0."""
    kind, virtual, stages = action.kind, where.virtual(rank, action.chunk), where.virtual_stages
    takes = _KINDS.index(kind) * stages + virtual
    if not kind.passes_on:
        return _Step(takes, None, None, None, None)
    forward = kind is Kind.FORWARD
    source = virtual - 1 if forward else virtual + 1
    base = 0 if forward else stages
    arrives, leaves = where.message(rank, action.recv()), where.message(rank, action.send())
    return _Step(
        takes,
        (base + source) * micro_batches if 0 <= source < stages else None,
        None if arrives is None else arrives.channel,
        (base + virtual) * micro_batches,
        None if leaves is None else leaves.channel,
    )


class _Queue:
    """The tensors of a channel in the sender's order, and before which of the receiver's actions each receive is
    posted: one ahead of the action that needs it, but never behind that of a later tensor."""

    def __init__(self, tensors: list[int], wanted: dict[int, int]) -> None:
        self.tensors, self.posts = tensors, [wanted[tensor] for tensor in tensors]
        for index in reversed(range(len(tensors) - 1)):
            self.posts[index] = min(self.posts[index], self.posts[index + 1])
        self.arrived: dict[int, int] = {}
        self.head = self.last = 0

    def arrival(
        self, tensor: int | None, made: dict[int, int], at: list[int], nodes: list[tuple[int, int, int, int]]
    ) -> int:
        """The node of the tensor's transfer, behind those of all before it; 0 where that cannot be known yet."""
        assert tensor is not None
        while tensor not in self.arrived:
            now, post = self.tensors[self.head], self.posts[self.head]
            if now not in made or post > len(at):
                return 0
            nodes.append((self.last, made[now], at[post - 1] if post else 0, -2))
            self.arrived[now] = self.last = len(nodes) - 1
            self.head += 1
        return self.arrived[tensor]


def _channels(steps: list[list[_Step]]) -> dict[Channel, _Queue]:
    sent: dict[Channel, list[int]] = defaultdict(list)
    wanted: dict[int, int] = {}
    for own in steps:
        for position, step in enumerate(own):
            if step.onward is not None and step.makes is not None:
                sent[step.onward].append(step.makes)
            if step.channel is not None and step.needs is not None:
                wanted[step.needs] = max(position - 1, 0)
    return {channel: _Queue(tensors, wanted) for channel, tensors in sent.items()}


def _repeats(order: list[Action], unit: int, micro_batches: int) -> tuple[int, int, int]:
    """The longest stretch [start, stop) of a list in which each action comes again `length` positions later, for the
    micro-batch `unit` further on."""
    length = sum(1 for action in order if action.micro_batch // unit == micro_batches // unit // 2)
    best = (0, 0)
    start = 0
    for position in range(len(order) - length + 1):
        same = position + length < len(order) and _follows(order[position], order[position + length], unit)
        if not same:
            stop = position + length
            if stop - start > best[1] - best[0] and position > start:
                best = (start, stop)
            start = position + 1
    return best[0], best[1], length


def _follows(action: Action, later: Action, unit: int) -> bool:
    return (
        action.kind is later.kind and action.chunk == later.chunk and action.micro_batch + unit == later.micro_batch
    )
