"""Plans as pictures: memory per stage, the pipeline's timeline, and what more GPUs would bring. PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megapt.errors import UserError
from megapt.files import StrPath, open_whole
from megapt.parallel.pipeline import timeline as timelines
from megapt.parallel.pipeline.schedules import schedule
from megapt.parallel.pipeline.simulate import Costs, simulate
from megapt.parallel.pipeline.timeline import Timeline
from megapt.plan.memory import ITEMS
from megapt.plan.search import Option, Plan, room, search
from megapt.plan.table import memory_items

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#4c72b0", "#dd8452")
_MOST_BARS = 64
_SHOWN = 480  # actions of a rank that can still be told apart


@dataclass(frozen=True)
class Point:
    """The best layout of some number of GPUs."""

    world: int
    option: Option


def memory(plan: Plan, option: Option, path: StrPath) -> None:
    """Stacked bars: what a rank of each pipeline stage holds, by item, under the line of what there is."""
    from matplotlib import colormaps

    figure = _figure(max(8.0, 3.0 + 0.4 * len(option.stages)), 4.2)
    axis = figure.subplots()
    places, bottom = range(len(option.stages)), [0.0] * len(option.stages)
    items = [memory_items(stage) for stage in option.stages]
    names = [name for name in ITEMS if any(item.get(name) for item in items)]
    for colour, name in zip(colormaps["tab20"].colors, names, strict=False):  # type: ignore[attr-defined]
        heights = [item.get(name, 0) / 2**30 for item in items]
        axis.bar(places, heights, 0.8, bottom, label=name.replace("_", " "), color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    whole, usable = plan.hardware.memory.gib, room(plan.hardware, plan.margin) / 2**30
    axis.axhline(whole, color="black", linewidth=1, label=f"{plan.hardware.name}: {whole:g} GiB")
    margin = f"{plan.margin:.0%} margin: {usable:.1f} GiB"
    axis.axhline(usable, color="black", linewidth=1, linestyle="--", label=margin)
    every = -(-len(places) // _MOST_BARS)
    axis.set_xticks(list(places)[::every])
    axis.set_xlabel("pipeline rank")
    axis.set_ylabel("GiB of one GPU")
    axis.set_xlim(-0.6, max(len(places), 4) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Memory by stage: {option.layout}", fontsize=9)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    _save(figure, path)


def timeline(option: Option, path: StrPath) -> None:
    """The step's pipeline from the planned seconds of every virtual stage, with as many micro-batches as show it."""
    layout, found = option.layout, simulated(option)
    batch = option.config.batch
    micro_batches = batch.global_samples // (layout.micro * layout.dp)
    shown = 1 + max(span.action.micro_batch for spans in found.ranks for span in spans)
    how_many = f"{shown} micro-batches"
    if shown < micro_batches:
        whole = f"{option.seconds:.4g} s, {option.time.bubble_share:.1%} of it waiting"
        how_many = f"{shown} of {micro_batches} micro-batches (the whole step: {whole})"
    timelines.draw({f"{layout}\n{how_many}": found}, path)


def simulated(option: Option) -> Timeline:
    """The pipeline's timeline, without the micro-batches in its middle that only repeat others."""
    layout, chunks = option.layout, option.time.chunks
    micro_batches = option.config.batch.global_samples // (layout.micro * layout.dp)
    unit = layout.pp if layout.schedule == "interleaved" else 1
    enough = max(2 * layout.pp, min(3 * layout.pp, _SHOWN // (2 * layout.chunks)))
    enough = max(unit, enough // unit * unit)
    costs = Costs(
        [chunk.forward for chunk in chunks],
        [chunk.backward_input for chunk in chunks],
        [chunk.backward_weight for chunk in chunks],
        option.time.transfer,
    )
    made = schedule(layout.schedule, layout.pp, layout.chunks, min(micro_batches, enough))
    return simulate(made, costs).timeline


def scaling(plan: Plan, worlds: Sequence[int] | None = None) -> list[Point]:
    """The best layout of other numbers of GPUs on the same batch; those that have none or hold nothing are left out."""
    points = []
    for world in worlds or _around(plan.world):
        if world == plan.world:
            found = plan
        else:
            try:
                found = search(
                    plan.config,
                    world,
                    plan.hardware,
                    margin=plan.margin,
                    backend=plan.backend,
                    only=plan.only,
                    best_alone=True,
                )
            except UserError:
                continue
        if found.ranked:
            points.append(Point(world, found.best))
    return points


def _around(world: int) -> list[int]:
    return [size for size in (world // 4, world // 2, world, 2 * world) if size]


def scaling_curves(plan: Plan, points: Sequence[Point], path: StrPath) -> None:
    """GPUs against tokens/s and MFU, each point the best layout of its number of GPUs, the batch always the same."""
    figure = _figure(9.0, 3.6)
    speed, use = figure.subplots(1, 2)
    worlds = [point.world for point in points]
    rates = [point.option.time.tokens_per_second for point in points]
    speed.plot(worlds, rates, "o-", color=_COLOURS[0], label="best layout")
    each = rates[0] / worlds[0]
    speed.plot(worlds, [each * world for world in worlds], "--", color="grey", label="as the first point, linearly")
    speed.set_xscale("log", base=2)
    speed.set_yscale("log")
    speed.set_ylabel("tokens/s")
    speed.legend(fontsize=8, frameon=False)
    use.plot(worlds, [100 * point.option.time.mfu for point in points], "o-", color=_COLOURS[1])
    for point in points:
        layout = point.option.layout
        use.annotate(
            f"tp {layout.tp}\npp {layout.pp}",
            (point.world, 100 * point.option.time.mfu),
            textcoords="offset points",
            xytext=(0, 7),
            fontsize=7,
            ha="center",
        )
    use.set_xscale("log", base=2)
    use.set_ylabel("MFU (%)")
    use.set_ylim(0, max(100 * point.option.time.mfu for point in points) * 1.25)
    for axis in (speed, use):
        axis.set_xticks(worlds, [f"{world:,}" for world in worlds], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(f"{plan.hardware.name}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    tokens = plan.config.batch.global_samples * plan.config.batch.sequence
    figure.suptitle(f"{tokens:,} tokens per step on more and fewer GPUs", fontsize=10)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Figure, path: StrPath) -> None:
    with open_whole(path) as file:
        figure.savefig(file, format="png")
