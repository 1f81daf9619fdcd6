"""`megapt collectives`: every rank's collectives of a world of any size, checked against each other in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.config import Config
    from megapt.prove.collectives import Operation


def collectives(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, by dotted key."),
    ] = None,
    world: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 512,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every operation of every rank there as JSON lines.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table, what was found and the time there as JSON.")
    ] = None,
) -> None:
    """Check that the collectives and transfers of all ranks of a layout meet: nothing can wait for ever.

    Builds the engine of each rank in turn, with small tensors under a fake process group, and takes two steps. Exit
    status 1 if members of a group disagree, a transfer has one end only, or groups wait for each other in a circle.
    """
    for file in (out, summary):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file.parent} is no folder; {file.name} cannot be written there")
    from megapt.config import load

    chosen = load(config, overrides or []).config
    records, found, report = _check(chosen, world)
    if out is not None:
        _write(records, out)
    if summary is not None:
        from megapt.files import write_whole

        given = {"config": config.name, "overrides": overrides or []}
        write_whole(summary, json.dumps(given | report, indent=2).encode() + b"\n")
    for line in found:
        typer.echo(f"MISMATCH {line}")
    if found:
        raise typer.Exit(1)
    typer.echo("all members of every group issue the same operations in the same order; every send meets its receive")


def _check(config: Config, world: int) -> tuple[list[list[Operation]], list[str], dict[str, Any]]:
    """The records, what is wrong with them, and the table, which is printed."""
    import time

    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from megapt.prove import collectives as job

    clocks = time.perf_counter(), time.process_time()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("recording ranks", total=world)
        records = job.record(config, world, progress=lambda done: bar.update(task, completed=done))
    found = job.mismatches(records)
    elapsed, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]

    parallel, zero = config.parallel, config.zero
    data = world // (parallel.tensor * parallel.pipeline)
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data}"
    title = f"{world} ranks: {layout}, {parallel.schedule}, {zero.backend} ZeRO {zero.stage}; two steps"
    table = Table("operation", "of all ranks", "of a rank", title=title)
    counts = job.summary(records)
    for name, count in counts:
        table.add_row(name, f"{count:,}", f"{count / world:,.1f}")
    Console().print(table)
    typer.echo(f"{sum(map(len, records)):,} operations recorded and checked in {elapsed:.0f} s ({cpu:.0f} s of CPU)")
    return records, found, {
        "world": world,
        "layout": layout,
        "schedule": parallel.schedule,
        "zero": f"{zero.backend} {zero.stage}",
        "operations": dict(counts),
        "mismatches": found,
        "seconds": round(elapsed, 1),
        "cpu_seconds": round(cpu, 1),
        "torch": torch.__version__,
    }  # fmt: skip


def _write(records: list[list[Operation]], out: Path) -> None:
    from dataclasses import asdict

    from megapt.files import open_whole

    with open_whole(out) as file:
        for rank, operations in enumerate(records):
            lines = (json.dumps({"rank": rank, **asdict(operation)}) for operation in operations)
            file.write("".join(f"{line}\n" for line in lines).encode())
