"""Runs a matrix of layouts and holds each against one process."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from megapt.errors import UserError
from megapt.prove.cases import Case
from megapt.prove.compare import Family, Worst, assemble, measure, precisions_of
from megapt.prove.layout import Layout
from megapt.prove.ranks import Ranks
from megapt.prove.small import SAMPLES
from megapt.prove.trainer import Job, Report, plain, reference, run

RANK_BYTES = 400 << 20  # memory of a rank with torch and DeepSpeed loaded, on Linux
RESTART_AFTER = 24  # layouts after which ranks start anew: of each, threads stay that wake 100 times a second
MICROS = [1, 2, 4, SAMPLES]  # cuts of the global batch in which rounding errors are measured

FamilyKey = tuple[str, int, str]


def family_of(case: Case) -> FamilyKey:
    """What must be equal for two layouts to compute the same."""
    return case.shape.name, case.layers, case.layout.optimizer


def one_process(case: Case) -> Case:
    """The layout that a case is held against."""
    return Case(case.shape, Layout(optimizer=case.layout.optimizer), case.layers)


@dataclass(frozen=True)
class Planned:
    """A case and the one whose checkpoint it resumes from; None for that of the reference."""

    case: Case
    resumes: Case | None


@dataclass
class Outcome:
    """What a layout came to. error: why it did not run to its end."""

    planned: Planned
    seconds: float
    worst: dict[str, Worst] = field(default_factory=dict)
    error: str | None = None

    @property
    def case(self) -> Case:
        return self.planned.case

    @property
    def passed(self) -> bool:
        return self.error is None and all(worst.inside for worst in self.worst.values())

    @property
    def ratio(self) -> float:
        """The largest error in units of its bound."""
        return max(worst.ratio for worst in self.worst.values())

    @property
    def verdict(self) -> str:
        """In a line: how near to its bound, or what is beyond."""
        if self.error is not None:
            return "FAILED: " + self.error.strip().splitlines()[-1]
        name, worst = max(self.worst.items(), key=lambda item: item[1].ratio)
        if self.passed:
            return f"ok, {worst.ratio:.2f} of its bound at most ({name})"
        beyond = sum(not w.inside for w in self.worst.values())
        return f"DIFFERS in {beyond} quantities, {name} ({worst.name}) {worst.ratio:.1e} times its bound"


@dataclass
class Proof:
    precision: str
    outcomes: list[Outcome]
    plain: dict[str, dict[str, Worst]]
    seconds: float

    @property
    def passed(self) -> bool:
        against_torch = all(worst.inside for worsts in self.plain.values() for worst in worsts.values())
        return against_torch and all(outcome.passed for outcome in self.outcomes)


def plan(cases: Sequence[Case]) -> list[Planned]:
    """Cases by world size, each with the checkpoint it resumes from: of another layout, of another world size where
    there is one that no other has read. Runs of one process at the end read what is left."""
    ordered = sorted(cases, key=lambda case: (case.layout.world, case.layout.layers, case.shape.name))
    planned: list[Planned] = []
    unread: dict[tuple[FamilyKey, bool], list[Case]] = {}

    def read(case: Case) -> Case | None:
        # fp64 numbers from fp64 numbers first: what DeepSpeed wrote is known to fp32 only.
        coarse = case.layout.zero.startswith("deepspeed")
        for kind in (coarse, not coarse):
            left = unread.get((family_of(case), kind), [])
            for other in sorted(left, key=lambda other: other.layout.world == case.layout.world):
                left.remove(other)
                return other
        return None

    for case in ordered:
        planned.append(Planned(case, read(case)))
        coarse = case.layout.zero.startswith("deepspeed")
        unread.setdefault((family_of(case), coarse), []).append(case)
    for left in unread.values():
        for other in left:
            planned.append(Planned(one_process(other), other))
    return planned


def bearable_ranks() -> int:
    """How many ranks this machine's free memory bears, rounded down to a power of two."""
    import psutil

    count = max(1, int(psutil.virtual_memory().available // RANK_BYTES))
    return int(1 << (count.bit_length() - 1))


def has_compiler() -> bool:
    """Whether torch can find a C++ compiler to compile for the CPU with."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def require_ranks(layouts: Sequence[Layout]) -> None:
    """UserError where a layout has more ranks than this machine bears."""
    bearable = bearable_ranks()
    for layout in layouts:
        if layout.world > bearable:
            raise UserError(
                f"layout {str(layout)!r} has {layout.world} ranks, each a process of about {RANK_BYTES >> 20} MiB; the "
                f"free memory of this machine bears {bearable}"
            )


class Prover:
    """Runs cases on ranks that are started once per world size. To be used in a `with` block, for its checkpoints.

    say: gets a line of progress per layout.
    """

    def __init__(self, precision: str, say: Callable[[str], None], timeout: float = 300.0) -> None:
        self.precision, self.say, self.timeout = precision, say, timeout
        self.families: dict[FamilyKey, Family] = {}
        self.plain: dict[str, dict[str, Worst]] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="prove-")
        self.folder = Path(self._temporary.name)  # of checkpoints

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def run(self, cases: Sequence[Case]) -> Proof:
        """All cases, and what it takes to read every checkpoint in another layout."""
        start = time.monotonic()
        planned = plan(cases)
        with Ranks(1, self.timeout) as single:
            for case in {family_of(p.case): p.case for p in planned}.values():
                self.prepare(single, case)
        outcomes = list(self._run_all(planned))
        return Proof(self.precision, outcomes, self.plain, time.monotonic() - start)

    def prepare(self, single: Ranks, case: Case) -> None:
        """The reference of a family, its rounding errors, and plain torch beside it."""
        key = family_of(case)
        exact, rounded = (one_process(case).config(precision) for precision in ("fp64", "fp32"))
        job = Job(exact, 1, save=self._checkpoint(key, None))
        (report,) = single.run(run, job)
        (rounded_reports,) = single.run(reference, rounded, MICROS)
        self.families[key] = Family.of(assemble([report]), [assemble([r]) for r in rounded_reports])
        name = f"{case.shape.name}, {case.layers} layers"
        if exact.optimizer.kind == "adamw":
            (by_torch,) = single.run(plain, exact)
            keys = {(p.quantity, p.name) for p in by_torch.pieces} | by_torch.numbers.keys()
            known = Family({k: self.families[key].table[k] for k in keys}, self.families[key].rounding)
            self.plain[name] = measure([by_torch], known, precisions_of("fp64", "native", None))
        self.say(f"reference: {name}, {exact.optimizer.kind}")

    def _run_all(self, planned: Sequence[Planned]) -> Iterator[Outcome]:
        work = _work(planned)
        done, start, used = 0, time.monotonic(), 0
        ranks: Ranks | None = None
        try:
            for number, one in enumerate(planned, 1):
                world = one.case.layout.world
                if ranks is None or ranks.world != world or not ranks.alive or used == RESTART_AFTER:
                    if ranks is not None:
                        ranks.close()
                    ranks, used = Ranks(world, self.timeout), 0
                    done += world * _START
                outcome = self._run_one(ranks, one)
                used += 1
                done += world
                left = (time.monotonic() - start) / done * max(0, work - done)
                self.say(f"[{number}/{len(planned)}] {one.case}: {outcome.verdict} ({_minutes(left)} left)")
                yield outcome
        finally:
            if ranks is not None:
                ranks.close()

    def _run_one(self, ranks: Ranks, one: Planned) -> Outcome:
        start = time.monotonic()
        case, other = one.case, one.resumes
        key = family_of(case)
        if other is not None and not Path(self._checkpoint(key, other)).exists():
            other = None  # it did not come to its save
            one = Planned(case, None)
        job = Job(
            case.runnable(self.precision),
            case.layout.world,
            save=self._checkpoint(key, case),
            resume=self._checkpoint(key, other),
        )
        if Path(str(job.save)).exists():
            job = replace(job, save=None)  # one process reads what is left
        try:
            reports: list[Report] = ranks.run(run, job)
        except RuntimeError as error:
            return Outcome(one, time.monotonic() - start, error=str(error))
        backend = case.layout.zero.rpartition("-")[0]
        resumed_backend = "native" if other is None else other.layout.zero.rpartition("-")[0]
        worst = measure(reports, self.families[key], precisions_of(self.precision, backend, resumed_backend))
        return Outcome(one, time.monotonic() - start, worst)

    def _checkpoint(self, key: FamilyKey, case: Case | None) -> str:
        """Where a case, or the reference of a family (None), saves."""
        name = "reference" if case is None else str(case.layout)
        return str(self.folder / "-".join(map(str, key)) / name.replace("/", "_"))


_START = 4  # starting a rank costs as much as running so many layouts on it


def _work(planned: Sequence[Planned]) -> int:
    """What lies ahead, in layouts times ranks."""
    worlds = [p.case.layout.world for p in planned]
    starts = [world for index, world in enumerate(worlds) if index == 0 or worlds[index - 1] != world]
    return sum(worlds) + _START * sum(starts)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
