"""`megapt collectives`: every rank's collectives of a world of any size, checked against each other in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megapt.errors import UserError

if TYPE_CHECKING:
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
) -> None:
    """Check that the collectives and transfers of all ranks of a layout meet: nothing can wait for ever.

    Builds the engine of each rank in turn, with small tensors under a fake process group, and takes two steps. Exit
    status 1 if members of a group disagree, a transfer has one end only, or groups wait for each other in a circle.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from megapt.config import load
    from megapt.prove.collectives import mismatches, record, small, summary

    console = Console(stderr=True)
    chosen = small(load(config, overrides or []).config)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("recording ranks", total=world)
        records = record(chosen, world, progress=lambda done: bar.update(task, completed=done))
    if out is not None:
        _write(records, out)
    found = mismatches(records)
    parallel = chosen.parallel
    degrees = f"tensor {parallel.tensor}, pipeline {parallel.pipeline} ({parallel.schedule})"
    table = Table("operation", "of all ranks", "of a rank", title=f"{world} ranks: {degrees}, two steps")
    for name, count in summary(records):
        table.add_row(name, f"{count:,}", f"{count / world:,.1f}")
    Console().print(table)
    for line in found:
        typer.echo(f"MISMATCH {line}")
    if found:
        raise typer.Exit(1)
    typer.echo("all members of every group issue the same operations in the same order; every send meets its receive")


def _write(records: list[list[Operation]], out: Path) -> None:
    import json
    from dataclasses import asdict

    from megapt.files import write_whole

    lines = [json.dumps({"rank": rank, **asdict(op)}) for rank, operations in enumerate(records) for op in operations]
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder; {out.name} cannot be written there")
    write_whole(out, "\n".join(lines).encode() + b"\n")
