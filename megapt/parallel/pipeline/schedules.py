"""Pipeline schedules: the order of forwards and backwards per rank, and the sends and receives among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from megapt.errors import UserError
from megapt.parallel.pipeline.actions import Action, Channel, Kind, Message, Placement

ComputeOrder = list[list[Action]]
"""Per rank, its compute actions in the order in which they run."""

NAMES = ("1f1b", "interleaved", "forward")
"""What `schedule` accepts as a name."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every rank does in one step: `actions[rank]` in order, compute and communication together.

    `has_backward` is False for evaluation, where nothing is kept for a backward.
    """

    name: str
    placement: Placement
    micro_batches: int
    actions: list[list[Action]]
    has_backward: bool = True


def schedule(name: str, stages: int, chunks: int, micro_batches: int) -> Schedule:
    """The schedule called `name` (one of `NAMES`) for `stages` ranks with `chunks` model chunks each.

    Raises UserError for an unknown name and for sizes that the schedule cannot run.
    """
    match name:
        case "1f1b":
            if chunks != 1:
                raise UserError(
                    f"the 1f1b schedule has one model chunk per stage, got {chunks}; "
                    "set chunks to 1, or use the interleaved schedule"
                )
            compute = one_f_one_b(stages, micro_batches)
        case "interleaved":
            compute = interleaved(stages, chunks, micro_batches)
        case "forward":
            compute = forward_only(stages, chunks, micro_batches)
        case _:
            raise UserError(f"unknown pipeline schedule {name!r}; legal names: {', '.join(NAMES)}")
    placement = Placement(stages, chunks)
    actions = with_communication(compute, placement)
    return Schedule(name, placement, micro_batches, actions, has_backward=name != "forward")


def one_f_one_b(stages: int, micro_batches: int) -> ComputeOrder:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): rank r holds at most min(stages - r, micro_batches) forwards.

    Any number of micro-batches from 1 on is legal; fewer than stages only means a larger bubble.
    """
    return _one_f_one_b_order(stages, 1, micro_batches, [stages - rank - 1 for rank in range(stages)])


def interleaved(stages: int, chunks: int, micro_batches: int) -> ComputeOrder:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2): the bubble of 1F1B divided by the number of chunks.

    Rank r warms up with 2 * (stages - r - 1) + (chunks - 1) * stages forwards (all of them if there are
    fewer) before it runs one forward and one backward in turn. With one chunk there is nothing to interleave
    and the order is that of 1F1B.

    Raises UserError unless micro_batches is a multiple of stages.
    """
    _require_positive(stages=stages, chunks=chunks, micro_batches=micro_batches)
    if micro_batches % stages:
        below = micro_batches - micro_batches % stages
        nearest = f"{below} or {below + stages}" if below else str(stages)
        raise UserError(
            "the interleaved schedule needs the number of micro-batches to be a multiple of the number of "
            f"pipeline stages, got {micro_batches} micro-batches for {stages} stages; "
            f"nearest legal: {nearest} micro-batches"
        )
    if chunks == 1:
        return one_f_one_b(stages, micro_batches)
    warm_up = [2 * (stages - rank - 1) + (chunks - 1) * stages for rank in range(stages)]
    return _one_f_one_b_order(stages, chunks, micro_batches, warm_up)


def forward_only(stages: int, chunks: int, micro_batches: int) -> ComputeOrder:
    """Forwards alone, for evaluation. Any number of micro-batches is legal."""
    _require_positive(stages=stages, chunks=chunks, micro_batches=micro_batches)
    return [_depth_first(Kind.FORWARD, stages, chunks, micro_batches) for _ in range(stages)]


def with_communication(compute: ComputeOrder, placement: Placement) -> list[list[Action]]:
    """Insert sends and receives into compute orders.

    A receive is posted one compute ahead of the one that needs it, so that the transfer overlaps that
    compute; earlier where a later message of the same channel is needed sooner, since both ends of a channel
    must keep the sender's order. A send follows the compute that made its tensor; receives due at the same
    place are posted before it, so that two ranks which send to each other find their receives posted and no
    schedule here needs a send to be buffered. Nothing is inserted between chunks on the same rank.
    """
    posts = _receive_positions(compute, placement)
    result: list[list[Action]] = []
    for rank, order in enumerate(compute):
        actions = list(posts[rank, 0])
        for position, action in enumerate(order):
            actions += [action, *posts[rank, position + 1]]
            if placement.message(rank, action.send()) is not None:
                actions.append(action.send())
        result.append(actions)
    return result


def _receive_positions(compute: ComputeOrder, placement: Placement) -> dict[tuple[int, int], list[Action]]:
    """(rank, position of a compute action) -> the receives to post before it."""
    sent: dict[Channel, list[Message]] = defaultdict(list)
    needed: dict[Message, tuple[int, Action]] = {}
    for rank, order in enumerate(compute):
        for position, action in enumerate(order):
            output = placement.message(rank, action.send())
            if output is not None:
                sent[output.channel].append(output)
            recv = action.recv()
            message = placement.message(rank, recv)
            if message is not None:
                needed[message] = (max(position - 1, 0), recv)
    posts: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for channel, messages in sent.items():
        latest = len(compute[channel.destination])
        # From the last message to the first, so that none is posted after one that follows it on the channel.
        for message in reversed(messages):
            if message in needed:
                wanted, recv = needed[message]
                latest = min(latest, wanted)
                posts[channel.destination, latest].insert(0, recv)
    return posts


def _one_f_one_b_order(stages: int, chunks: int, micro_batches: int, warm_up: Sequence[int]) -> ComputeOrder:
    """Per rank: `warm_up[rank]` forwards, one forward and one backward in turn, the other backwards."""
    _require_positive(stages=stages, chunks=chunks, micro_batches=micro_batches)
    result: ComputeOrder = []
    for rank in range(stages):
        forwards = iter(_depth_first(Kind.FORWARD, stages, chunks, micro_batches))
        backwards = iter(_depth_first(Kind.BACKWARD, stages, chunks, micro_batches))
        order = list(islice(forwards, warm_up[rank]))
        for forward in forwards:
            order += [forward, next(backwards)]
        result.append([*order, *backwards])
    return result


def _depth_first(kind: Kind, stages: int, chunks: int, micro_batches: int) -> list[Action]:
    """All (micro-batch, chunk) of a rank: groups of `stages` micro-batches go through all its chunks in turn.

    The first member of a group that large comes back to the first rank just as the last one leaves it.
    """
    chunk_order = range(chunks) if kind is Kind.FORWARD else range(chunks - 1, -1, -1)
    return [
        Action(kind, micro_batch, chunk)
        for first in range(0, micro_batches, stages)
        for chunk in chunk_order
        for micro_batch in range(first, min(first + stages, micro_batches))
    ]


def _require_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"a pipeline schedule needs {name} of at least 1, got {value}")
