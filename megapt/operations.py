"""Which collective or transfer this process is at, for reports of hangs.

Every rank notes its operations as it issues them. A step issues the same ones every time, so that the list of one step
says what a rank would have done next. Like a logger there is one record per process: it watches and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Where a rank is: plain values, that travel with its heartbeat.

    action: the pipeline's action or the phase of the step; operation: the last one issued, or what it waits for;
    index: how many it has issued in this step, of how many (0 if no step was complete yet); next: the one after it, as
    in the step before; issued: per group ("tp 4, 5"), how many operations this rank has issued on it so far; waits_for:
    the rank whose message it waits for.
    """

    action: str
    operation: str = ""
    index: int = 0
    of: int = 0
    next: str = ""
    issued: dict[str, int] = field(default_factory=dict)
    waits_for: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Operations:
    """The record of one process. Cheap enough to be on always: about a microsecond for each operation."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, with new process groups."""
        self.action = ""
        self._script: list[str] = []
        self._step: list[str] = []
        self._waiting: tuple[int, str] | None = None
        self._names: dict[dist.ProcessGroup | None, str] = {}
        self._issued: dict[str, int] = {}

    def name(self, group: dist.ProcessGroup | None, axis: str) -> None:
        """What a group is called in reports."""
        import torch.distributed as dist

        if group is not None:
            self._names[group] = f"{axis} {', '.join(map(str, dist.get_process_group_ranks(group)))}"

    def begin_step(self) -> None:
        """The operations since the last call are what every step does."""
        self._script, self._step = self._step, []

    def note(self, kind: str, group: dist.ProcessGroup | None, tensor: torch.Tensor, peer: int | None = None) -> None:
        """An operation is about to be issued. `peer`: the rank at the other end of a send or receive."""
        name = self._names.get(group, "world")
        self._issued[name] = self._issued.get(name, 0) + 1
        where = f"over {name}" if peer is None else f"rank {peer}"
        self._step.append(f"{kind} {where} of {list(tensor.shape)} in {self.action}")

    def wait(self, finish: Callable[[], Any], peer: int, what: str) -> None:
        """Wait for a message of `peer`, and be seen to."""
        self._waiting = (peer, what)
        finish()
        self._waiting = None

    def place(self) -> Place:
        """Where this rank is. Called from another thread: reads, and copies what may grow."""
        step, script, waiting = self._step, self._script, self._waiting
        index = len(step)
        operation = step[-1] if step else ""
        if waiting is not None:
            operation = f"waiting for {waiting[1]} from rank {waiting[0]}"
        following = script[index] if index < len(script) else ""
        issued = dict(self._issued)
        return Place(
            self.action, operation, index, len(script), following, issued, None if waiting is None else waiting[0]
        )


OPERATIONS = Operations()


def diagnose(places: Mapping[int, Place]) -> tuple[list[int], list[str]]:
    """Who keeps the others waiting, and how that is seen.

    places: of every rank that is stuck. Returns the ranks that wait for nobody while others wait for them (all ranks if
    there is none), and a line per group or message for which somebody is missing.
    """
    waits: dict[int, set[int]] = {rank: set() for rank in places}
    lines = []
    for name in sorted({name for place in places.values() for name in place.issued}):
        members = {rank: place.issued[name] for rank, place in places.items() if name in place.issued}
        first = max(members.values())
        ahead = [rank for rank, count in members.items() if count == first]
        behind = [rank for rank, count in members.items() if count < first]
        # A receive may be posted long before its message is due: only a wait for it says that one is missing.
        if behind and not name.startswith("channel"):
            for rank in ahead:
                waits[rank].update(behind)
            lines.append(f"{_ranks(behind)} not in {places[ahead[0]].operation}, where {_ranks(ahead)} waiting")
    for rank, place in places.items():
        if place.waits_for is not None:
            waits[rank].add(place.waits_for)
            lines.append(f"rank {rank} {place.operation} in {place.action}")
    waited_for = set().union(*waits.values()) if waits else set()
    missing = sorted(rank for rank in waited_for if not waits.get(rank))
    return missing or sorted(places), lines


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown} is" if len(ranks) == 1 else f"ranks {shown} are"
