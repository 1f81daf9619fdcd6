"""`megapt eval`: perplexity and bits per byte of a checkpoint on text or on token files."""

from __future__ import annotations

import json as json_format
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.evaluate import Evaluation

_LINE_SECONDS = 10.0


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, its checkpoints folder, or one step's folder.")
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Text, .jsonl (both also as .gz and .zst) and .parquet files, folders of them, or prefixes of "
            ".bin/.idx pairs.",
        ),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer file; default: the one the run's config names.")
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Tokens the model reads at once; default: as in training.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens from one window to the next; default: --sequence, windows do not overlap."),
    ] = None,
    start_token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Put in front of each document, so that its first token is scored too; none: nothing. Default: the "
            "tokenizer's end of a document, unless training packed whole documents.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Score only the first so many windows.")] = None,
    precision: Annotated[Precision, typer.Option(help="What the model computes in.")] = Precision.fp32,
    parallel: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=N", help="tensor=N, pipeline=N: the layout of several ranks."),
    ] = None,
    micro: Annotated[
        int | None, typer.Option(min=1, help="Rows of a micro-batch; default: those of about 8192 tokens.")
    ] = None,
    text_key: Annotated[
        str, typer.Option(help="Key of the text in JSON lines, column of the text in Parquet.")
    ] = "text",
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result there.")
    ] = None,
) -> None:
    """Perplexity and bits per byte of data, in this process or in the ranks of torchrun.

    A document's windows begin --stride tokens apart, and each scores the tokens that none before it has scored: with
    a stride below --sequence, each token after at least --sequence less --stride others of its document.
    """
    from megapt.launcher import prepare_rank

    place = prepare_rank(os.environ)
    from megapt.evaluate import Request
    from megapt.evaluate import evaluate as job
    from megapt.generate import parse_parallel

    request = Request(
        checkpoint, data, tokenizer, sequence, stride, start_token, samples, precision.value,
        parse_parallel(parallel or []), micro, text_key,
    )  # fmt: skip
    try:
        if json is not None and place.rank == 0:
            _check_place(json)
        with _progress(place.rank == 0) as progress:
            found = job(request, progress)
    except UserError:
        if place.rank:
            time.sleep(10)  # what is wrong on every rank is said by the first: the launcher then ends the others
        raise
    if place.rank == 0:
        _print(found)  # first: it is not lost where the file cannot be written after all
        if json is not None:
            _write(json, found)


def _check_place(path: Path) -> None:
    """UserError, before hours of work, for a file that cannot be written at their end."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--json {path} cannot be written: it is a folder, or {folder} is none that can be written to")


def _write(path: Path, found: Evaluation) -> None:
    import dataclasses

    from megapt.files import write_whole

    tree = dataclasses.asdict(found)
    if found.perplexity == float("inf"):
        tree["perplexity"] = None  # JSON has no infinity
    write_whole(path, (json_format.dumps(tree, indent=2) + "\n").encode())


def _print(found: Evaluation) -> None:
    overlap = "" if found.stride == found.sequence else f", {found.stride} apart"
    start = "nothing" if found.start_token is None else f"token {found.start_token}"
    first = f", their {found.unscored:,} first tokens not scored" if found.unscored else ""
    typer.echo(
        f"{found.checkpoint}, {found.precision}: {found.tokens:,} tokens in {found.windows:,} windows of "
        f"{found.sequence}{overlap}; {found.documents:,} documents with {start} in front{first}; "
        f"{found.seconds:.1f} s, {found.tokens / max(found.seconds, 1e-9):,.0f} tokens/s"
    )
    if found.bits_per_byte is not None:
        per_byte = f"{found.bits_per_byte:.6f} ({found.bytes:,} bytes)"
    else:
        per_byte = f"unknown: {found.no_bytes}"
    nats, perplexity = f"{found.nats_per_token:.6f}", f"{found.perplexity:.6g}"
    typer.echo(f"nats per token {nats}  perplexity {perplexity}  bits per byte {per_byte}")


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[int, int, int | None], None]]:
    """A bar on a terminal, a line now and then elsewhere; both on standard error."""
    began = shown = time.monotonic()

    def text(tokens: int) -> str:
        return f"{tokens:,} tokens, {tokens / max(time.monotonic() - began, 1e-9):,.0f}/s"

    def line(tokens: int, read: int, total: int | None) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _LINE_SECONDS:
            shown = time.monotonic()
            share = f"{min(read / total, 1.0):.0%}, " if total else ""
            print(f"evaluating: {share}{text(tokens)}", file=sys.stderr, flush=True)

    if not show:
        yield lambda tokens, read, total: None
    elif not sys.stderr.isatty():
        yield line
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [TextColumn("evaluating"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()]
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("evaluating", total=None, text="")
            yield lambda tokens, read, total: bar.update(task, completed=read, total=total, text=text(tokens))
