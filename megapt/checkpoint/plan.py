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

_SLACK = 1.05  # a writer may take this much more than its fair share to save the sending


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


def plan(pieces: Sequence[Sequence[Piece]]) -> list[Item]:
    """Assign every tensor that the dp ranks hold pieces of to a writer, and find its sources.

    A tensor goes to the rank that holds most of it unless that rank would write more than its fair share of
    bytes; then to the rank with the least to write. Raises UserError if elements of a tensor are nowhere.
    """
    held: dict[tuple[str, str], list[tuple[int, Piece]]] = {}
    for rank, own in enumerate(pieces):
        for piece in own:
            held.setdefault((piece.name, piece.kind), []).append((rank, piece))
    sizes = {key: _nbytes(found[0][1]) for key, found in held.items()}
    fair = sum(sizes.values()) / len(pieces) * _SLACK
    load = [0] * len(pieces)
    writers: dict[tuple[str, str], int] = {}
    for key in sorted(held, key=lambda k: -sizes[k]):  # large ones first: the small ones level the loads
        have = [0] * len(pieces)
        for rank, piece in held[key]:
            have[rank] += piece.stop - piece.start
        writer = min(range(len(pieces)), key=lambda r: (-have[r], load[r]))
        if load[writer] + sizes[key] > fair:
            writer = min(range(len(pieces)), key=lambda r: (load[r], -have[r]))
        load[writer] += sizes[key]
        writers[key] = writer
    return [_item(found, writers[key]) for key, found in held.items()]


def _nbytes(piece: Piece) -> int:
    return _rectangle(piece).slot.nbytes


def _rectangle(piece: Piece) -> Rectangle:
    valid = piece.shard.slices()
    offset, extent = tuple(s.start for s in valid), tuple(s.stop - s.start for s in valid)
    return Rectangle(piece.name, piece.kind, piece.dtype, piece.shape, offset, extent)


def _item(found: list[tuple[int, Piece]], writer: int) -> Item:
    first = found[0][1]
    for rank, piece in found:
        assert (piece.shard, piece.dtype) == (first.shard, first.dtype), f"dp rank {rank}: {piece.name}"
    sources = []
    at, end = 0, _end(first.shard)
    while at < end:
        here = [(rank, piece.stop) for rank, piece in found if piece.start <= at < piece.stop]
        if not here:
            raise UserError(f"no data-parallel rank holds element {at} of {first.kind} of {first.name}")
        rank, stop = max(here, key=lambda source: (source[0] == writer, source[1], -source[0]))
        sources.append((rank, at, min(stop, end)))
        at = stop
    return Item(_rectangle(first), first.shard, writer, tuple(sources))


def _end(shard: Shard) -> int:
    """One past the last element of the flattened local shard that is not padding."""
    end, stride = 1, 1
    for d in reversed(range(len(shard.shape))):
        extent = shard.length if d == shard.dim else shard.shape[d]
        end += (extent - 1) * stride
        stride *= shard.shape[d]
    return end if prod(shard.shape) else 0
