"""Pipeline schedules: the order of forwards and backwards per rank, and the sends and receives among them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from megapt.errors import UserError
from megapt.parallel.pipeline.actions import Action, Channel, Kind, Message, Placement, PlacementKind

ComputeOrder = list[list[Action]]
"""Per rank, its compute actions in the order in which they run."""

TRAINING_NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
"""The schedules that hold backwards."""

NAMES = (*TRAINING_NAMES, "forward")
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


def placement(name: str, stages: int, chunks: int) -> Placement:
    """Where the schedule called `name` lays its virtual stages.

    Raises UserError for an unknown name and for sizes that the schedule cannot run with any number of micro-batches.
    """
    _require_positive(stages=stages, chunks=chunks)
    match name:
        case "gpipe" | "1f1b" | "zb-h1":
            if chunks != 1:
                raise UserError(
                    f"the {name} schedule has one model chunk per stage, got {chunks}; "
                    "set chunks to 1, or use the interleaved schedule"
                )
        case "zb-v":
            if chunks != 2:
                raise UserError(f"the zb-v schedule has two model chunks per rank, got {chunks}; set chunks to 2")
            return Placement(stages, chunks, PlacementKind.V)
        case "interleaved" | "forward":
            pass
        case _:
            raise UserError(f"unknown pipeline schedule {name!r}; legal names: {', '.join(NAMES)}")
    return Placement(stages, chunks)


def schedule(name: str, stages: int, chunks: int, micro_batches: int) -> Schedule:
    """The schedule called `name` (one of `NAMES`) for `stages` ranks with `chunks` model chunks each.

    Raises UserError for an unknown name and for sizes that the schedule cannot run.
    """
    where = placement(name, stages, chunks)
    match name:
        case "gpipe":
            compute = gpipe(stages, micro_batches)
        case "1f1b":
            compute = one_f_one_b(stages, micro_batches)
        case "interleaved":
            compute = interleaved(stages, chunks, micro_batches)
        case "zb-h1":
            compute = zb_h1(stages, micro_batches)
        case "zb-v":
            compute = zb_v(stages, micro_batches)
        case _:
            return forward_schedule(where, micro_batches)
    return Schedule(name, where, micro_batches, with_communication(compute, where))


def forward_schedule(placement: Placement, micro_batches: int) -> Schedule:
    """Forwards alone, for evaluation, on any placement. Any number of micro-batches is legal."""
    compute = forward_only(placement, micro_batches)
    return Schedule("forward", placement, micro_batches, with_communication(compute, placement), has_backward=False)


def gpipe(stages: int, micro_batches: int) -> ComputeOrder:
    """GPipe (arXiv 1811.06965): all forwards, then all backwards; every rank holds all micro-batches at once."""
    return _one_f_one_b_order(stages, 1, micro_batches, [micro_batches] * stages)


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


def zb_h1(stages: int, micro_batches: int) -> ComputeOrder:
    """ZB-H1 (arXiv 2401.10241, section 2.1): a third of 1F1B's bubble where F, I and W take equal time.

    The order is that of 1F1B with backwards cut in two; rank r's weight gradients run r micro-batches behind its
    input gradients. So the gradient of an input never waits for a weight's, and what is behind fills the tail. All
    ranks hold min(stages, micro_batches) micro-batches in part or whole, as 1F1B's first rank does.

    Any number of micro-batches from 1 on is legal.
    """
    _require_positive(stages=stages, micro_batches=micro_batches)
    result: ComputeOrder = []
    for rank in range(stages):
        ahead = min(stages - rank - 1, micro_batches)
        order = [Action(Kind.FORWARD, micro_batch, 0) for micro_batch in range(ahead)]
        for micro_batch in range(micro_batches):
            if micro_batch + ahead < micro_batches:
                order.append(Action(Kind.FORWARD, micro_batch + ahead, 0))
            order.append(Action(Kind.BACKWARD_INPUT, micro_batch, 0))
            if micro_batch >= rank:
                order.append(Action(Kind.BACKWARD_WEIGHT, micro_batch - rank, 0))
        behind = range(max(micro_batches - rank, 0), micro_batches)
        order += [Action(Kind.BACKWARD_WEIGHT, micro_batch, 0) for micro_batch in behind]
        result.append(order)
    return _joined(result, Placement(stages, 1))


def zb_v(stages: int, micro_batches: int) -> ComputeOrder:
    """ZB-V (arXiv 2401.10241, section 6; the V is that of arXiv 2405.15362): no bubble where F, I and W are equal.

    Every rank holds at most 2 * stages halves of a micro-batch, as much as 1F1B's first rank. The order needs
    2 * stages - 1 micro-batches to fill the pipeline; with fewer it is the same without those that are missing, which
    is legal and only means a bubble.
    """
    _require_positive(stages=stages, micro_batches=micro_batches)
    full = max(micro_batches, 2 * stages - 1)
    f0, f1 = (Kind.FORWARD, 0), (Kind.FORWARD, 1)
    i0, i1 = (Kind.BACKWARD_INPUT, 0), (Kind.BACKWARD_INPUT, 1)
    w0, w1 = (Kind.BACKWARD_WEIGHT, 0), (Kind.BACKWARD_WEIGHT, 1)
    result: ComputeOrder = []
    for rank in range(stages):
        later = stages - rank
        warm_up = [f0] * (2 * later - 1) + [f1, f0] * rank + [f1, i1, w1] * later
        steady = [f0, i0, w0, f1, i1, w1] * (full - 2 * stages + rank + 1) + [i0, w0, f1, i1, w1] * (later - 1)
        cool_down = [i0, i1] * rank + [i0, w0] * later + [w1] * rank + [w0] * rank
        done: Counter[tuple[Kind, int]] = Counter()
        order = []
        for kind, chunk in warm_up + steady + cool_down:
            order.append(Action(kind, done[kind, chunk], chunk))
            done[kind, chunk] += 1
        result.append([action for action in order if action.micro_batch < micro_batches])
    return _joined(result, Placement(stages, 2, PlacementKind.V))


def forward_only(placement: Placement, micro_batches: int) -> ComputeOrder:
    """Forwards alone, on any placement, in the order in which they become possible on devices of equal speed."""
    stages, chunks = placement.stages, placement.chunks
    _require_positive(stages=stages, chunks=chunks, micro_batches=micro_batches)
    if placement.kind is PlacementKind.LOOPING:
        return [_depth_first(Kind.FORWARD, stages, chunks, micro_batches) for _ in range(stages)]
    result: ComputeOrder = []
    for rank in range(stages):
        # So many leave this rank before the first one comes back to it from the turn of the V.
        ahead = min(2 * (stages - rank) - 1, micro_batches)
        order = [Action(Kind.FORWARD, micro_batch, 0) for micro_batch in range(ahead)]
        for micro_batch in range(micro_batches):
            order.append(Action(Kind.FORWARD, micro_batch, 1))
            if micro_batch + ahead < micro_batches:
                order.append(Action(Kind.FORWARD, micro_batch + ahead, 0))
        result.append(order)
    return result


def with_communication(compute: ComputeOrder, placement: Placement) -> list[list[Action]]:
    """Insert sends and receives into compute orders.

    A receive is posted one compute ahead of the one that needs it, so that the transfer overlaps that
    compute; earlier where a later message of the same channel is needed sooner, since both ends of a channel
    must keep the sender's order. A send follows the compute that made its tensor; receives due at the same
    place are posted before it, so that two ranks which send to each other find their receives posted: no schedule
    here needs a send to be buffered, but for zb-v, which needs one per channel. Nothing is inserted between chunks on
    the same rank.
    """
    posts = _receive_positions(compute, placement)
    result: list[list[Action]] = []
    for rank, order in enumerate(compute):
        actions = list(posts[rank, 0])
        for position, action in enumerate(order):
            actions += [action, *posts[rank, position + 1]]
            if action.kind.passes_on and placement.message(rank, action.send()) is not None:
                actions.append(action.send())
        result.append(actions)
    return result


def _receive_positions(compute: ComputeOrder, placement: Placement) -> dict[tuple[int, int], list[Action]]:
    """(rank, position of a compute action) -> the receives to post before it."""
    sent: dict[Channel, list[Message]] = defaultdict(list)
    needed: dict[Message, tuple[int, Action]] = {}
    for rank, order in enumerate(compute):
        for position, action in enumerate(order):
            if not action.kind.passes_on:
                continue
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


def _joined(compute: ComputeOrder, placement: Placement) -> ComputeOrder:
    """With one backward in place of a cut one where cutting it gains nothing.

    That is on the first virtual stage, whose input gradient nobody waits for, where the W follows at once.
    """
    result: ComputeOrder = []
    for rank, order in enumerate(compute):
        joined: list[Action] = []
        for action in order:
            cut = Action(Kind.BACKWARD_INPUT, action.micro_batch, action.chunk)
            first = placement.virtual(rank, action.chunk) == 0
            if first and action.kind is Kind.BACKWARD_WEIGHT and joined[-1] == cut:
                joined[-1] = Action(Kind.BACKWARD, action.micro_batch, action.chunk)
            else:
                joined.append(action)
        result.append(joined)
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
