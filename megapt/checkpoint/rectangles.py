"""A range of a flattened tensor as rectangles of the tensor: what a fragment of a shard is to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from torch import Tensor

from megapt.parameters import Shard

Numbers = tuple[int, ...]


class Rectangle(NamedTuple):
    """offset and shape per dimension; position: of its first element in the flattened tensor, where its elements are
    neighbours."""

    offset: Numbers
    shape: Numbers
    position: int


def rectangles(shape: Numbers, start: int, stop: int) -> Iterator[Rectangle]:
    """Elements [start, stop) of a flattened tensor as at most 2 x dimensions - 1 rectangles, in order."""
    if start >= stop:
        return
    if not shape:
        yield Rectangle((), (), 0)
        return
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:  # within one row
        yield from _of_row(shape, last, start, stop)
        return
    yield from _of_row(shape, first - 1, start, first * inner)
    if first < last:
        rest = tuple(shape[1:])
        yield Rectangle((first, *(0 for _ in rest)), (last - first, *rest), first * inner)
    yield from _of_row(shape, last, last * inner, stop)


def _of_row(shape: Numbers, row: int, start: int, stop: int) -> Iterator[Rectangle]:
    base = row * prod(shape[1:])
    for part in rectangles(shape[1:], start - base, stop - base):
        yield Rectangle((row, *part.offset), (1, *part.shape), base + part.position)


def targets(view: Tensor, shard: Shard, start: int) -> list[tuple[Tensor, Numbers]]:
    """What of a checkpoint belongs into `view`, elements [start, start + n) of a flattened local shard: parts of it as
    rectangles (views), each with its offset in the global tensor. Padding is in none, and becomes zero here."""
    found = []
    for offset, shape, position in rectangles(tuple(shard.shape), start, start + view.numel()):
        size = prod(shape)
        part = view[position - start : position - start + size].view(shape)
        if shape and offset[shard.dim] + shape[shard.dim] > shard.length:
            part.zero_()
            part = part.narrow(shard.dim, 0, max(0, shard.length - offset[shard.dim]))
        if part.numel():
            moved = tuple(at + shard.start if d == shard.dim else at for d, at in enumerate(offset))
            found.append((part, moved))
    return found


def valid_end(shard: Shard) -> int:
    """One past the last element of the flattened local shard that is not padding."""
    last = [n - 1 for n in shard.shape]
    last[shard.dim] = shard.length - 1
    if min(last) < 0:
        return 0
    return 1 + sum(at * prod(shard.shape[d + 1 :]) for d, at in enumerate(last))
