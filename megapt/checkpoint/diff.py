"""What two checkpoints differ in, tensor by tensor, whatever layouts wrote them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapt.checkpoint.loading import Reader, open_reader

_BLOCK = 1 << 22  # elements of each that are in memory at a time, about


@dataclass(frozen=True)
class Difference:
    """A tensor that both have and that is not the same bit for bit.

    elements: how many differ, of `of`; largest: the greatest absolute difference (inf where one is NaN and the other is
    not); relative: that, divided by the greatest magnitude in either tensor.
    """

    name: str
    kind: str
    elements: int
    of: int
    largest: float
    relative: float


@dataclass
class Comparison:
    """What of two checkpoints is not the same. missing: only the first has it; surplus: only the second; kinds of which
    one of them has nothing at all stand apart; changed: of another shape or dtype; meta: dotted key and both values,
    None for none."""

    missing_kinds: list[str] = field(default_factory=list)
    surplus_kinds: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    tensors: list[Difference] = field(default_factory=list)
    meta: list[tuple[str, Any, Any]] = field(default_factory=list)
    equal: int = 0

    def same(self, ignore_meta: bool = False) -> bool:
        kinds = self.missing_kinds or self.surplus_kinds
        names = self.missing or self.surplus
        return not (kinds or names or self.changed or self.tensors or self.meta and not ignore_meta)


def diff(
    first: str | Path, second: str | Path, progress: Callable[[int], None] = lambda count: None
) -> Comparison:
    """Compare tensors bit for bit and meta key by key; `progress` hears of bytes of the first. Differing tensors come
    with the largest relative difference first. Blocks of a few million elements are in memory at a time. UserError
    where either is damaged."""
    one, two = open_reader(first), open_reader(second)
    kinds = [[(name, kind) for name, kind, _ in reader.index.entries()] for reader in (one, two)]
    found = Comparison()
    found.missing_kinds, found.missing = _only(kinds[0], kinds[1])
    found.surplus_kinds, found.surplus = _only(kinds[1], kinds[0])
    both = set(kinds[1])
    for name, kind in kinds[0]:
        if (name, kind) in both:
            _compare(one, two, name, kind, found)
        progress(one.index.nbytes(name, kind))
    found.tensors.sort(key=lambda d: (-d.relative, d.name, d.kind))
    left, right = (dict(_flat({"step": r.index.step, "meta": r.index.meta})) for r in (one, two))
    for key in {**left, **right}:
        if left.get(key, _NOTHING) != right.get(key, _NOTHING):
            found.meta.append((key, left.get(key), right.get(key)))
    return found


_NOTHING = object()


def _only(these: list[tuple[str, str]], those: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Kinds and tensors that are among these alone."""
    held, known = set(those), {kind for _, kind in those}
    kinds = list(dict.fromkeys(kind for _, kind in these if kind not in known))
    return kinds, [f"{kind} of {name}" for name, kind in these if (name, kind) not in held and kind in known]


def _compare(one: Reader, two: Reader, name: str, kind: str, found: Comparison) -> None:
    shapes = [list(reader.index.tensors[name].shape) for reader in (one, two)]
    dtypes = [reader.index.tensors[name].kinds[kind].dtype for reader in (one, two)]
    if shapes[0] != shapes[1]:
        found.changed.append(f"{kind} of {name}: shape {shapes[0]}, {shapes[1]}")
        return
    if dtypes[0] != dtypes[1]:
        found.changed.append(f"{kind} of {name}: {dtypes[0]}, {dtypes[1]}")
    elements, largest, magnitude = 0, 0.0, 0.0
    for offset, shape in _blocks(one.index.tensors[name].shape):
        pair = [torch.empty(shape, dtype=reader.dtype(name, kind)) for reader in (one, two)]
        for reader, out in zip((one, two), pair, strict=True):
            reader.fill(name, kind, out, offset)
        differ = _differ(*pair)
        elements += int(differ.sum())
        a, b = (t.double() for t in pair)
        magnitude = max([magnitude, *(float(t.abs().nan_to_num(0.0).max()) for t in (a, b))])
        if differ.any():
            largest = max(largest, float((a[differ] - b[differ]).abs().nan_to_num(math.inf).max()))
    if elements:
        relative = largest / magnitude if magnitude and math.isfinite(largest) else largest
        found.tensors.append(Difference(name, kind, elements, math.prod(shapes[0]), largest, relative))
    else:
        found.equal += 1


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Which elements differ: in their bits, or in their values where the dtypes do."""
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.view(bits) != b.view(bits)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Offsets and shapes of parts of a tensor, of at most _BLOCK elements: whole rows of the last dimensions."""
    steps: list[int] = []
    room = _BLOCK
    for extent in reversed(shape):
        steps.insert(0, max(1, min(extent, room)))
        room //= max(extent, 1)
    for offset in product(*(range(0, extent, step) for extent, step in zip(shape, steps, strict=True))):
        block = [min(step, extent - at) for at, step, extent in zip(offset, steps, shape, strict=True)]
        yield list(offset), block


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
