"""`megapt schedule`: look at pipeline schedules before, and after, a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megapt.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from megapt.parallel.pipeline.check import Report
    from megapt.parallel.pipeline.schedules import Schedule
    from megapt.parallel.pipeline.timeline import Timeline

app = typer.Typer(help="Look at pipeline schedules.", no_args_is_help=True)

_LONGEST = 1e9  # seconds: no figure of a step becomes infinite

Seconds = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=_LONGEST,
        help="Of one micro-batch through all layers of a rank, in seconds; default: 1, or measured.",
    ),
]


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="gpipe, 1f1b, interleaved, zb-h1, zb-v or forward.")],
    stages: Annotated[int, typer.Option(min=1, help="Pipeline ranks.")],
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")],
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Model chunks per rank; default: 2 for interleaved and zb-v, else 1.")
    ] = None,
    forward: Seconds = None,
    backward_input: Seconds = None,
    backward_weight: Seconds = None,
    transfer: Annotated[float, typer.Option(min=0.0, max=_LONGEST, help="Of one hop between ranks, in seconds.")] = 0.0,
    measured: Annotated[Path | None, typer.Option(metavar="FILE", help="A timeline measured by a run.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the timeline as a PNG.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Chrome trace (JSON).")] = None,
) -> None:
    """Simulate a schedule, and lay a measured timeline beside it: step time, bubble, what each rank holds."""
    from rich.console import Console

    from megapt.parallel.pipeline import timeline as timelines
    from megapt.parallel.pipeline.check import check
    from megapt.parallel.pipeline.schedules import schedule
    from megapt.parallel.pipeline.simulate import Costs, simulate

    chunks = chunks or (2 if name in ("interleaved", "zb-v") else 1)
    made = schedule(name, stages, chunks, micro_batches)
    report = check(made)
    found = None if measured is None else _read(measured, made)
    given = [forward, backward_input, backward_weight]
    if found is not None and given == [None, None, None]:
        costs = Costs.measured(found, made.placement, transfer)
    else:
        f, i, w = (1.0 if seconds is None else seconds for seconds in given)
        costs = Costs.even(stages, chunks, f, i, w, transfer)
    shown = {"simulated": simulate(made, costs).timeline}
    if found is not None:
        shown["measured"] = found

    console = Console(highlight=False)
    title = f"{name}, {stages} ranks{f' x {chunks} chunks' if chunks > 1 else ''}, {micro_batches} micro-batches"
    for table in _tables(title, shown, report):
        console.print(table)
    if out is not None:
        timelines.draw({f"{title}, {which}": timeline for which, timeline in shown.items()}, out)
        typer.echo(f"{out}: the timeline")
    if trace is not None:
        timelines.chrome_trace(shown["simulated"] if found is None else found, trace)
        typer.echo(f"{trace}: for chrome://tracing or ui.perfetto.dev")
    if out is None:
        for which, timeline in shown.items():
            lines = timelines.text(timeline, console.width)
            wide = f"{which}: wider than {console.width} columns; --out timeline.png draws it"
            typer.echo(wide if lines is None else f"{which}:\n{lines}")


def _read(path: Path, made: Schedule) -> Timeline:
    """A measured timeline of that schedule. Raises UserError if it is another's."""
    from megapt.parallel.pipeline.timeline import Timeline

    try:
        found = Timeline.from_json(path.read_text(encoding="utf-8", errors="replace"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if len(found.ranks) != made.placement.stages:
        raise UserError(
            f"{path} holds {len(found.ranks)} ranks, the schedule has {made.placement.stages}; set --stages"
        )
    for rank, (spans, actions) in enumerate(zip(found.ranks, made.actions, strict=True)):
        ran, planned = [span.action for span in spans], [action for action in actions if action.kind.is_compute]
        if ran != planned:
            place = next((n for n, (a, b) in enumerate(zip(ran, planned, strict=False)) if a != b), None)
            what = (
                f"{len(ran)} actions, where the schedule has {len(planned)}"
                if place is None
                else f"{ran[place]} as action {place}, where the schedule has {planned[place]}"
            )
            raise UserError(
                f"{path} was not measured on {made.name} with {made.placement.chunks} chunks and {made.micro_batches} "
                f"micro-batches: rank {rank} ran {what}"
            )
    return found


def _tables(title: str, shown: dict[str, Timeline], report: Report) -> list[Table]:
    """One table of the step, one of the ranks."""
    from rich.table import Table

    step = Table("", *shown, title=title)
    step.add_row("step time", *(f"{t.step:.4g} s" for t in shown.values()))
    step.add_row("bubble (idle / busy)", *(f"{t.bubble:.1%}" for t in shown.values()))
    step.add_row("bubble of the longest rank", *(f"{t.span_bubble:.1%}" for t in shown.values()))
    ranks = Table("rank", "peak live", "waiting for W", "peak of both", *(f"bubble, {which}" for which in shown))
    bubbles = [t.rank_bubbles for t in shown.values()]
    for rank, peaks in enumerate(zip(report.peak_live, report.peak_weight, report.peak_held, strict=True)):
        ranks.add_row(str(rank), *map(str, peaks), *(f"{of_rank[rank]:.1%}" for of_rank in bubbles))
    ranks.caption = "live: micro-batches x chunks with a forward and no input gradient yet"
    return [step, ranks]
