"""Which collective or transfer this process is at, for reports of hangs.

Every rank notes its operations as it issues them. A step issues the same ones every time, so that the list of one step
says what a rank would have done next; `megapt collectives` makes the same list without running. Like a logger there is
one record per process: it watches and decides nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True)
class Blocked:
    """An operation that does not let its rank go on.

    queue: of which it is the `number`-th: the operations of one group, or the transfers on it from one rank to another.
    tensor: in words. peer: the rank at the other end of a transfer.
    """

    queue: str
    number: int
    kind: str
    tensor: str
    peer: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a rank is: plain values, that travel with its heartbeat.

    action: the pipeline's action or the phase of the step; operation: the last one issued; index: how many it has
    issued in this step, of how many (0 in the first one); next: what comes then, as in the step before; issued: per
    queue, how many operations so far; blocked: what the process waits for at this moment.
    """

    action: str
    operation: str = ""
    index: int = 0
    of: int = 0
    next: str = ""
    issued: dict[str, int] = field(default_factory=dict)
    blocked: Blocked | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Place:
        blocked = values["blocked"]
        return Place(**{**values, "blocked": None if blocked is None else Blocked(**blocked)})


class Noted(NamedTuple):
    """An operation as it was noted. ranks: of its group, None for the world's; shape, dtype: of the tensor given; peer:
    the rank at the other end of a transfer; content: what that moves."""

    kind: str
    ranks: tuple[int, ...] | None
    shape: tuple[int, ...]
    dtype: str
    peer: int | None
    content: str


class Issued:
    """An operation under way, in the place of torch's `Work`: who waits for it is seen to wait."""

    __slots__ = ("known", "number", "record", "work")

    def __init__(self, record: Operations, known: _Known, number: int) -> None:
        self.record, self.known, self.number = record, known, number
        self.work: dist.Work | None = None

    def issued(self, work: dist.Work | None) -> Issued:
        """The call has returned: the process goes on. work: None where it was carried out already."""
        self.work = work
        self.record._blocked, self.record.content = None, ""
        return self

    def wait(self) -> None:
        if self.work is not None:
            self.record._blocked = self
            self.work.wait()
            self.record._blocked = None

    def is_completed(self) -> bool:
        return self.work is None or self.work.is_completed()


class _Queue:
    """Operations that the ranks concerned issue in the same order."""

    __slots__ = ("issued", "name", "peer", "ranks")

    def __init__(self, name: str, ranks: tuple[int, ...] | None, peer: int | None = None) -> None:
        self.name, self.ranks, self.peer, self.issued = name, ranks, peer, 0


class _Step:
    """The operations since a pass began, by number in the record's table, with what the rank was doing."""

    __slots__ = ("actions", "name", "operations")

    def __init__(self, name: str) -> None:
        self.name = name
        self.operations = array("I")
        self.actions: list[str] = []


_Known = tuple[str, _Queue, "torch.Size", "torch.dtype", str]


class Operations:
    """The record of one process. Cheap enough to be on always: about a microsecond and twelve bytes an operation.

    action: what the process does, in words; set by whoever does it. content: what the transfer that is
    being issued moves.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self, rank: int = 0) -> None:
        """Begin anew as this rank, with new process groups."""
        self.action = ""
        self.content = ""
        self._rank = rank
        self._queues: dict[Any, _Queue] = {None: _Queue("the world", None)}
        self._numbers: dict[_Known, int] = {}
        self._known: list[_Known] = []
        self._blocked: Issued | None = None
        self._complete: dict[str, _Step] = {}
        self._now: tuple[_Step, _Step | None] = (_Step(""), None)  # and the pass of that name before; replaced whole

    def name(self, group: dist.ProcessGroup | None, name: str) -> None:
        """What a group is called in reports: the same on all its ranks, and unlike all their other groups."""
        import torch.distributed as dist

        ranks = tuple(dist.get_process_group_ranks(group))
        self._queues[group] = _Queue(f"{name} {brief(ranks)}", ranks)

    def begin(self, name: str) -> None:
        """A pass through the schedule begins, which issues what the one of this name before did."""
        ended = self._now[0]
        self._complete[ended.name] = ended
        self._now = _Step(name), self._complete.get(name)

    def note(
        self,
        kind: str,
        group: dist.ProcessGroup | None,
        tensor: torch.Tensor,
        peer: int | None = None,
        content: str = "",
    ) -> Issued:
        """An operation is about to be issued.

        peer: the rank at the other end of a send or receive. content: what that moves, in the words of both ends.

        The process counts as waiting in it until `issued` is called on the result.
        """
        key = group if peer is None else (group, kind, peer)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._new_queue(kind, group, peer)
        queue.issued += 1
        self.content = content
        known = kind, queue, tensor.shape, tensor.dtype, content
        number = self._numbers.get(known)
        if number is None:
            number = self._numbers[known] = len(self._known)
            self._known.append(known)
        step = self._now[0]
        step.actions.append(self.action)
        step.operations.append(number)
        self._blocked = issued = Issued(self, known, queue.issued)
        return issued

    def _new_queue(self, kind: str, group: dist.ProcessGroup | None, peer: int | None) -> _Queue:
        if group not in self._queues:
            self.name(group, "ranks")
        queue = self._queues[group]
        if peer is not None:
            source, destination = (self._rank, peer) if kind == "send" else (peer, self._rank)
            queue = _Queue(f"{queue.name}, {source} to {destination}", queue.ranks, peer)
            self._queues[group, kind, peer] = queue
        return queue

    def noted(self) -> list[Noted]:
        """The operations since the pass began."""
        known = (self._known[number] for number in self._now[0].operations)
        return [
            Noted(kind, queue.ranks, tuple(shape), str(dtype).removeprefix("torch."), queue.peer, content)
            for kind, queue, shape, dtype, content in known
        ]

    def place(self) -> Place:
        """Where this rank is. Called from another thread: everything it reads is replaced whole or only grows."""
        (step, before), blocked, action = self._now, self._blocked, self.action
        index = len(step.operations)
        following = ""
        if before is not None and index < len(before.operations):
            following = f"{self._words(before.operations[index])} in {before.actions[index]}"
        waits = None
        if blocked is not None:
            kind, queue = blocked.known[:2]
            waits = Blocked(queue.name, blocked.number, kind, _tensor(blocked.known), queue.peer)
        return Place(
            action=action,
            operation=self._words(step.operations[index - 1]) if index else "",
            index=index,
            of=0 if before is None else len(before.operations),
            next=following,
            issued={queue.name: queue.issued for queue in list(self._queues.values())},
            blocked=waits,
        )

    def _words(self, number: int) -> str:
        kind, queue = self._known[number][:2]
        return in_words(kind, _tensor(self._known[number]), queue.name, queue.peer)


def in_words(kind: str, tensor: str, queue: str, peer: int | None) -> str:
    """An operation for a reader."""
    if peer is None:
        return f"{kind} of {tensor} over {queue}"
    return f"{kind} of {tensor} {'to' if kind == 'send' else 'from'} rank {peer}"


def _tensor(known: _Known) -> str:
    shape, dtype, content = known[2:]
    tensor = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
    return f"{content} ({tensor})" if content else tensor


def brief(ranks: Sequence[int]) -> str:
    """Ranks in few words, however many there are."""
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:3]))} ... {ranks[-1]} ({len(ranks)} ranks)"


OPERATIONS = Operations()
