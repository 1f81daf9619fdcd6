"""`megapt checkpoint`: look at checkpoints, check, compare, export and average them."""

from __future__ import annotations

import json as json_format
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megapt.commands.progress import byte_bar
from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.checkpoint.diff import Comparison

app = typer.Typer(help="Look at checkpoints, check, compare, export and average them.", no_args_is_help=True)

_WHAT = "A run folder, its checkpoints folder, or one step's folder."
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=_WHAT)]
Checkpoints = Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help=_WHAT)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


@app.command()
def inspect(
    checkpoint: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False,
    json: Json = False,
) -> None:
    """Print what a checkpoint holds; reads no tensor."""
    from megapt.checkpoint.describe import describe

    found = describe(checkpoint, tensors)
    if json:
        typer.echo(json_format.dumps(found, indent=2))
    else:
        _print_description(found)


@app.command()
def verify(checkpoints: Checkpoints, json: Json = False) -> None:
    """Compare every checksum and name all that is damaged: exit status 1 if anything is."""
    from megapt.checkpoint import resolve
    from megapt.checkpoint import verify as job

    checkpoints = [resolve(checkpoint) for checkpoint in checkpoints]  # a name that is wrong shows before hours of work
    reports = []
    with byte_bar("verifying", sum(map(job.work_bytes, checkpoints))) as progress:
        for checkpoint in checkpoints:
            reports.append(job.verify(checkpoint, progress))
    if json:
        rows = [{**vars(report), "folder": str(report.folder)} for report in reports]
        typer.echo(json_format.dumps(rows, indent=2))
    else:
        for report in reports:
            for problem in report.problems:
                typer.echo(problem)
            counts = f"{report.tensors:,} tensors, {report.slices:,} slices, {report.nbytes:,} bytes"
            state = f"damaged: {len(report.problems):,} problems" if report.problems else "sound"
            typer.echo(f"{report.folder} is {state}; {counts}")
    raise typer.Exit(1 if any(report.problems for report in reports) else 0)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help=_WHAT)],
    second: Annotated[Path, typer.Argument(metavar="B", help=_WHAT)],
    ignore_meta: Annotated[bool, typer.Option("--ignore-meta", help="Only tensors count.")] = False,
    most: Annotated[int, typer.Option(min=1, help="Differing tensors to print, at most.")] = 50,
    json: Json = False,
) -> None:
    """Compare two checkpoints, whatever layouts wrote them: exit status 0 if they are the same, 1 if not."""
    from megapt.checkpoint.diff import diff as job
    from megapt.checkpoint.verify import work_bytes

    with byte_bar("comparing", work_bytes(first)) as progress:
        found = job(first, second, progress)
    if json:
        typer.echo(json_format.dumps(_comparison(found), indent=2, allow_nan=False))
    else:
        _print_comparison(found, most, ignore_meta)
    raise typer.Exit(0 if found.same(ignore_meta) else 1)


@app.command("export-weights")
def export_weights(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; must not exist.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the written weights; default: as stored.")] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, max=1e9, help="Size of one file, at most, in GB.")] = 5.0,
) -> None:
    """Write the weights as plain safetensors files under their global names."""
    from megapt.checkpoint.export_weights import export_weights as job
    from megapt.checkpoint.verify import work_bytes

    with byte_bar("exporting", work_bytes(checkpoint)) as progress:
        written = job(checkpoint, output, dtype.value if dtype else None, round(shard_gb * 1e9), progress)
    typer.echo(written)


@app.command()
def average(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the new checkpoint; must not exist.")],
    checkpoints: Checkpoints,
    weights: Annotated[
        str | None, typer.Option(help='One number for each checkpoint, such as "1,1,2"; default: all the same.')
    ] = None,
) -> None:
    """Write the mean of several checkpoints' weights as a checkpoint without moments."""
    from megapt.checkpoint.average import average as job
    from megapt.checkpoint.verify import work_bytes

    try:
        shares = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UserError(f'weights are numbers with commas between them, such as "1,1,2", not "{weights}"') from None
    with byte_bar("averaging", sum(map(work_bytes, checkpoints))) as progress:
        typer.echo(job(output, checkpoints, shares, progress))


def _print_description(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(found["path"]), show_header=False)
    table.add_row("step", _number(found["step"]))
    table.add_row("model", escape(_model(found["model"])))
    table.add_row("parameters", _number(found["parameters"]))
    for kind, row in found["kinds"].items():
        counts = f"{row['tensors']:,} tensors in {row['slices']:,} slices"
        table.add_row(escape(kind), f"{counts}, {', '.join(row['dtypes'])}, {row['bytes']:,} bytes")
    table.add_row("files", f"{found['files']:,}, {found['bytes']:,} bytes; ranks that wrote: {found['ranks']:,}")
    for key in ("layout", "versions", "updates", "skipped", "samples", "loss", "validation", "averaged"):
        if found[key] is not None:
            table.add_row(key, escape(_words(found[key])))
    table.add_row("age", _age(found["age_seconds"]))
    Console().print(table)
    for name, row in found.get("tensors", {}).items():
        kinds = ", ".join(f"{kind} {k['dtype']} in {k['slices']:,}" for kind, k in row["kinds"].items())
        typer.echo(f"{name} {row['shape']}: {kinds}")


def _model(model: dict[str, Any] | None) -> str:
    if model is None:
        return "not recorded"
    if "problem" in model:
        return str(model["problem"])
    heads = f"{model['heads']} heads ({model['kv_heads'] or model['heads']} key/value)"
    return (
        f"{model['layers']} layers, hidden {model['hidden']}, {heads}, ffn {model['ffn']}, "
        f"vocabulary {model['vocabulary']}, {model['norm']}, {model['activation']}, {model['position']}"
    )


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_number(key)} {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    return _number(value)


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value if value.isprintable() else ascii(value)
    return f"{value:,}" if type(value) is int else str(value)


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _comparison(found: Comparison) -> dict[str, Any]:
    """Its fields; null for what is infinite, which JSON has no number for."""
    import dataclasses
    import math

    tree = dataclasses.asdict(found)
    for row in tree["tensors"]:
        row |= {key: None for key in ("largest", "relative") if not math.isfinite(row[key])}
    return tree


def _print_comparison(found: Comparison, most: int, ignore_meta: bool) -> None:
    missing = [*(f"{kind} of every tensor" for kind in found.missing_kinds), *found.missing]
    surplus = [*(f"{kind} of every tensor" for kind in found.surplus_kinds), *found.surplus]
    for what, names in (("only in A", missing), ("only in B", surplus), ("changed", found.changed)):
        for name in names:
            typer.echo(f"{what}: {name}")
    for d in found.tensors[:most]:
        share = f"{d.elements:,} of {d.of:,} elements"
        typer.echo(f"{d.kind} of {d.name}: {share}, by {d.largest:.3g} at most ({d.relative:.3g} of the largest)")
    if len(found.tensors) > most:
        typer.echo(f"... and {len(found.tensors) - most:,} more that differ less")
    if not ignore_meta:
        for key, one, two in found.meta:
            typer.echo(f"meta {_number(key)}: {ascii(one)}, {ascii(two)}")
    meta = "" if ignore_meta else f"; {len(found.meta):,} values of meta differ"
    typer.echo(f"{found.equal:,} tensors are equal bit for bit, {len(found.tensors):,} differ{meta}")
