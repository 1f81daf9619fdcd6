"""Plans as tables and as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megapt.plan.memory import StageMemory
from megapt.plan.search import Option, Plan, room

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 118
"""Columns of the tables, wherever they go."""


def gib(size: float) -> str:
    """With a decimal, or with three where one would be next to nothing."""
    return f"{size / 2**30:,.1f}" if size == 0 or size >= 0.05 * 2**30 else f"{size / 2**30:.3f}"


def memory_items(stage: StageMemory) -> dict[str, int]:
    """Bytes of a stage's rank by what they are; they add up to `stage.total`."""
    return {name: size for name, size in stage.items.items() if size}


# Columns of tables, and the items of `plan.memory.ITEMS` in each; what is named nowhere is in the last but one.
_GROUPS = {
    "weights": ("weights",),
    "grads": ("main_grad",),
    "optimizer": ("masters", "moments"),
    "activ.": ("activations", "deferred"),
    "buckets": ("buckets",),
    "working": (),
    "overhead": ("fragmentation", "context"),
}


def memory_groups(stage: StageMemory) -> dict[str, int]:
    """`memory_items` in the columns of a table."""
    found = dict.fromkeys(_GROUPS, 0)
    for name, size in memory_items(stage).items():
        found[next((group for group, names in _GROUPS.items() if name in names), "working")] += size
    return found


def title(plan: Plan) -> str:
    batch = plan.config.batch
    tokens = batch.global_samples * batch.sequence
    return (
        f"{plan.world:,} x {plan.hardware.name}, {tokens:,} tokens per step in {batch.global_samples:,} sequences; "
        f"{room(plan.hardware, plan.margin) / 2**30:.1f} of {plan.hardware.memory.gib:g} GiB to use "
        f"({plan.margin:.0%} margin)"
    )


def ranking(plan: Plan, options: Sequence[Option], heading: str | None = None) -> Table:
    """One row per layout: what it is, how fast it is, and what the rank that holds most holds."""
    table = _table(heading)
    for name in ("#", "tp", "pp", "dp"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("schedule", "zero", "recompute"):
        table.add_column(name, no_wrap=True)
    for name in ("micro", "s/step", "tokens/s", "per GPU", "MFU", "bubble", "comm.", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, option in enumerate(options, 1):
        layout, time = option.layout, option.time
        table.add_row(
            str(number),
            str(layout.tp) + ("" if layout.sequence or layout.tp == 1 else " no SP"),
            str(layout.pp),
            str(layout.dp),
            _schedule(option),
            layout.zero.replace("native-", "").replace("-offload", ", offload"),
            layout.recompute,
            str(layout.micro),
            f"{option.seconds:.3f}" if option.seconds < 100 else f"{option.seconds:,.1f}",
            f"{time.tokens_per_second:,.0f}",
            f"{time.tokens_per_second / plan.world:,.0f}",
            f"{time.mfu:.1%}",
            f"{time.bubble_share:.1%}",
            f"{time.communication_share:.1%}",
            gib(option.bytes),
        )
    return table


def details(plan: Plan, options: Sequence[Option]) -> Table:
    """Of the same rows, the memory of the rank that holds most by item in GiB, and what each loses against the best.

    working: gathered sequences, logits, transfers and other short-lived tensors; overhead: of the allocator and CUDA.
    """
    items = [name for name in _GROUPS if any(memory_groups(option.worst)[name] for option in options)]
    table = _table(None)
    for name in ("#", *items, "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("step against the best's, and by what", overflow="fold")
    for number, option in enumerate(options, 1):
        held = memory_groups(option.worst)
        against = "" if option is plan.best else loss(plan.best, option)
        table.add_row(str(number), *(gib(held[name]) for name in items), gib(option.bytes), against)
    return table


def _table(heading: str | None) -> Table:
    from rich.table import Table

    return Table(title=heading, title_justify="left", title_style="", box=None, pad_edge=False, header_style="bold")


def _schedule(option: Option) -> str:
    layout = option.layout
    if layout.pp == 1:
        return "-"
    return layout.schedule + (f" x{layout.chunks}" if layout.schedule == "interleaved" else "")


def loss(best: Option, option: Option) -> str:
    """By how much a layout is slower, and the items that it loses most by."""
    slower = option.seconds / best.seconds - 1
    worse = ((option.time.items[name] - best.time.items.get(name, 0.0), name) for name in option.time.items)
    reasons = sorted((item for item in worse if item[0] > 0.002 * best.seconds), reverse=True)
    text = ", ".join(f"{name} +{seconds / best.seconds:.1%}" for seconds, name in reasons[:2])
    return f"+{slower:.1%}" + (f": {text}" if text else "")


def summary(plan: Plan) -> str:
    """How the ranking came about, and what fits nowhere."""
    text = (
        f"{plan.legal:,} legal layouts, {plan.timed:,} worked out, the others bounded; comm.: waiting for collectives; "
        "GiB: of the rank that holds most"
    )
    if plan.tight:
        cells = sorted(plan.tight.items())
        shown = ", ".join(f"tp={tp} pp={pp}: {gib(size)}" for (tp, pp), (_, size) in cells[:5])
        more = f" and {len(cells) - 5} more" if len(cells) > 5 else ""
        text += f"\ndo not fit whatever is recomputed (GiB at least): {shown}{more}"
    return text


def length(plan: Plan, option: Option, tokens: float | None, gpu_hours: float | None) -> list[str]:
    """How long a run takes, or how far a budget goes."""
    rate, lines = option.time.tokens_per_second, []
    if tokens is not None:
        hours = tokens / rate / 3600
        lines.append(f"{tokens:,.0f} tokens take {hours / 24:,.1f} days, {hours * plan.world:,.0f} GPU-hours")
    if gpu_hours is not None:
        hours = gpu_hours / plan.world
        lines.append(f"{gpu_hours:,.0f} GPU-hours are {hours / 24:,.1f} days, {rate * hours * 3600:,.0f} tokens")
        if tokens is not None:
            need = tokens / rate / 3600 * plan.world
            rest = gpu_hours - need
            lines[-1] += f": {abs(rest):,.0f} GPU-hours {'to spare' if rest >= 0 else 'too few'}"
    return lines


def as_dict(option: Option) -> dict[str, Any]:
    """An option as JSON holds it: seconds and bytes."""
    layout, time, worst = option.layout, option.time, option.worst
    return {
        "layout": str(layout),
        "values": layout.values(),
        "step_seconds": time.seconds,
        "tokens_per_second": time.tokens_per_second,
        "tokens_per_second_per_gpu": time.tokens_per_second / layout.world,
        "mfu": time.mfu,
        "bubble_share": time.bubble_share,
        "communication_share": time.communication_share,
        "time_items": time.items,
        "memory_bytes": worst.total,
        "memory_items": memory_items(worst),
        "memory_per_stage": [stage.total for stage in option.stages],
    }


def plan_as_dict(plan: Plan, options: Sequence[Option]) -> dict[str, Any]:
    return {
        "world": plan.world,
        "hardware": plan.hardware.name,
        "memory_margin": plan.margin,
        "room_bytes": room(plan.hardware, plan.margin),
        "legal_layouts": plan.legal,
        "worked_out": plan.timed,
        "ranked": [as_dict(option) for option in options],
        "front": [as_dict(option) for option in plan.front],
        "do_not_fit": {f"tp={tp},pp={pp}": size for (tp, pp), (_, size) in sorted(plan.tight.items())},
    }


def whole_width(table: Table) -> int:
    """Columns in which nothing of a table that does not fold is cut off."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum


def printed(table: Table, width: int = WIDTH) -> str:
    """A table as lines of text without colours."""
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
