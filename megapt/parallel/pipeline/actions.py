"""The vocabulary of pipeline schedules: actions, the placement of model chunks, channels between ranks.

A schedule is data: per pipeline rank, a list of `Action`. The same lists drive the runtime and the deadlock
check, so what was checked is what runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, StrEnum

from megapt.errors import UserError


class Direction(StrEnum):
    """Which way data flows through the model: activations forward, gradients of activations backward."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Kind(Enum):
    """What an action does. The value is the short form used when an action is printed.

    The backward of a (micro-batch, chunk) is either one BACKWARD, or a BACKWARD_INPUT and later a BACKWARD_WEIGHT
    (arXiv 2401.10241): the first makes the gradient of the chunk's input, which the previous stage waits for, the
    second the gradients of its weights, which nobody waits for. A schedule may hold both forms.
    """

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
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
    def passes_on(self) -> bool:
        """Whether the action takes a tensor from one neighbouring stage and makes one for the other.

        That is all compute except BACKWARD_WEIGHT, which needs only what its BACKWARD_INPUT left on the same rank.
        """
        return self in _RECV_OF

    @property
    def direction(self) -> Direction:
        """The direction of the data this action consumes, produces or moves."""
        return _DIRECTION[self]


# A kind of compute belongs here with what brings its input and what carries its output away.
_RECV_OF = {
    Kind.FORWARD: Kind.RECV_FORWARD,
    Kind.BACKWARD: Kind.RECV_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.RECV_BACKWARD,
}
_SEND_OF = {
    Kind.FORWARD: Kind.SEND_FORWARD,
    Kind.BACKWARD: Kind.SEND_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.SEND_BACKWARD,
}
_RECVS = frozenset({Kind.RECV_FORWARD, Kind.RECV_BACKWARD})
_SENDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})
_FORWARDS = frozenset({Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD})
_DIRECTION = {kind: Direction.FORWARD if kind in _FORWARDS else Direction.BACKWARD for kind in Kind}
_PRINTED = re.compile(rf"({'|'.join(kind.value for kind in Kind)})(\d+)\.(\d+)")


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

    @staticmethod
    def parse(text: str) -> Action:
        """The action that prints as `text`. Raises UserError where none does."""
        printed = _PRINTED.fullmatch(text)
        if printed is None:
            kinds = ", ".join(kind.value for kind in Kind)
            raise UserError(
                f"an action is a kind ({kinds}), a micro-batch, a dot and a chunk, as in F3.0; got {text!r}"
            )
        kind, micro_batch, chunk = printed.groups()
        return Action(Kind(kind), int(micro_batch), int(chunk))

    def recv(self) -> Action:
        """The receive that brings this compute action its input; the same for B and I. A W has none."""
        assert self.kind.passes_on, f"{self} takes nothing from a neighbouring stage"
        return Action(_RECV_OF[self.kind], self.micro_batch, self.chunk)

    def send(self) -> Action:
        """The send that carries this compute action's output away; the same for B and I. A W has none."""
        assert self.kind.passes_on, f"{self} makes nothing for a neighbouring stage"
        return Action(_SEND_OF[self.kind], self.micro_batch, self.chunk)


@dataclass(frozen=True, slots=True)
class Channel:
    """A first-in, first-out path for tensors from one rank to another.

    `wraps` marks the step between the last rank and the first of a looping placement, where the chunk changes.
    With two ranks it joins the same two as the ordinary step does; keeping them apart (one communicator per
    direction and `wraps`) lets a posted receive wait on one without holding up a send on the other. In a V the two
    chunks run in opposite directions, so that source, destination and direction tell them apart.
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


class PlacementKind(StrEnum):
    """How virtual stages are laid on ranks."""

    LOOPING = "looping"
    V = "v"


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rank holds which virtual stage.

    The layers of the model are cut into stages * chunks virtual stages in order; each of the `stages` pipeline ranks
    holds `chunks` of them. Looping (arXiv 2104.04473, section 2.2): virtual stage k lies on rank k % stages as its
    chunk k // stages. V (arXiv 2405.15362): ranks hold two chunks, virtual stages k and 2 * stages - 1 - k, so that
    the model begins and ends on rank 0 and turns within the last rank. All else follows from `rank`, `chunk` and
    `virtual`.

    Raises UserError for a V of other than two chunks.
    """

    stages: int
    chunks: int
    kind: PlacementKind = PlacementKind.LOOPING

    def __post_init__(self) -> None:
        if self.kind is PlacementKind.V and self.chunks != 2:
            raise UserError(f"a V placement has two model chunks per rank, got {self.chunks}; set chunks to 2")

    @property
    def virtual_stages(self) -> int:
        """How many pieces the model is cut into."""
        return self.stages * self.chunks

    def rank(self, virtual: int) -> int:
        """The pipeline rank that holds virtual stage `virtual`."""
        place = virtual % self.stages
        return self.stages - 1 - place if self._returns(virtual // self.stages) else place

    def chunk(self, virtual: int) -> int:
        """The number of virtual stage `virtual` among the chunks of its rank."""
        return virtual // self.stages

    def virtual(self, rank: int, chunk: int) -> int:
        """The virtual stage that is chunk `chunk` of `rank`."""
        place = self.stages - 1 - rank if self._returns(chunk) else rank
        return chunk * self.stages + place

    def next(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """(rank, chunk) that follows in the model; None after the last virtual stage."""
        return self._locate(self.virtual(rank, chunk) + 1)

    def previous(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """(rank, chunk) that precedes in the model; None before the first virtual stage."""
        return self._locate(self.virtual(rank, chunk) - 1)

    def source(self, rank: int, action: Action) -> tuple[int, int] | None:
        """(rank, chunk) that makes the input of a compute or receive action.

        None at an end of the model, and for BACKWARD_WEIGHT, which has no input from another chunk.
        """
        if action.kind is Kind.BACKWARD_WEIGHT:
            return None
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

    def _returns(self, chunk: int) -> bool:
        """Whether the stages of `chunk` lie on the ranks in descending order."""
        return self.kind is PlacementKind.V and chunk == 1

    def _locate(self, virtual: int) -> tuple[int, int] | None:
        if not 0 <= virtual < self.virtual_stages:
            return None
        return self.rank(virtual), self.chunk(virtual)
