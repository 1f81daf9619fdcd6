"""`megapt convert`: checkpoints to and from Hugging Face folders."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert checkpoints to and from other formats.", no_args_is_help=True)

_TOLERANCE = 1e-5


class ExportDtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Compare = Annotated[
    bool, typer.Option("--compare/--no-compare", help="Compare both sides' logits on random tokens before it counts.")
]
Tolerance = Annotated[
    float, typer.Option(min=0.0, help="Largest difference of logits, relative to the largest one, in fp32.")
]
Tokens = Annotated[
    int | None, typer.Option(min=1, help="Length of the compared sequences; default: 64, or what reaches past windows.")
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; must be new or empty.")]


@app.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A run folder, its checkpoints folder, or one step's folder."),
    ],
    output: Output,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer file; default: the one the run's config names.")
    ] = None,
    dtype: Annotated[ExportDtype, typer.Option(help="Type of the written weights.")] = ExportDtype.fp32,
    shard_gb: Annotated[float, typer.Option(min=1e-9, help="Weights beyond this size go to several files.")] = 5.0,
    family: Annotated[
        str | None, typer.Option(help="model_type to write; default: that of the origin, else the first that fits.")
    ] = None,
    compare: Compare = True,
    tolerance: Tolerance = _TOLERANCE,
    compare_tokens: Tokens = None,
) -> None:
    """Write a checkpoint as a Hugging Face transformers folder."""
    from megapt import convert

    request = convert.Request(tolerance, compare_tokens) if compare else None
    shard = max(1, int(shard_gb * 1e9))
    report = convert.to_hf(
        checkpoint, output, tokenizer=tokenizer, dtype=dtype.value, shard_bytes=shard, family=family, request=request
    )
    typer.echo(report)


@app.command("from-hf")
def from_hf(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Hugging Face folder on this machine, with safetensors.")
    ],
    output: Output,
    ignore_auto_map: Annotated[
        bool, typer.Option("--ignore-auto-map", help="Take transformers' own class for a model that names other code.")
    ] = False,
    compare: Compare = True,
    tolerance: Tolerance = _TOLERANCE,
    compare_tokens: Tokens = None,
) -> None:
    """Write a Hugging Face transformers folder as a checkpoint to go on training from."""
    from megapt import convert

    request = convert.Request(tolerance, compare_tokens) if compare else None
    typer.echo(convert.from_hf(folder, output, ignore_auto_map=ignore_auto_map, request=request))
