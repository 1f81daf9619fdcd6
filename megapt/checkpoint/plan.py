"""Who writes what: the pieces that the ranks of one data-parallel group hold, assigned to writers.

Pure arithmetic on descriptions that all ranks of the group have, so that all come to the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megapt.checkpoint.written import Rectangle
from megapt.errors import UserError
from megapt.parameters import Shard

# Pieces of at least this many bytes are written by the ranks that hold them. Smaller ones are sent to one rank: an
# index of every crumb that hundreds of data-parallel ranks hold would outgrow what a reader likes to parse.
PIECE_BYTES = 16 << 20
_SLACK = 1.05  # a writer of what is sent may take this much more than its fair share, if it holds most of it


@dataclass(frozen=True)
class Piece:
    """What a rank tells its group: elements [start, stop) of a tensor's flattened local shard are here."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    start: int
    stop: int


@dataclass(frozen=True)
class Item:
    """A rectangle to be written: by which dp rank, from which (dp rank, start, stop) of the flat shard."""

    rectangle: Rectangle
    shard: Shard
    writer: int
    sources: tuple[tuple[int, int, int], ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.rectangle.name, self.rectangle.kind


Sources = list[tuple[int, int, int]]


def plan(pieces: Sequence[Sequence[Piece]]) -> list[Item]:
    """Assign every tensor that the dp ranks hold pieces of to writers, and find its sources.

    A rank writes what it holds whole (of several that do, the one with the least to write), and its piece of a tensor
    that lies in few large pieces. Any other tensor goes to the rank that holds most of it, unless that rank
    would write more than its fair share of bytes; then to the one with the least to write. Raises UserError if elements
    of a tensor are nowhere. What has to be sent comes first, so that no rank waits for another one's copies.
    """
    held: dict[tuple[str, str], list[tuple[int, Piece]]] = {}
    for rank, own in enumerate(pieces):
        for piece in own:
            held.setdefault((piece.name, piece.kind), []).append((rank, piece))
    load = [0] * len(pieces)
    fair = sum(_nbytes(found) for found in held.values()) / len(pieces) * _SLACK
    # Large ones first: the small ones level the loads.
    keys = sorted(held, key=lambda key: -_nbytes(held[key]))
    items: dict[tuple[str, str], list[Item]] = {}
    for key in keys:
        items[key] = _in_place(held[key], load)
    for key in keys:
        if not items[key]:
            items[key] = [_gathered(held[key], load, fair)]
    found = [item for key in held for item in items[key]]
    return sorted(found, key=lambda item: len(item.sources) == 1)


def _nbytes(found: list[tuple[int, Piece]]) -> int:
    return _whole(found[0][1]).slot.nbytes


def _in_place(found: list[tuple[int, Piece]], load: list[int]) -> list[Item]:
    """A tensor written where it is; nothing if that would be too many small pieces. `load` grows."""
    first = found[0][1]
    have = _have(found, len(load))
    sources = _sources(found, min(range(len(load)), key=lambda r: (-have[r], load[r])))
    if len(sources) == 1:
        items = [Item(_whole(first), first.shard, sources[0][0], tuple(sources))]
    elif _nbytes(found) >= PIECE_BYTES * len(sources) and _is_prefix(first.shard) and len(first.shape) <= 2:
        items = [
            Item(_part(first, begin, end), first.shard, rank, ((rank, begin, end),))
            for rank, start, stop in sources
            for begin, end in _rows(start, stop, prod(first.shard.shape[1:]))
        ]
    else:
        return []
    for item in items:
        load[item.writer] += item.rectangle.slot.nbytes
    return items


def _gathered(found: list[tuple[int, Piece]], load: list[int], fair: float) -> Item:
    """A tensor that one rank gets from all that hold pieces of it. `load` grows."""
    first, size = found[0][1], _nbytes(found)
    have = _have(found, len(load))
    writer = min(range(len(load)), key=lambda r: (-have[r], load[r]))
    if load[writer] + size > fair:
        writer = min(range(len(load)), key=lambda r: (load[r], -have[r]))
    load[writer] += size
    return Item(_whole(first), first.shard, writer, tuple(_sources(found, writer)))


def _have(found: list[tuple[int, Piece]], ranks: int) -> list[int]:
    """Elements of a tensor that each rank holds."""
    first, have = found[0][1], [0] * ranks
    for rank, piece in found:
        assert (piece.shard, piece.dtype) == (first.shard, first.dtype), f"dp rank {rank}: {piece.name}"
        have[rank] += piece.stop - piece.start
    return have


def _sources(found: list[tuple[int, Piece]], writer: int) -> Sources:
    """Pieces that make up the shard, the writer's own wherever it has them."""
    first = found[0][1]
    sources = []
    at, end = 0, _end(first.shard)
    while at < end:
        here = [(rank, piece.stop) for rank, piece in found if piece.start <= at < piece.stop]
        if not here:
            raise UserError(f"no data-parallel rank holds element {at} of {first.kind} of {first.name}")
        rank, stop = max(here, key=lambda source: (source[0] == writer, source[1], -source[0]))
        sources.append((rank, at, min(stop, end)))
        at = stop
    return sources


def _whole(piece: Piece) -> Rectangle:
    valid = piece.shard.slices()
    offset, extent = tuple(s.start for s in valid), tuple(s.stop - s.start for s in valid)
    key = f"{piece.kind}/{piece.name}"
    return Rectangle(piece.name, piece.kind, piece.dtype, piece.shape, offset, extent, key)


def _part(piece: Piece, begin: int, end: int) -> Rectangle:
    """Elements [begin, end) of the flat shard, which are whole rows or lie within one."""
    shape, shard = piece.shard.shape, piece.shard
    inner = prod(shape[1:])
    row, column = divmod(begin, inner)
    local = (row, column)[: len(shape)]
    extent = (1, end - begin) if column or end - begin < inner else ((end - begin) // inner, inner)
    offset = tuple(at + (shard.start if d == shard.dim else 0) for d, at in enumerate(local))
    key = f"{piece.kind}/{piece.name}/{begin}"
    return Rectangle(piece.name, piece.kind, piece.dtype, piece.shape, offset, extent[: len(shape)], key)


def _rows(start: int, stop: int, inner: int) -> list[tuple[int, int]]:
    """[start, stop) cut into the end of a row, whole rows and the beginning of a row, as far as there are such."""
    first, last = min(-(-start // inner) * inner, stop), max(stop // inner * inner, start)
    cuts = [start, first, last, stop] if first <= last else [start, stop]
    return [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def _is_prefix(shard: Shard) -> bool:
    """Whether what is not padding comes first in flat order."""
    return shard.dim == 0 or shard.length == shard.shape[shard.dim]


def _end(shard: Shard) -> int:
    """One past the last element of the flattened local shard that is not padding."""
    end, stride = 1, 1
    for d in reversed(range(len(shard.shape))):
        extent = shard.length if d == shard.dim else shard.shape[d]
        end += (extent - 1) * stride
        stride *= shard.shape[d]
    return end if prod(shard.shape) else 0
