"""Which layouts are run: the axes, what of their product is worth running, and a small set that covers all pairs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice, product
from typing import Any

from megapt.config import Config
from megapt.errors import UserError
from megapt.prove.layout import Layout, tightened
from megapt.prove.small import LAYERS, Shape

Axes = dict[str, tuple[Any, ...]]

# Every axis of the matrix and its values: a new schedule, policy or backend is proven from the day it stands here. An
# optimizer of no name is the configured one.
AXES: Axes = {
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "dp": (1, 2, 4),
    "schedule": ("1f1b", "interleaved", "gpipe", "zb-h1", "zb-v"),
    "micro": (1, 2, 4),
    "sequence": (True, False),
    "recompute": ("none", "selective", "full", "budget"),
    "zero": ("native-0", "native-1", "native-2", "deepspeed-0", "deepspeed-1", "deepspeed-2", "deepspeed-3"),
    "stages": ("even", "uneven"),
    "vocabulary": (1, 32),
    "optimizer": ("", "muon"),
    "compile": (False, True),
    "kernels": ("auto", "reference", "library"),
}
# Left to the full matrix: compiling takes longer than all else of the quick one.
SLOW = {"compile": (False,)}
# The axes of which one value forbids others: what is legal of their product is worked out once.
STRUCTURE = ("tp", "pp", "dp", "schedule", "micro", "sequence", "zero", "stages")
# Of the full matrix these go through their whole product; of the others every pair of values occurs.
PRODUCT = ("tp", "pp", "dp", "schedule", "zero", "sequence")
# Those that a layer's inside can tell apart: of brief shapes every value of these occurs, and no others need to. One of
# their layouts cuts tokens and lets ranks share key/value heads, which pairs of values do not say.
INSIDE = ("tp", "sequence", "recompute", "kernels")
SHARED = Layout(tp=4, recompute="selective")

_START = 8  # starting a layout costs about as much as so many ranks
_DRAWS = 100  # cases of which the one that covers most is taken

Pair = tuple[tuple[str, Any], tuple[str, Any]]


@dataclass(frozen=True)
class Case:
    """A small model in a layout. depth: its layers, where they are not those that the layout wants."""

    shape: Shape
    layout: Layout
    depth: int = 0

    @property
    def layers(self) -> int:
        return self.depth or self.layout.layers

    def config(self, precision: str) -> Config:
        """UserError where the layout is not legal for the shape."""
        return self.layout.config(self.shape, precision, self.layers)

    def runnable(self, precision: str) -> Config:
        """The same, with what depends on the model's memory worked out."""
        return tightened(self.config(precision), self.layout.dp)

    def __str__(self) -> str:
        return f"{self.shape.name} {self.layout}"

    def __hash__(self) -> int:
        return hash((self.shape.name, self.layout, self.depth))

    def values(self) -> dict[str, Any]:
        """Its value on every axis of the matrix."""
        return {"shape": self.shape.name} | {axis: getattr(self.layout, axis) for axis in AXES}

    def pairs(self) -> set[Pair]:
        return set(combinations(self.values().items(), 2))


def worthwhile(layout: Layout) -> bool:
    """Whether no value of the layout is without effect: another layout is then the same computation."""
    return not (
        (layout.pp == 1 and (layout.schedule != "1f1b" or layout.stages != "even"))
        or (layout.tp == 1 and not layout.sequence)
        or (layout.stages == "uneven" and not 1 < layout.virtual_stages < layout.layers)
        or (layout.compile and layout.kernels in ("reference", "cuda"))
    )


@lru_cache(maxsize=1 << 20)
def _legal(case: Case, precision: str) -> bool:
    if not worthwhile(case.layout):
        return False
    try:
        case.config(precision)
    except UserError:
        return False
    return True


class Matrix:
    """The layouts of some shapes on at most `ranks` ranks. Deterministic: the same cases every time.

    compiler: whether torch can compile here. cuda: whether our CUDA kernels run here, as under the emulator they do.
    """

    def __init__(
        self, shapes: Sequence[Shape], ranks: int, precision: str, compiler: bool = True, cuda: bool = False
    ) -> None:
        self.precision, self.ranks = precision, ranks
        self.shapes = {shape.name: shape for shape in shapes}
        self.axes: Axes = {"shape": tuple(self.shapes), **AXES}
        if any(shape.tree["optimizer"]["kind"] == "muon" for shape in shapes):
            self.axes["optimizer"] = ("", "adamw")
        if cuda:
            self.axes["kernels"] += ("cuda",)
        self.fast: Axes = self.axes | SLOW
        self.axes = self.axes if compiler else self.fast

    def legal(self, case: Case) -> bool:
        """Whether the case is one of the matrix: for brief shapes only if it is held against the one reference that
        they have."""
        if case.shape.brief and (case.layout.optimizer or case.layers > LAYERS):
            return False
        return case.layout.world <= self.ranks and _legal(case, self.precision)

    def wants(self, pair: Pair) -> bool:
        """Whether some case must have both values."""
        values = dict(pair)
        shape = self.shapes.get(values.get("shape", ""))
        return shape is None or not shape.brief or any(axis in INSIDE for axis in values)

    def quick(self) -> list[Case]:
        """A covering array: every pair of values that is wanted and that any legal layout has occurs in some case."""
        return self._cover(self._shared(), self.fast)

    def full(self) -> list[Case]:
        """The legal part of the product of the PRODUCT axes for shapes that are not brief, and every pair of values."""
        chooser = random.Random(0)
        chosen = self._shared()
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for values in self._structures():
            groups.setdefault(tuple(values[axis] for axis in PRODUCT), []).append(values)
        for shape, group in product((s.name for s in self.shapes.values() if not s.brief), groups.values()):
            # The other axes take values at random, so that the product meets all of them.
            chosen += islice(self._draws(group, {"shape": shape}, self.fast, chooser), 1)
        return self._cover(chosen, self.axes)

    def _shared(self) -> list[Case]:
        cases = (Case(shape, SHARED) for shape in self.shapes.values() if shape.brief)
        return [case for case in cases if self.legal(case)]

    def _structures(self) -> list[dict[str, Any]]:
        """Values of the STRUCTURE axes with which some layout is legal."""
        shape = next(iter(self.shapes))
        every = (dict(zip(STRUCTURE, values, strict=True)) for values in product(*(AXES[axis] for axis in STRUCTURE)))
        return [values for values in every if self.legal(self._case({"shape": shape} | values))]

    def _case(self, values: dict[str, Any]) -> Case:
        layout = Layout(**{axis: value for axis, value in values.items() if axis != "shape"})
        return Case(self.shapes[values["shape"]], layout)

    def _cover(self, chosen: list[Case], axes: Axes) -> list[Case]:
        """Add cases until every pair of values occurs that a legal case can have; the greedy way of AETG."""
        chooser = random.Random(3)  # of a few numbers the one that leads to the fewest ranks
        structures = self._structures()
        pairs = (((a, x), (b, y)) for a, b in combinations(axes, 2) for x in axes[a] for y in axes[b])
        covered: set[Pair] = set().union(*(case.pairs() for case in chosen))
        missing = dict.fromkeys(pair for pair in pairs if pair not in covered and self.wants(pair))
        for pair in list(missing):
            if pair not in missing:
                continue
            best: Case | None = None
            gain = 0.0
            for case in islice(self._draws(structures, dict(pair), axes, chooser), _DRAWS):
                new = sum(p in missing for p in case.pairs()) / (_START + case.layout.world)
                if new > gain:
                    best, gain = case, new
            if best is not None:
                chosen.append(best)
                for found in best.pairs():
                    missing.pop(found, None)
        return chosen

    def _draws(
        self, structures: list[dict[str, Any]], fixed: dict[str, Any], axes: Axes, chooser: random.Random
    ) -> Iterator[Case]:
        """Legal cases with some values given and the others at random."""
        fitting = [s for s in structures if all(s.get(axis, value) == value for axis, value in fixed.items())]
        for _ in range(4 * _DRAWS if fitting else 0):
            others = {axis: chooser.choice(values) for axis, values in axes.items() if axis not in STRUCTURE}
            case = self._case(others | fixed | chooser.choice(fitting))
            if self.legal(case):
                yield case


def coverage(cases: Iterable[Case], axes: dict[str, tuple[Any, ...]]) -> tuple[dict[str, list[Any]], int]:
    """Values of each axis that occur, and how many pairs of values of different axes do."""
    listed = list(cases)
    values = {axis: sorted({case.values()[axis] for case in listed}, key=str) for axis in axes}
    return values, len(set().union(*(case.pairs() for case in listed)))
