"""What a pipeline rank holds as it goes through a schedule's actions, counted in micro-batches and streams."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from megapt.model.recompute import Policy
from megapt.parallel.pipeline.actions import Action, Channel, Kind, Placement
from megapt.parallel.pipeline.runtime import _OUTSTANDING
from megapt.parallel.pipeline.schedules import Schedule, schedule
from megapt.plan.passes import PassKind, chunk_parts, chunk_pass
from megapt.plan.working import ITEMS, Place
from megapt.plan.zero_memory import ZeroMemory

Counts = npt.NDArray[np.int64]

_PASSES: dict[Kind, PassKind] = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward_input",
    Kind.BACKWARD_WEIGHT: "backward_weight",
}


_KINDS = tuple(_PASSES)
_WEIGHTS = (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)
_GRADIENTS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


@dataclass(frozen=True)
class Levels:
    """Before compute actions of a rank, those that find the same but once: held [actions, 2 x chunks], how many
    micro-batches of each chunk are kept for a backward, then for their weights' gradients; transfers [actions], streams
    that have arrived or are on their way to a neighbour.

    kinds (numbers in `_KINDS`), chunks, began (whether a backward has run before): [actions]. after: as `held`, after
    each of all. ends: for each chunk, the place of its last gradients.
    """

    actions: list[Action]
    kinds: Counts
    chunks: Counts
    began: Counts
    held: Counts
    transfers: Counts
    after: Counts
    ends: list[int]


@lru_cache(maxsize=256)
def cached_schedule(name: str, stages: int, chunks: int, micro_batches: int) -> Schedule:
    return schedule(name, stages, chunks, micro_batches)


@lru_cache(maxsize=2048)
def levels(name: str, stages: int, chunks: int, micro_batches: int, rank: int) -> Levels:
    made = cached_schedule(name, stages, chunks, micro_batches)
    where, replay = made.placement, _Replay()
    for action in made.actions[rank]:
        if action.kind.is_recv:
            replay.arrived += 1
        elif action.kind.is_send:
            replay.send(where, rank, action)
        else:
            replay.compute(where, rank, action)
    computed = [action for action in made.actions[rank] if action.kind.is_compute]
    changes = np.zeros((len(computed), 2 * chunks), dtype=np.int64)
    for row, action in zip(changes, computed, strict=True):
        row[action.chunk] = (action.kind is Kind.FORWARD) - (action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT))
        row[chunks + action.chunk] = (action.kind is Kind.BACKWARD_INPUT) - (action.kind is Kind.BACKWARD_WEIGHT)
    after = changes.cumsum(0)
    kinds = [_KINDS.index(action.kind) for action in computed]
    backward = np.array([action.kind in _GRADIENTS for action in computed])
    began = backward.cumsum() > backward
    rows = np.column_stack([kinds, [a.chunk for a in computed], began, replay.transfers, after - changes])
    last = [max(i for i, a in enumerate(computed) if a.chunk == c and a.kind in _WEIGHTS) for c in range(chunks)]
    _, first = np.unique(rows, axis=0, return_index=True)
    places = np.unique([*first, *last])
    found = rows[places]
    return Levels(
        actions=[computed[place] for place in places],
        kinds=found[:, 0],
        chunks=found[:, 1],
        began=found[:, 2] > 0,
        held=found[:, 4:],
        transfers=found[:, 3],
        after=np.unique(after, axis=0),
        ends=[int(np.searchsorted(places, place)) for place in last],
    )


class _Replay:
    """Streams on their way to and from a rank. transfers: their number before each compute action."""

    def __init__(self) -> None:
        self.arrived = self.leaving = 0
        self.sent: Counter[Channel] = Counter()
        self.transfers: list[int] = []

    def send(self, where: Placement, rank: int, action: Action) -> None:
        message = where.message(rank, action)
        assert message is not None
        self.leaving -= 1
        # The runtime keeps as many until it sends the next ones.
        self.sent[message.channel] = min(self.sent[message.channel] + 1, _OUTSTANDING)

    def compute(self, where: Placement, rank: int, action: Action) -> None:
        if where.source(rank, action) is not None:
            self.arrived -= 1
        self.transfers.append(self.arrived + self.leaving + self.sent.total())
        if not action.kind.passes_on:
            return
        target = (where.next if action.kind is Kind.FORWARD else where.previous)(rank, action.chunk)
        if target is not None and target[0] == rank:
            self.arrived += 1
        elif target is not None:
            self.leaving += 1


class Passes:
    """The passes of a rank's chunks, laid on its schedule.

    policies: of each chunk's layers; ends: of each chunk, whether the model begins there, and whether it ends.
    """

    def __init__(
        self, made: Schedule, rank: int, place: Place, policies: list[list[Policy]], ends: list[tuple[bool, bool]]
    ) -> None:
        self.place, self.policies, self.ends = place, policies, ends
        self.levels = levels(made.name, made.placement.stages, made.placement.chunks, made.micro_batches, rank)
        self.stream = place.stream
        # By kind, chunk and item; of kinds that the schedule does not have too.
        self.tops = np.zeros((len(_KINDS), len(ends), len(ITEMS)), dtype=np.int64)
        self.kept = np.zeros((2 * len(ends), len(ITEMS)), dtype=np.int64)
        for chunk, (first, last) in enumerate(ends):
            passes = [chunk_pass(place, tuple(policies[chunk]), first, last, _PASSES[kind]) for kind in _KINDS]
            self.tops[:, chunk] = [one.top for one in passes]
            kept, put_off = self.kept[chunk], self.kept[len(ends) + chunk]
            kept += passes[0].end
            kept[0] -= 0 if last else self.stream  # the result leaves
            put_off += kept + passes[2].end
            put_off[-1] -= 0 if first else self.stream

    def most(self, state: ZeroMemory) -> tuple[dict[str, int], str]:
        """Bytes by item at the action with the most, beside what the ZeRO backend holds, and the action's name."""
        now = self.levels
        items = now.held @ self.kept + self.tops[now.kinds, now.chunks]
        # Weights that are gathered are there from the beginning.
        extra = sum(state.later.values()) * (now.began | (state.fetch > 0))
        at = int((items.sum(1) + now.transfers * self.stream + extra).argmax())
        found = [(self._named(items[at], at, state.later if extra[at] else {}), str(now.actions[at]))]
        if state.fetch:
            whole = chunk_pass(self.place, tuple(self.policies[0]), True, False, "forward").top
            fetched = state.later | {"buckets": state.later["buckets"] + state.fetch}
            found.append((self._named(whole, 0, fetched), str(now.actions[0])))
        if state.ending:
            last = chunk_parts(self.place, (), True, False, "backward")[-1][0]
            found.append((self._named(last.top, 0, state.ending), str(now.actions[now.ends[0]])))
        if state.reductions:
            often = bool(state.room) and bool(now.began.any())
            found += [self._beside_reductions(state, again) for again in {False, often}]
        return max(found, key=lambda pair: sum(pair[0].values()))

    def _named(self, items: Counts, at: int, more: dict[str, int]) -> dict[str, int]:
        found = dict(zip(ITEMS, map(int, items), strict=True))
        return found | {"transfers": int(self.levels.transfers[at]) * self.stream} | more

    def _beside_reductions(self, state: ZeroMemory, again: bool) -> tuple[dict[str, int], str]:
        """At the most during the last backwards, in which full buckets are reduced one after the other, two at once.

        again: whether an earlier backward has left its last reductions under way.
        """
        done, sent = 0, list(accumulate(state.reductions))
        sizes = (*state.reductions[-2:], *state.reductions) if again else (0, 0, *state.reductions)
        best: dict[str, int] = {}
        when = ""
        for chunk in reversed(range(len(self.ends))):
            at = self.levels.ends[chunk]
            action = self.levels.actions[at]
            level = self.levels.held[at] @ self.kept
            first, last = self.ends[chunk]
            for part, name in chunk_parts(self.place, self.policies[chunk], first, last, _PASSES[action.kind]):
                after = done + state.gradients.get(name, 0)
                for items, ready in ((level + part.top, done), (level + part.end, after)):
                    launched = bisect_right(sent, ready)
                    flying = int(sum(sizes[launched : launched + 2]) * state.flying)
                    rooms = min(2, len(sent)) if again else min(2, len(sent), launched + (ready > 0))
                    found = self._named(items, at, {"buckets": flying + rooms * state.room})
                    if sum(found.values()) > sum(best.values()):
                        best, when = found, str(action)
                done, level = after, level + part.end
        return best, when
