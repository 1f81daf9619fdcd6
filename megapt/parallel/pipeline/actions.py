"""The vocabulary of pipeline schedules: actions, the placement of model chunks, channels between ranks.

A schedule is data: per pipeline rank, a list of `Action`. The same lists drive the runtime and the deadlock
check, so what was checked is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class Direction(StrEnum):
    """Which way data flows through the model: activations forward, gradients of activations backward."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Kind(Enum):
    """What an action does. The value is the short form used when an action is printed."""

    FORWARD = "F"
    BACKWARD = "B"
    SEND_FORWARD = "sF"
    RECV_FORWARD = "rF"
    SEND_BACKWARD = "sB"
    RECV_BACKWARD = "rB"

    @property
    def is_compute(self) -> bool:
        """Whether the action runs the model chunk, rather than moving a tensor."""
        return not (self.is_send or self.is_recv)

    @property
    def is_send(self) -> bool:
        """Whether the action hands a tensor to another rank."""
        return self in _SENDS

    @property
    def is_recv(self) -> bool:
        """Whether the action posts a receive from another rank."""
        return self in _RECVS

    @property
    def direction(self) -> Direction:
        """The direction of the data this action consumes, produces or moves."""
        return _DIRECTION[self]


# A kind of compute belongs here with what brings its input and what carries its output away.
_RECV_OF = {Kind.FORWARD: Kind.RECV_FORWARD, Kind.BACKWARD: Kind.RECV_BACKWARD}
_SEND_OF = {Kind.FORWARD: Kind.SEND_FORWARD, Kind.BACKWARD: Kind.SEND_BACKWARD}
_RECVS = frozenset({Kind.RECV_FORWARD, Kind.RECV_BACKWARD})
_SENDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})
_DIRECTION = {
    Kind.FORWARD: Direction.FORWARD,
    Kind.SEND_FORWARD: Direction.FORWARD,
    Kind.RECV_FORWARD: Direction.FORWARD,
    Kind.BACKWARD: Direction.BACKWARD,
    Kind.SEND_BACKWARD: Direction.BACKWARD,
    Kind.RECV_BACKWARD: Direction.BACKWARD,
}


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a rank's list: do `kind` for `micro_batch` on this rank's model chunk number `chunk`.

    A send names the chunk that produced the tensor, a receive the chunk that will consume it; both are local
    to the rank whose list holds the action. Printed as `F3.0`: forward of micro-batch 3 on chunk 0.
    """

    kind: Kind
    micro_batch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}.{self.chunk}"

    def recv(self) -> Action:
        """The receive that brings this compute action its input."""
        return Action(_RECV_OF[self.kind], self.micro_batch, self.chunk)

    def send(self) -> Action:
        """The send that carries this compute action's output away."""
        return Action(_SEND_OF[self.kind], self.micro_batch, self.chunk)


@dataclass(frozen=True, slots=True)
class Channel:
    """A first-in, first-out path for tensors from one rank to another.

    `wraps` marks the step between the last rank and the first, where the chunk changes. With two ranks it
    joins the same two as the ordinary step does; keeping them apart (one communicator per direction and
    `wraps`) lets a posted receive wait on one without holding up a send on the other.
    """

    source: int
    destination: int
    direction: Direction
    wraps: bool

    def __str__(self) -> str:
        return f"{self.direction} {self.source}->{self.destination}{' (wraps)' if self.wraps else ''}"


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor on a channel: `micro_batch`, bound for virtual stage `virtual`. Equal on both ends."""

    channel: Channel
    micro_batch: int
    virtual: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Looping placement: virtual stage k lives on rank k % stages as its chunk k // stages.

    The layers of the model are cut into stages * chunks virtual stages in order; each of the `stages`
    pipeline ranks holds `chunks` of them (arXiv 2104.04473, section 2.2). All else follows from `rank`,
    `chunk` and `virtual`.
    """

    stages: int
    chunks: int

    @property
    def virtual_stages(self) -> int:
        """How many pieces the model is cut into."""
        return self.stages * self.chunks

    def rank(self, virtual: int) -> int:
        """The pipeline rank that holds virtual stage `virtual`."""
        return virtual % self.stages

    def chunk(self, virtual: int) -> int:
        """The number of virtual stage `virtual` among the chunks of its rank."""
        return virtual // self.stages

    def virtual(self, rank: int, chunk: int) -> int:
        """The virtual stage that is chunk `chunk` of `rank`."""
        return chunk * self.stages + rank

    def next(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """(rank, chunk) that follows in the model; None after the last virtual stage."""
        return self._locate(self.virtual(rank, chunk) + 1)

    def previous(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """(rank, chunk) that precedes in the model; None before the first virtual stage."""
        return self._locate(self.virtual(rank, chunk) - 1)

    def source(self, rank: int, action: Action) -> tuple[int, int] | None:
        """(rank, chunk) that makes the input of a compute or receive action; None at an end of the model."""
        forward = action.kind.direction is Direction.FORWARD
        return self.previous(rank, action.chunk) if forward else self.next(rank, action.chunk)

    def message(self, rank: int, action: Action) -> Message | None:
        """The message that a send or receive in `rank`'s list moves.

        None if there is none to move: at either end of the model, and where the neighbouring chunk is on the
        same rank and the tensor is handed over in memory.
        """
        assert not action.kind.is_compute, f"{action} moves no tensor"
        here = self.virtual(rank, action.chunk)
        downstream = 1 if action.kind.direction is Direction.FORWARD else -1
        source, destination = (here, here + downstream) if action.kind.is_send else (here - downstream, here)
        if not (0 <= source < self.virtual_stages and 0 <= destination < self.virtual_stages):
            return None
        if self.rank(source) == self.rank(destination):
            return None
        channel = Channel(
            source=self.rank(source),
            destination=self.rank(destination),
            direction=action.kind.direction,
            wraps=self.chunk(source) != self.chunk(destination),
        )
        return Message(channel, action.micro_batch, destination)

    def channels(self) -> list[Channel]:
        """Every channel that a schedule on this placement can use, in an order that is the same on all ranks."""
        found: dict[Channel, None] = {}
        for kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            for virtual in range(self.virtual_stages):
                rank, chunk = self.rank(virtual), self.chunk(virtual)
                message = self.message(rank, Action(kind, 0, chunk))
                if message is not None:
                    found[message.channel] = None
        return list(found)

    def _locate(self, virtual: int) -> tuple[int, int] | None:
        if not 0 <= virtual < self.virtual_stages:
            return None
        return self.rank(virtual), self.chunk(virtual)
