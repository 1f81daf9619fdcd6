"""How far a layout is from the reference, and how far rounding alone may take it. docs/proof.md derives the bounds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from megapt.parameters import Shard
from megapt.prove.trainer import FIRST, RESUMED, SAVE_AFTER, Piece, Report

UNIT = {"fp64": 2.0**-53, "fp32": 2.0**-24}
SPREAD = 8.0  # how many times a measured rounding error another order of sums may err

Key = tuple[str, str]
"""A quantity and the name of one of its values, e.g. ("gradient", "step 0: norm.weight")."""

Table = dict[Key, Tensor]
"""Global tensors in fp64."""


@lru_cache(maxsize=4096)
def _positions(shape: tuple[int, ...], shard: Shard) -> Tensor:
    """Where each element of a flattened local shard lies in the flattened global tensor; -1 for padding."""
    whole = torch.arange(math.prod(shape)).view(shape)[shard.slices()]
    local = torch.full(shard.shape, -1)
    shard.valid(local).copy_(whole)
    return local.flatten()


def located(piece: Piece) -> tuple[Tensor, Tensor]:
    """A piece's elements that are not padding, in fp64, and where they lie in the flattened global tensor."""
    positions = _positions(piece.shape, piece.shard)[piece.start : piece.start + piece.values.numel()]
    valid = positions >= 0
    return positions[valid], piece.values[valid].double()


def assemble(reports: Iterable[Report]) -> Table:
    """All ranks' pieces put together. AssertionError where an element of a tensor is on no rank."""
    table: Table = {}
    for report in reports:
        for piece in report.pieces:
            key = piece.quantity, piece.name
            whole = table.setdefault(key, torch.full(piece.shape, float("nan"), dtype=torch.float64))
            positions, values = located(piece)
            whole.view(-1)[positions] = values
        for key, number in report.numbers.items():
            table[key] = torch.tensor(number, dtype=torch.float64)
    for key, whole in table.items():
        assert not whole.isnan().any(), f"{' of '.join(key)} is nowhere, or not a number"
    return table


@dataclass(frozen=True)
class Worst:
    """The value of a quantity that comes nearest to its bound, or is furthest beyond it.

    error, bound: absolute; scale: the largest element of the tensor it is in; relative: the largest error of all the
    quantity's values to the largest element of them all.
    """

    name: str
    error: float
    bound: float
    scale: float
    relative: float = math.nan

    @property
    def ratio(self) -> float:
        return self.error / self.bound

    @property
    def inside(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Family:
    """The reference of all layouts that train the same model with the same optimizer, and its rounding errors.

    table: the reference in fp64; rounding: for each value, the largest error of the reference program in fp32, in
    units of fp32's unit roundoff: what one unit of relative rounding at every operation does to it.
    """

    table: Table
    rounding: dict[Key, float]

    @staticmethod
    def of(exact: Table, rounded: Sequence[Table]) -> Family:
        rounding = {}
        for key, value in exact.items():
            found = max(float((other[key] - value).abs().max()) for other in rounded)
            # Nothing is known better than its own last rounding.
            rounding[key] = max(found / UNIT["fp32"], float(value.abs().max()))
        return Family(exact, rounding)

    def bound(self, key: Key, precision: str) -> float:
        """The largest error of one run in a precision, against the reference in fp64."""
        runs = math.sqrt(2.0) if precision == "fp64" else 1.0  # the reference then rounds as coarsely
        return runs * SPREAD * UNIT[precision] * self.rounding[key]


def known_as(key: Key) -> Key:
    """The value of the reference that a value is held against."""
    quantity = key[0].removeprefix(RESUMED)
    return ("weight" if quantity == "copy" else quantity), key[1]


def measure(reports: Sequence[Report], family: Family, precisions: Mapping[str, str]) -> dict[str, Worst]:
    """The worst value of every quantity. `precisions`: in which precision each is known, e.g. {"loss": "fp32"}.

    Every piece of every rank is compared, so that copies that differ show, and every element must be on some rank: an
    element that is missing makes the error infinite.
    """
    errors: dict[Key, float] = defaultdict(float)
    found: dict[Key, Tensor] = {}
    for report in reports:
        for piece in report.pieces:
            key = piece.quantity, piece.name
            theirs = family.table[known_as(key)]
            positions, values = located(piece)
            seen = found.setdefault(key, torch.zeros(theirs.numel(), dtype=torch.bool))
            seen[positions] = True
            if len(positions):
                errors[key] = _larger(errors[key], float((values - theirs.view(-1)[positions]).abs().max()))
        for key, number in report.numbers.items():
            errors[key] = _larger(errors[key], abs(number - float(family.table[known_as(key)])))
    for key, seen in found.items():
        if not bool(seen.all()):
            errors[key] = math.inf
    _expect_all(errors, family)
    all_values: dict[str, list[Worst]] = defaultdict(list)
    for key, error in errors.items():
        reference = known_as(key)
        bound = family.bound(reference, precisions[precision_class(key)])
        all_values[key[0]].append(Worst(key[1], error, bound, float(family.table[reference].abs().max())))
    worst = {}
    for quantity, values_of_it in all_values.items():
        relative = max(v.error for v in values_of_it) / max(v.scale for v in values_of_it)
        worst[quantity] = replace(max(values_of_it, key=lambda value: value.ratio), relative=relative)
    return worst


def precision_class(key: Key) -> str:
    """What may be known less well than the precision that a layout computes in: see `precisions_of`."""
    quantity = key[0]
    if quantity.startswith(RESUMED):
        return "resumed"
    if quantity.startswith(FIRST):
        return "first"
    return "norm" if quantity == "norm" else "updated"


def precisions_of(precision: str, backend: str, resumed_backend: str | None) -> dict[str, str]:
    """Which precision each class of values has.

    DeepSpeed keeps norms, masters and moments in fp32 where the weights are fp64: only what comes before its first
    update is exact to fp64. A checkpoint that it wrote holds fp32 numbers.
    """
    coarse = "fp32" if backend == "deepspeed" else precision
    resumed = "fp32" if "deepspeed" in (backend, resumed_backend) else precision
    return {"first": precision, "norm": coarse, "updated": coarse, "resumed": resumed}


def _larger(a: float, b: float) -> float:
    return math.inf if math.isnan(b) else max(a, b)


def _expect_all(errors: dict[Key, float], family: Family) -> None:
    """A value that the reference has and no rank reported counts as infinitely wrong."""
    resumed = any(quantity.startswith(RESUMED) for quantity, _ in errors)
    for quantity, name in family.table:
        if quantity == "copy":
            continue  # in stage 3 no rank has whole weights
        errors.setdefault((quantity, name), math.inf)
        if resumed and name.startswith(f"step {SAVE_AFTER}") == name.startswith("step"):
            errors.setdefault((RESUMED + quantity, name), math.inf)
