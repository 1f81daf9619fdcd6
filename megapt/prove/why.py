"""Which operation of a layout is the first to differ from another layout's, and what is wrong with it.

One training step runs in both. Operations are held against each other in the order in which they run: forward, loss,
backward, each parameter's gradient, what tensor and pipeline ranks owe it, its sum over dp, the norm, the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megapt.config import Config
from megapt.model.table import parameter_table
from megapt.prove import causes
from megapt.prove.cases import Case
from megapt.prove.compare import Family, located
from megapt.prove.layout import Layout
from megapt.prove.probe import Trace, trace
from megapt.prove.ranks import run_ranks
from megapt.prove.view import Place, View

MICROS = (1, 2, 4)  # cuts of the global batch in which rounding errors are measured


Start = Callable[..., list[Any]]
"""Runs a function on ranks, as `run_ranks` does."""


@dataclass(frozen=True)
class Check:
    """One operation held against the reference.

    where: ranks that are beyond the bound, as places pp, dp, tp; empty where the value is of all ranks together.
    """

    phase: str
    operation: str
    error: float
    bound: float
    where: tuple[Place, ...] = ()

    @property
    def inside(self) -> bool:
        return self.error <= self.bound

    @property
    def title(self) -> str:
        """What is compared, in words."""
        name = self.operation
        return {
            "forward": name,
            "backward": f"gradient of {name}",
            "local": f"gradient of {name} as computed",
            "finalized": f"finalize: gradient of {name}",
            "applied": f"reduction over dp: gradient of {name}",
            "norm": "norm",
            "weight": f"update: {name}",
            "copy": f"weights in use: {name}",
        }[self.phase]


@dataclass(frozen=True)
class Explanation:
    """first: the first operation beyond its bound, None if there is none; checks: all made, in order."""

    a: Layout
    b: Layout
    checks: list[Check]
    first: Check | None
    causes: list[str]

    def lines(self) -> Iterator[str]:
        """For people."""
        agreed = [check for check in self.checks if check.inside]
        nearest = max((c.error / c.bound for c in agreed if c.bound), default=0.0)
        if self.first is None:
            count = len(agreed)
            yield f"{self.b} computes what {self.a} does: {count} operations, all within {nearest:.2f} of their bound"
            return
        first = self.first
        yield f"{first.title}: the first operation of {self.b} that differs from {self.a}"
        yield f"  off by {first.error:.2e}; rounding explains {first.bound:.2e}"
        if first.where:
            yield f"  on {_places(first.where)}"
        for cause in self.causes:
            yield f"  cause: {first.title}: {cause}"
        if not self.causes:
            yield "  cause: none of those that can be told from the numbers alone"
        before = self.checks.index(first)
        after = sum(not check.inside for check in self.checks) - 1
        yield f"  {before} operations before it agree; {after} after it differ as well"


def explain(
    case_a: Case, case_b: Case, precision: str, say: Callable[[str], None], start: Start = run_ranks
) -> Explanation:
    """Run one step of both layouts, which must train the same model, and compare. start: how ranks are started."""
    depth = max(case_a.layers, case_b.layers)
    case_a, case_b = replace(case_a, depth=depth), replace(case_b, depth=depth)
    config_a, config_b = case_a.runnable(precision), case_b.runnable(precision)
    one = Case(case_a.shape, Layout(optimizer=case_a.layout.optimizer), depth)
    config = one.config("fp64")
    exact, *rounded = (_view([t], config) for t in start(1, _traces, [config, *_cuts(one.config("fp32"))])[0])
    family = Family.of(exact.table(), [view.table() for view in rounded])
    say(f"reference: {one.shape.name}, {depth} layers, one process")
    a = _view(start(case_a.layout.world, trace, config_a), config_a)
    say(f"ran {case_a}")
    b = _view(start(case_b.layout.world, trace, config_b), config_b)
    say(f"ran {case_b}")
    coarse = "fp32" if "deepspeed" in (config_a.zero.backend, config_b.zero.backend) else precision
    checks = list(_checks(a, b, family, precision, coarse, exact))
    first = next((check for check in checks if not check.inside), None)
    found = [] if first is None else causes.find(first.phase, first.operation, a, b, config_b)
    return Explanation(case_a.layout, case_b.layout, checks, first, found)


def _traces(rank: int, world: int, configs: list[Config]) -> list[Trace]:
    return [trace(rank, world, config) for config in configs]


def _cuts(config: Config) -> list[Config]:
    return [config.model_copy(update={"batch": config.batch.model_copy(update={"micro": micro})}) for micro in MICROS]


def _view(traces: list[Trace], config: Config) -> View:
    return View(traces, parameter_table(config.model), config.optimizer.betas)


def _checks(a: View, b: View, family: Family, precision: str, coarse: str, order: View) -> Iterator[Check]:
    """Everything, in the order in which a step does it. order: a view whose operations are in that order."""
    reference = a.table()

    def bound(phase: str, name: str, precision: str) -> float:
        return family.bound((phase, name), precision)

    for backward in (False, True):
        phase = "backward" if backward else "forward"
        for operation in (o for o, back in order.activations if back is backward):
            yield _activation(b, phase, operation, reference[phase, operation], bound(phase, operation, precision))
    names = list(b.owned())
    for name in names:
        off = _error(b.local_sum(name), reference["local", name])
        yield Check("local", name, off, bound("local", name, precision))
    for name in names:
        copies = b.copies("finalized", name)
        errors = {place: _error(copy, reference["finalized", name], partly=True) for place, copy in copies.items()}
        yield _worst("finalized", name, errors, bound("finalized", name, precision))
    for name in names:
        applied = b.applied(name)
        if applied is not None:
            off = _error(applied, reference["applied", name])
            yield Check("applied", name, off, bound("applied", name, coarse))
    yield Check("norm", "", abs(b.norm - a.norm), bound("norm", "", coarse))
    for name in names:
        off = _error(b.state("weight", name), reference["weight", name])
        yield Check("weight", name, off, bound("weight", name, coarse))
    for name in names:
        errors = {}
        for place, piece in b.pieces["copy", name]:
            positions, values = located(piece)
            errors[place] = _error(values, reference["weight", name].view(-1)[positions])
        yield _worst("copy", name, errors, bound("weight", name, coarse))


def _activation(b: View, phase: str, operation: str, reference: Tensor, bound: float) -> Check:
    pieces = b.activations[operation, phase == "backward"]
    if operation == "loss" and phase == "forward":
        return Check(phase, operation, _error(b.activation(operation, False), reference), bound)
    errors: dict[Place, float] = {}
    for place, seen in pieces:
        theirs = reference if operation == "loss" else reference[slice(*seen.rows), slice(*seen.columns)]
        errors[place] = max(errors.get(place, 0.0), _error(seen.values.double(), theirs))
    if not errors:
        return Check(phase, operation, math.inf, bound)
    return _worst(phase, operation, errors, bound)


def _worst(phase: str, operation: str, errors: dict[Place, float], bound: float) -> Check:
    beyond = tuple(sorted(place for place, error in errors.items() if not error <= bound))
    everywhere = len(beyond) == len(errors)
    return Check(phase, operation, max(errors.values(), default=0.0), bound, () if everywhere else beyond)


def _error(found: Tensor, reference: Tensor, partly: bool = False) -> float:
    """The largest difference; infinite where something is missing. partly: of what is there."""
    off = (found - reference).abs()
    if partly:
        off = off[~found.isnan()]
    if off.numel() == 0:
        return 0.0
    return float(torch.nan_to_num(off, nan=math.inf).max())


def _places(places: tuple[Place, ...]) -> str:
    return "; ".join(f"pp {pp}, dp {dp}, tp {tp}" for pp, dp, tp in places)
