"""Cutting chains of elementwise operations to what a CPU keeps in its caches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Large enough that starting the threads for each block costs little, even where other programs use the cores.
_ELEMENTS = 1 << 20


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of dimension 0 of several tensors: all at once on a GPU, on a CPU about a million elements of
    the first at a time."""
    first = tensors[0]
    rows = max(1, len(first))
    if first.device.type == "cpu":
        rows = max(1, rows * _ELEMENTS // max(1, first.numel()))
    return zip(*(t.split(rows) for t in tensors), strict=True)
