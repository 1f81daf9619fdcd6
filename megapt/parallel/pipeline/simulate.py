"""How long a schedule takes and how much it holds, from the cost of each virtual stage: the same lists, no devices."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from megapt.parallel.pipeline.actions import Action, Channel, Kind, Message, Placement
from megapt.parallel.pipeline.check import resolve
from megapt.parallel.pipeline.schedules import Schedule
from megapt.parallel.pipeline.timeline import Span, Timeline


@dataclass(frozen=True, slots=True)
class Costs:
    """What one micro-batch costs on each virtual stage, in the model's order.

    `forward`, `backward_input` and `backward_weight` in seconds (a BACKWARD takes the sum of the last two),
    `transfer` in seconds for one hop between ranks, `activation_bytes` what a forward keeps for its backward, of
    which the share `weight_share` (0 to 1) stays after a BACKWARD_INPUT until its BACKWARD_WEIGHT.
    """

    forward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]
    transfer: float = 0.0
    activation_bytes: Sequence[float] = ()
    weight_share: float = 1.0

    @staticmethod
    def even(
        stages: int,
        chunks: int,
        forward: float = 1.0,
        backward_input: float = 1.0,
        backward_weight: float = 1.0,
        transfer: float = 0.0,
        activation_bytes: float = 0.0,
        weight_share: float = 1.0,
    ) -> Costs:
        """Costs of equal virtual stages from those of all layers of a rank: each of its chunks takes an equal part."""
        per_chunk = (
            [whole / chunks] * (stages * chunks)
            for whole in (forward, backward_input, backward_weight, activation_bytes)
        )
        f, i, w, held = per_chunk
        return Costs(f, i, w, transfer, held, weight_share)

    @staticmethod
    def measured(timeline: Timeline, placement: Placement, transfer: float = 0.0) -> Costs:
        """The mean of each virtual stage's actions in a timeline; nothing for kinds that it does not hold.

        Where backwards were not cut in two, all their time counts as `backward_input`.
        """
        totals: dict[tuple[Kind, int], list[float]] = defaultdict(list)
        for rank, spans in enumerate(timeline.ranks):
            for action, start, end in spans:
                totals[action.kind, placement.virtual(rank, action.chunk)].append(end - start)
        mean = {key: sum(times) / len(times) for key, times in totals.items()}

        def of(kind: Kind, instead: Kind) -> list[float]:
            stages = range(placement.virtual_stages)
            return [mean.get((kind, stage), mean.get((instead, stage), 0.0)) for stage in stages]

        return Costs(
            forward=of(Kind.FORWARD, Kind.FORWARD),
            backward_input=of(Kind.BACKWARD_INPUT, Kind.BACKWARD),
            backward_weight=of(Kind.BACKWARD_WEIGHT, Kind.BACKWARD_WEIGHT),
            transfer=transfer,
        )

    def seconds(self, kind: Kind, virtual: int) -> float:
        """The time of a compute action on a virtual stage."""
        parts = {
            Kind.FORWARD: (self.forward,),
            Kind.BACKWARD: (self.backward_input, self.backward_weight),
            Kind.BACKWARD_INPUT: (self.backward_input,),
            Kind.BACKWARD_WEIGHT: (self.backward_weight,),
        }[kind]
        return sum(part[virtual] for part in parts)


@dataclass(frozen=True, slots=True)
class Simulation:
    """The timeline of a schedule, and the bytes of activations that each rank holds at its peak."""

    timeline: Timeline
    peak_bytes: list[float]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Run the schedule's lists against a clock.

    A rank computes one action at a time, as soon as its input is there. A transfer takes `costs.transfer` from when
    its tensor was made, its receive posted and the channel's previous transfer over; it overlaps with computing, and
    sends do not block. Between chunks of one rank nothing is transferred.

    The schedule must have passed `check`.
    """
    virtual_stages = schedule.placement.virtual_stages
    for part in (costs.forward, costs.backward_input, costs.backward_weight, costs.activation_bytes or costs.forward):
        assert len(part) == virtual_stages, f"{virtual_stages} virtual stages need a cost each, got {len(part)}"
    timeline = _Clock(schedule, costs).run()
    return Simulation(timeline, [_peak_bytes(schedule, rank, costs) for rank in range(schedule.placement.stages)])


class _Clock:
    """Every rank's own time, and what is on its way between them."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        self.messages = resolve(schedule)
        self.times = [0.0] * schedule.placement.stages
        self.spans: list[list[Span]] = [[] for _ in self.times]
        # When the n-th tensor of a channel was made and when its receive was posted, until both are known.
        self.sent: dict[Channel, deque[tuple[float, Message]]] = defaultdict(deque)
        self.posted: dict[Channel, deque[float]] = defaultdict(deque)
        self.free: dict[Channel, float] = defaultdict(float)
        self.arrivals: dict[Message, float] = {}
        self.seconds: dict[tuple[int, Kind, int], float] = {}

    def run(self) -> Timeline:
        positions = [0] * len(self.times)
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(self.schedule.actions):
                messages = self.messages[rank]
                while positions[rank] < len(actions):
                    if not self._advance(rank, actions[positions[rank]], messages[positions[rank]]):
                        break
                    positions[rank] += 1
                    moved = True
        ends = [len(actions) for actions in self.schedule.actions]
        assert positions == ends, "the schedule deadlocks; check() says where"
        return Timeline(self.spans)

    def _advance(self, rank: int, action: Action, message: Message | None) -> bool:
        """Do the action unless the time of its input is not known yet."""
        if action.kind.is_compute:
            if message is not None and message not in self.arrivals:
                return False
            start = self.times[rank] if message is None else max(self.times[rank], self.arrivals.pop(message))
            self.times[rank] = start + self._seconds(rank, action)
            self.spans[rank].append(Span(action, start, self.times[rank]))
            return True
        assert message is not None, f"{action} on rank {rank} has no other end"
        channel = message.channel
        if action.kind.is_send:
            self.sent[channel].append((self.times[rank], message))
        else:
            self.posted[channel].append(self.times[rank])
        if self.sent[channel] and self.posted[channel]:
            made, sent = self.sent[channel].popleft()
            self.free[channel] = max(made, self.posted[channel].popleft(), self.free[channel]) + self.costs.transfer
            self.arrivals[sent] = self.free[channel]
        return True

    def _seconds(self, rank: int, action: Action) -> float:
        key = (rank, action.kind, action.chunk)
        if key not in self.seconds:
            self.seconds[key] = self.costs.seconds(action.kind, self.schedule.placement.virtual(rank, action.chunk))
        return self.seconds[key]


def _peak_bytes(schedule: Schedule, rank: int, costs: Costs) -> float:
    """The most activation bytes that a rank holds at once; 0 without backwards."""
    if not schedule.has_backward or not costs.activation_bytes:
        return 0.0
    change = {
        Kind.FORWARD: 1.0,
        Kind.BACKWARD: -1.0,
        Kind.BACKWARD_INPUT: costs.weight_share - 1.0,
        Kind.BACKWARD_WEIGHT: -costs.weight_share,
    }
    held = peak = 0.0
    for action in schedule.actions[rank]:
        if action.kind.is_compute:
            virtual = schedule.placement.virtual(rank, action.chunk)
            held += change[action.kind] * costs.activation_bytes[virtual]
            peak = max(peak, held)
    return peak
