"""Which layout is fastest: every legal one is bounded, and those that may be among the best are worked out.

Best first, by the least that a layout can take (`plan.bounds`). A layout is worked out unless others are known that are
faster than it can be: as many as the table has rows, one with the same tensor and pipeline size, and one that needs no
more memory than it does at least. So the ranking, the best of each pair of sizes and the Pareto front of throughput and
memory are those of all layouts, down to half of the best one's throughput.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megapt.config import Config
from megapt.errors import UserError
from megapt.model.recompute import Policy
from megapt.plan.advice import no_layout
from megapt.plan.bounds import Bounds
from megapt.plan.candidates import (
    POLICIES,
    Layout,
    Wanted,
    cells,
    distinct_zero_stages,
    divisors,
    sample_unit,
    schedules,
    sequence_choices,
    zero_stages,
)
from megapt.plan.hardware import Hardware
from megapt.plan.memory import StageMemory, stage_memory
from megapt.plan.time import StepTime, step_time

MARGIN = 0.05
"""Share of a device's memory that stays free by default."""

_FAR = 2.0  # layouts that take at least so many times the best one's seconds are of no interest
_SAME = 1.01  # of bytes: a layout on the front that saves less is the same one


@dataclass(frozen=True)
class Option:
    """A layout that fits, with the config that it makes, its step and what each stage's ranks hold."""

    layout: Layout
    config: Config
    time: StepTime
    stages: list[StageMemory]

    @property
    def worst(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def bytes(self) -> int:
        """Of the rank that holds most."""
        return self.worst.total

    @property
    def seconds(self) -> float:
        return self.time.seconds


@dataclass(frozen=True)
class Plan:
    """What the search found.

    ranked: fastest first, all that were worked out and fit; front: of these, the ones that none beats in both
    throughput and memory, fastest first; tight: of each tensor and pipeline size of which none fits, the layout that
    needs least and its bytes at least (sizes with layouts that were left out as too slow are not among them); legal:
    layouts in all; timed: those that were worked out; backend, only: what was asked for.
    """

    config: Config
    world: int
    hardware: Hardware
    margin: float
    ranked: list[Option]
    front: list[Option]
    tight: dict[tuple[int, int], tuple[Layout, int]]
    legal: int
    timed: int
    backend: str | None = None
    only: Wanted | None = None

    @property
    def best(self) -> Option:
        return self.ranked[0]

    def of_each_cell(self) -> list[Option]:
        """The best of each tensor and pipeline size, fastest first."""
        found: dict[tuple[int, int], Option] = {}
        for option in self.ranked:
            found.setdefault(option.layout.cell, option)
        return list(found.values())


def room(hardware: Hardware, margin: float = MARGIN) -> int:
    """Bytes of a device that a plan may use."""
    return int(hardware.memory_bytes * (1 - margin))


def is_cpu(hardware: Hardware) -> bool:
    """Whether its ranks compute on a CPU, whose kernels keep other things than a GPU's."""
    return hardware.gemm.units == 1


def evaluate(config: Config, layout: Layout, hardware: Hardware) -> Option:
    """A layout worked out, whether it fits or not."""
    return _timed(layout.on(config), layout, hardware, evaluate_memory(config, layout, hardware))


def evaluate_memory(config: Config, layout: Layout, hardware: Hardware) -> list[StageMemory]:
    """What each stage's ranks hold, without the time of a step."""
    return stage_memory(layout.on(config), layout.dp, cpu=is_cpu(hardware))


def _timed(made: Config, layout: Layout, hardware: Hardware, stages: list[StageMemory]) -> Option:
    time = step_time(made, layout.dp, hardware, policies=[stage.policies for stage in stages])
    return Option(layout, made, time, stages)


def search(
    config: Config,
    world: int,
    hardware: Hardware,
    *,
    margin: float = MARGIN,
    top: int = 10,
    backend: str | None = None,
    only: Wanted | None = None,
    best_alone: bool = False,
) -> Plan:
    """The layouts of `world` ranks that fit, ranked. Those of `config` itself count as wishes no more than others.

    margin: share of the memory that stays free; top: how many of the ranking must be certain; backend: the ZeRO backend
    to take, default native, and deepspeed where it alone can; only: values that all layouts must have; best_alone: only
    the best layout must be certain, which takes a fraction of the time.

    Raises UserError where no layout is legal. Where none fits, `ranked` is empty, and `plan.advice` says what would do.
    """
    if not 0 <= margin < 1:
        raise UserError(f"the memory margin is a share of the memory from 0 to below 1, not {margin}")
    hardware.peak_flops(config.precision)  # refuses a precision that the hardware states no peak of
    limit = room(hardware, margin)
    run = _Search(config, world, hardware, limit, 1 if best_alone else top, backend, only, best_alone)
    run.run()
    ranked = sorted(run.found, key=lambda option: (option.seconds, option.bytes, option.layout))
    front: list[Option] = []
    for option in ranked:
        if not front or option.bytes < front[-1].bytes:
            front.append(option)
    open_cells = {option.layout.cell for option in ranked} | run.left
    tight = {cell: least for cell, least in run.tight.items() if cell not in open_cells}
    return Plan(config, world, hardware, margin, ranked, front, tight, run.legal, run.timed, backend, only)


@dataclass(order=True)
class _Candidate:
    """A layout on its way through the search; seconds and bytes: its bounds; most: of `Bounds`."""

    seconds: float
    layout: Layout
    policy: Policy = field(compare=False)
    most: int | None = field(compare=False)
    bytes: int = field(compare=False)

    def whole(self) -> Layout:
        amount = "" if self.most is None or self.policy == "none" else f":{self.most}"
        return replace(self.layout, recompute=self.policy + amount)


class _Search:
    def __init__(
        self,
        config: Config,
        world: int,
        hardware: Hardware,
        limit: int,
        top: int,
        backend: str | None,
        only: Wanted | None,
        best_alone: bool,
    ) -> None:
        self.config, self.world, self.hardware, self.limit, self.top = config, world, hardware, limit, top
        self.backend, self.only, self.best_alone = backend, only, best_alone
        self.bounds = Bounds(config, hardware, is_cpu(hardware))
        self.heap: list[_Candidate] = []
        self.found: list[Option] = []
        self.tight: dict[tuple[int, int], tuple[Layout, int]] = {}
        self.left: set[tuple[int, int]] = set()  # cells with layouts that were left out and may fit
        self.best_of: dict[tuple[int, int], float] = {}
        self.fastest: list[float] = []
        self.front: list[tuple[float, int]] = []
        self.fastest_seconds = math.inf
        self.legal = self.timed = 0

    def run(self) -> None:
        for base in self._bases():
            self._push_policies(base)
        if not self.legal:
            raise UserError(no_layout(self.config, self.world, self.only, self.backend))
        while self.heap:
            candidate = heapq.heappop(self.heap)
            if candidate.seconds > _FAR * self.fastest_seconds:
                self.left |= {one.layout.cell for one in (candidate, *self.heap)}
                break
            if self._matters(candidate):
                self._work_out(candidate)
            else:
                self.left.add(candidate.layout.cell)

    def _bases(self) -> Iterator[Layout]:
        """Every legal layout but for what it computes again, without those that cannot fit whatever that is."""
        config, given = self.config, self.only.given if self.only else {}
        for tp, pp, dp in cells(config, self.world):
            if not _wanted(given, tp=tp, pp=pp, dp=dp):
                continue
            zeros = self._zeros(pp, dp, given)
            for micro in divisors(sample_unit(config) // dp):
                if not _wanted(given, micro=micro):
                    continue
                micro_batches = config.batch.global_samples // (dp * micro)
                ways = [
                    (schedule, chunks)
                    for schedule, chunks in schedules(config, pp, micro_batches)
                    if _wanted(given, schedule=schedule, chunks=chunks)
                ]
                for sequence in sequence_choices(config, tp, micro):
                    for zero in zeros if ways and _wanted(given, sequence=sequence) else ():
                        self.legal += len(ways) * len(POLICIES)
                        base = Layout(tp, pp, dp, micro=micro, zero=zero, sequence=sequence)
                        least = self.bounds.least(base)
                        if least > self.limit:
                            self._note_tight(base, least)
                            continue
                        for schedule, chunks in self._distinct(pp, ways, given):
                            yield replace(base, schedule=schedule, chunks=chunks)

    def _zeros(self, pp: int, dp: int, given: dict[str, object]) -> list[str]:
        if "zero" not in given:
            return distinct_zero_stages(self.config, pp, dp, self.backend)
        asked = str(given["zero"])
        offload = asked.endswith("-offload")
        return [asked] if asked in zero_stages(self.config, pp, asked.partition("-")[0], offload) else []

    def _distinct(self, pp: int, ways: list[tuple[str, int]], given: dict[str, object]) -> Iterator[tuple[str, int]]:
        """Of numbers of chunks whose largest virtual stage has as many layers, the smallest: the most even one."""
        largest: set[int] = set()
        for schedule, chunks in ways:
            if schedule == "interleaved" and "chunks" not in given:
                size = math.ceil(self.config.model.layers / (pp * chunks))
                if size in largest:
                    continue
                largest.add(size)
            yield schedule, chunks

    def _push_policies(self, base: Layout) -> None:
        wanted = self.only.given.get("recompute") if self.only else None
        if wanted is not None:
            policy, _, amount = wanted.partition(":")
            if policy == "budget":
                self._push(replace(base, recompute=wanted), "full", None)
            else:
                most = int(amount) if amount else None
                if most is None or most <= max(1, self.config.model.layers - base.pp * base.chunks + 1):
                    self._push(base, policy, most)
                if policy != "none" and not amount:
                    self._push_mix(base, policy, 1)
            return
        for policy in POLICIES:
            self._push(base, policy, None)
        if self.bounds.bytes(base, "none", None) > self.limit:
            for policy in POLICIES[1:]:
                self._push_mix(base, policy, 1)

    def _push(self, base: Layout, policy: Policy, most: int | None) -> None:
        size = self.bounds.bytes(base, policy, most)
        if size > self.limit:
            self._note_tight(_Candidate(0.0, base, policy, most, size).whole(), size)
            return
        seconds = self.bounds.seconds(base, policy, most)
        heapq.heappush(self.heap, _Candidate(seconds, base, policy, most, size))

    def _push_mix(self, base: Layout, policy: Policy, start: int, missing: int = 0) -> None:
        """The fewest layers from `start` on that are computed again and save `missing` bytes more than bounds say."""
        longest = max(self.bounds.ranks(base.pp, base.chunks, base.schedule)[0].chunks)
        low, high = start, longest
        while low < high:
            middle = (low + high) // 2
            if self.bounds.bytes(base, policy, middle) + missing <= self.limit:
                high = middle
            else:
                low = middle + 1
        if low < longest:  # all layers of each chunk are a candidate already
            self._push(base, policy, low)

    def _matters(self, candidate: _Candidate) -> bool:
        if len(self.fastest) < self.top or candidate.seconds < -self.fastest[0]:
            return True
        if self.best_alone:
            return False
        if candidate.seconds < self.best_of.get(candidate.layout.cell, math.inf):
            return True
        size = candidate.bytes * _SAME
        return not any(seconds <= candidate.seconds and held <= size for seconds, held in self.front)

    def _work_out(self, candidate: _Candidate) -> None:
        layout = candidate.whole()
        if candidate.layout.recompute.startswith("budget"):
            layout = candidate.layout
        self.timed += 1
        try:
            stages = evaluate_memory(self.config, layout, self.hardware)
        except UserError:  # a budget of activations that the layout cannot keep
            return
        size = max(stage.total for stage in stages)
        if size > self.limit:
            self._note_tight(layout, size)
            self._push_more(candidate, size)
            return
        option = _timed(layout.on(self.config), layout, self.hardware, stages)
        self.found.append(option)
        if not any(seconds <= option.seconds and held <= size for seconds, held in self.front):
            self.front = [(seconds, held) for seconds, held in self.front if seconds < option.seconds or held < size]
            self.front.append((option.seconds, size))
        self.fastest_seconds = min(self.fastest_seconds, option.seconds)
        self.best_of[layout.cell] = min(option.seconds, self.best_of.get(layout.cell, math.inf))
        heapq.heappush(self.fastest, -option.seconds)
        if len(self.fastest) > self.top:
            heapq.heappop(self.fastest)

    def _push_more(self, candidate: _Candidate, size: int) -> None:
        """What did not fit, with more layers computed again."""
        if self.only and "recompute" in self.only.given and self.only.given["recompute"] not in POLICIES[1:]:
            return
        off = size - candidate.bytes
        if candidate.policy == "none":
            if self.bounds.bytes(candidate.layout, "none", None) <= self.limit:
                for policy in POLICIES[1:]:
                    self._push_mix(candidate.layout, policy, 1, off)
        elif candidate.most is not None:
            self._push_mix(candidate.layout, candidate.policy, candidate.most + 1, off)

    def _note_tight(self, layout: Layout, size: int) -> None:
        known = self.tight.get(layout.cell)
        if known is None or size < known[1]:
            self.tight[layout.cell] = layout, size


def _wanted(given: dict[str, object], **values: object) -> bool:
    return all(given.get(name, value) == value for name, value in values.items())
