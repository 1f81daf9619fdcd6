"""What to say where no layout is legal, or none fits: the rule, the values, and the nearest that works."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from megapt.config import Config
from megapt.plan.candidates import (
    Layout,
    Wanted,
    cells,
    divisors,
    sample_unit,
    schedules,
    sequence_choices,
    tensor_degrees,
    zero_stages,
)
from megapt.plan.hardware import Hardware

if TYPE_CHECKING:
    from megapt.plan.search import Option, Plan

_FARTHEST = 4096  # worlds that are looked at for the nearest legal one
_LARGEST = 1 << 17  # ranks of a cluster that is looked for


def no_layout(config: Config, world: int, only: Wanted | None, backend: str | None) -> str:
    """Why no layout of `world` ranks is legal, and the nearest numbers of ranks that have some."""
    if any(True for _ in cells(config, world)):
        return _none_wanted(config, world, only, backend)
    unit, tensor = sample_unit(config), tensor_degrees(config, world)
    samples = config.batch.global_samples
    rest = math.gcd(unit, world)
    near = _nearest_worlds(config, world)
    most = largest_world(config)
    lines = [
        f"no layout of {world:,} ranks is legal: {world:,} = tensor x pipeline x data, where tensor is one of "
        f"{', '.join(map(str, tensor))}, pipeline is at most model.layers = {config.model.layers}, and data divides "
        f"the batch of {samples:,} samples" + (f" and its ramp (together {unit:,})" if unit != samples else ""),
        f"numbers of ranks that work: {near}; the most that any layout of this batch takes: {most:,}",
    ]
    if rest < world:
        lines.append(f"or a batch that more ranks divide: {_nearest_batch(config, world)} samples")
    return "; ".join(lines)


def _none_wanted(config: Config, world: int, only: Wanted | None, backend: str | None) -> str:
    asked = f"{only}" if only else f"zero.backend = {backend or 'native'}"
    advice = "leave some of the values open"
    if config.zero.offload:
        advice = "zero.offload needs deepspeed without a pipeline, and AdamW; leave it out, or take fewer ranks"
    samples = sample_unit(config)
    if only and samples % only.given.get("micro", 1):
        legal = ", ".join(map(str, divisors(samples)))
        advice = f"micro x data must divide {samples:,} samples: micro is one of {legal}"
    elif backend is not None and not zero_stages(config, 1, backend):
        advice = "fp16, Muon and stochastic rounding need the native backend"
    sizes = ", ".join(f"tp={tp} pp={pp} dp={dp}" for tp, pp, dp in list(cells(config, world))[:12])
    return f"no legal layout of {world:,} ranks has {asked}; legal sizes of the axes: {sizes}; {advice}"


def _nearest_worlds(config: Config, world: int) -> str:
    legal = []
    for way in (-1, 1):
        for step in range(1, _FARTHEST):
            other = world + way * step
            if other < 1:
                break
            if any(True for _ in cells(config, other)):
                legal.append(f"{other:,}")
                break
    return " or ".join(legal) or "none within 4,096 of it"


def largest_world(config: Config) -> int:
    """The most ranks of any legal layout: every sample a rank of its own, every layer a stage."""
    model, kv = config.model, config.model.num_kv_heads
    tensor = max(
        t for t in range(1, model.heads + 1)
        if not (model.heads % t or model.ffn % t or (kv % t and t % kv))
    )  # fmt: skip
    return tensor * model.layers * sample_unit(config)


def _nearest_batch(config: Config, world: int) -> str:
    """Sizes of the batch near its own that some data-parallel size divides."""
    samples = config.batch.global_samples
    sizes: set[int] = set()
    for tp in tensor_degrees(config, world):
        for pp in range(1, min(config.model.layers, world // tp) + 1):
            if world % (tp * pp) == 0:
                dp = world // (tp * pp)
                sizes |= {samples // dp * dp, -(-samples // dp) * dp}
    sizes.discard(0)
    below = max((size for size in sizes if size <= samples), default=None)
    above = min((size for size in sizes if size >= samples), default=None)
    return " or ".join(f"{size:,}" for size in dict.fromkeys((below, above)) if size is not None)


def nothing_fits(plan: Plan) -> str:
    """What is missing, and the smallest cluster of this hardware that would do."""
    from megapt.plan.search import room
    from megapt.plan.table import gib, memory_items

    option = least_memory(plan)
    if option is None:
        return f"no layout of {plan.world:,} ranks keeps {plan.only}: give a larger budget, or another policy"
    layout, limit = option.layout, room(plan.hardware, plan.margin)
    items = ", ".join(f"{name} {gib(size)}" for name, size in memory_items(option.worst).items() if size)
    lines = [
        f"the model fits in no layout of {plan.world:,} ranks: {plan.hardware.name} has {plan.hardware.memory.gib:g} "
        f"GiB, of which {plan.margin:.0%} stay free; the layout that needs least ({layout}) needs "
        f"{gib(option.bytes)} GiB ({items}), {gib(option.bytes - limit)} GiB more than there are"
    ]
    found = smallest_cluster(plan)
    if found is None:
        lines.append(f"no cluster of up to {_LARGEST:,} of them holds it: shorten batch.sequence, or take more memory")
    else:
        lines.append(f"the smallest cluster of them that would do has {found.layout.world:,}: {found.layout}")
    return "; ".join(lines)


def least_memory(plan: Plan) -> Option | None:
    """Of a plan in which nothing fits, the layout that needs least; None where it is a budget that cannot be kept."""
    from megapt.plan.bounds import Bounds
    from megapt.plan.search import evaluate, evaluate_memory, is_cpu, room

    def needs(layout: Layout) -> int:
        return max(stage.total for stage in evaluate_memory(plan.config, layout, plan.hardware))

    bounds = Bounds(plan.config, plan.hardware, is_cpu(plan.hardware))
    near = sorted(_least_of_each_cell(plan, plan.world), key=bounds.least)[:4]  # a long pipeline takes a second each
    layout = min(near, key=needs)
    if needs(layout) <= room(plan.hardware, plan.margin):
        return None
    return evaluate(plan.config, layout, plan.hardware)


def smallest_cluster(plan: Plan) -> Option | None:
    """The best layout of the fewest ranks, beyond the plan's, that hold the model."""
    from megapt.plan.search import search

    for world in _larger_worlds(plan.world, plan.hardware):
        if world > largest_world(plan.config):
            return None
        if not _holds(plan, world):
            continue
        found = search(
            plan.config,
            world,
            plan.hardware,
            margin=plan.margin,
            backend=plan.backend,
            only=plan.only,
            best_alone=True,
        )
        if found.ranked:
            return found.best
    return None


def _holds(plan: Plan, world: int) -> bool:
    """Whether some layout of `world` ranks fits: of each size of the axes the one that needs least is looked at."""
    from megapt.plan.bounds import Bounds
    from megapt.plan.search import evaluate_memory, is_cpu, room

    config, limit = plan.config, room(plan.hardware, plan.margin)
    bounds = Bounds(config, plan.hardware, is_cpu(plan.hardware))
    found = ((bounds.least(layout), layout) for layout in _least_of_each_cell(plan, world))
    near = sorted(item for item in found if item[0] <= limit)
    return any(max(s.total for s in evaluate_memory(config, layout, plan.hardware)) <= limit for _, layout in near)


def _least_of_each_cell(plan: Plan, world: int) -> list[Layout]:
    """Of each size of the axes the layout that needs least memory, with the values that were asked for.

    None of a size that these values do not go with; for a budget of activations, the layout that computes all again.
    """
    config, only, found = plan.config, plan.only, []
    given = only.given if only else {}
    for tp, pp, dp in cells(config, world):
        micro = given.get("micro", 1)
        if sample_unit(config) // dp % micro:
            continue
        asked = str(given.get("zero", ""))
        backend = asked.partition("-")[0] if asked else plan.backend
        stages = zero_stages(config, pp, backend, asked.endswith("-offload") if asked else None)
        for zero in stages[1:2] if dp == 1 else stages[-1:]:  # of one rank, the ones without more buffers
            sequence = sequence_choices(config, tp, micro)[0]
            layout = Layout(tp, pp, dp, zero=zero, recompute="full", sequence=sequence)
            made = only.onto(layout) if only else layout
            if made.recompute.startswith("budget"):
                made = replace(made, recompute="full")
            ways = schedules(config, pp, config.batch.global_samples // (micro * dp))
            same_axes = (made.tp, made.pp, made.dp) == (tp, pp, dp)
            if same_axes and made.zero in stages and (made.schedule, made.chunks) in ways:
                found.append(made)
    return found


def _larger_worlds(world: int, hardware: Hardware) -> Iterator[int]:
    """Within a node powers of two, then whole nodes: one by one up to 32, then in steps of an eighth."""
    node = hardware.node.devices
    size = 1
    while size < node:
        if size > world:
            yield size
        size *= 2
    nodes = 1
    while nodes * node <= _LARGEST:
        if nodes * node > world:
            yield nodes * node
        nodes += max(1, 1 << max(0, nodes.bit_length() - 5))
