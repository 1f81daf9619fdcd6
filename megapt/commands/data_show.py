"""`megapt data show`: what a run read or will read at a step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    config: Annotated[Path, typer.Option(help="YAML file of the run, or its run folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, by dotted key."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Step, from 1 as in the run's metrics.")] = None,
    sample: Annotated[int | None, typer.Option(help="One sample, by its place in the global batch, from 0.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the text of the tokens too.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of the text; default: data.tokenizer.")] = None,
    verify_receipt: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Compute this checkpoint's receipt again from the first sample."),
    ] = None,
) -> None:
    """Print what was or will be read at a step: samples, sources, documents, tokens and text."""
    from megapt.data import show as job
    from megapt.errors import UserError

    if step is None and verify_receipt is None:
        raise UserError("give --step N, or --verify-receipt CHECKPOINT")
    found = job.config_of(config, overrides or [])
    if verify_receipt is not None:
        typer.echo(job.verify_receipt(found, verify_receipt))
    if step is not None:
        if config.is_dir() and not overrides:
            job.check_run(config, found)
        job.show(found, step, sample, text, tokenizer)
