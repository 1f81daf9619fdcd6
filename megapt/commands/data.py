"""`megapt data`: look at token files, check them, and cut, join and convert them."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.data.indexed import IndexedReader
    from megapt.data.storage import Progress
    from megapt.data.verify import Report

app = typer.Typer(help="Turn text into token files, and look at, check, cut, join and convert them.",
                  no_args_is_help=True)

# A prefix may be a URL, which a Path would spoil.
Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="The pair's path or URL, without .bin or .idx.")]
Multimodal = Annotated[bool, typer.Option("--multimodal", help="The index ends with modes.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Cache = Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder for blocks of remote files.")]


class Kind(StrEnum):
    pair = "pair"
    raw = "raw"
    npy = "npy"


@app.command()
def inspect(
    prefix: Prefix,
    json: Json = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(help='Show a document as text: a tokenizer.json, a .model, a folder with one, or "bytes".'),
    ] = None,
    document: Annotated[int, typer.Option(min=0, help="Which document to show, from 0.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Most tokens of it to show.")] = 512,
    multimodal: Multimodal = False,
    cache: Cache = None,
) -> None:
    """Print what a .bin/.idx pair holds."""
    from megapt.data.describe import describe
    from megapt.data.indexed import IndexedReader

    reader = IndexedReader(prefix, multimodal=multimodal, cache=cache)
    found = describe(reader)
    if tokenizer is not None:
        found["document"] = _document(reader, tokenizer, document, limit)
    if json:
        typer.echo(json_format.dumps(found, indent=2))
    else:
        _print_description(found)


@app.command()
def verify(
    prefix: Prefix,
    vocabulary: Annotated[
        int | None, typer.Option(min=1, help="Also read every token: ids must be below this.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also hash both files, and compare with PREFIX.sha256 if it exists.")
    ] = False,
    write_hash: Annotated[
        bool, typer.Option("--write-hash", help="Hash both files and write PREFIX.sha256 if they are sound.")
    ] = False,
    multimodal: Multimodal = False,
    json: Json = False,
) -> None:
    """Check a pair for every defect: exit status 1 if there is one."""
    from megapt.data import verify as job
    from megapt.data.indexed import open_pair
    from megapt.data.remote import is_remote

    if write_hash and is_remote(prefix):
        raise UserError(f"{prefix}.sha256 cannot be written: outputs are local files; use --full to print the hashes")
    idx, bin_ = open_pair(prefix)
    hashed = full or write_hash
    with _progress("verifying", job.work_bytes(idx, bin_, vocabulary, hashed)) as progress:
        report = job.check_pair(idx, bin_, vocabulary, hashed, multimodal, progress)
    compared = full and not is_remote(prefix) and not write_hash and job.compare_hashes(prefix, report)
    if write_hash and not report.findings:
        job.write_hashes(prefix, report.hashes)
    _print_report(prefix, report, compared, json)
    raise typer.Exit(1 if report.findings else 0)


@app.command()
def merge(
    output: Annotated[str, typer.Argument(metavar="OUT", help="The merged pair's path, without .bin or .idx.")],
    inputs: Annotated[list[str], typer.Argument(metavar="IN...", help="Pairs of one dtype, in this order.")],
    overwrite: Overwrite = False,
) -> None:
    """Join pairs into one."""
    from megapt.data.transfer import merge as job

    with _progress("merging", _size(inputs)) as progress:
        merged = job(inputs, output, overwrite, progress)
    _print_pair(merged)


@app.command()
def split(
    prefix: Prefix,
    parts: Annotated[int | None, typer.Option(min=2, help="Cut into so many parts of equally many documents.")] = None,
    shares: Annotated[str | None, typer.Option(help='Shares of the documents, such as "0.9,0.1".')] = None,
    names: Annotated[
        str | None, typer.Option(help='Names of the parts, such as "train,valid"; default: 0, 1, ...')
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Writes PREFIX_NAME; default: the input's prefix.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut a pair into consecutive parts between documents."""
    from megapt.data.transfer import split as job

    if (parts is None) == (shares is None):
        raise UserError("a split needs either --parts, or --shares")
    try:
        numbers = [1.0] * parts if parts else [float(share) for share in str(shares).split(",")]
    except ValueError as error:
        raise UserError(f'shares are numbers with commas between them, such as "0.9,0.1", not "{shares}"') from error
    labels = names.split(",") if names is not None else [str(k) for k in range(len(numbers))]
    outputs = [f"{output or prefix}_{label}" for label in labels]
    with _progress("splitting", _size([prefix])) as progress:
        written = job(prefix, outputs, numbers, overwrite, progress)
    for pair in written:
        _print_pair(pair)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A pair's prefix, or a raw or .npy file.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A pair's prefix, or a raw or .npy file.")],
    from_kind: Annotated[Kind, typer.Option("--from", help="What the input is.")] = Kind.pair,
    to_kind: Annotated[Kind, typer.Option("--to", help="What to write.")] = Kind.pair,
    dtype: Annotated[str | None, typer.Option(help="Type of a raw input's tokens, such as uint16.")] = None,
    to_dtype: Annotated[
        str | None, typer.Option(help="Type of the tokens to write, such as int32; default: the input's.")
    ] = None,
    eod: Annotated[
        int | None, typer.Option(min=0, help="Cut a raw or .npy input into documents after this token.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Change the type of a pair's tokens, or go from and to raw streams and .npy arrays."""
    from megapt.data import raw, transfer

    if Kind.pair not in (from_kind, to_kind):
        raise UserError(f"either the input or the output must be a pair, not {from_kind} to {to_kind}")
    if from_kind is Kind.pair and (dtype is not None or eod is not None):
        raise UserError("--dtype and --eod describe a raw or .npy input (--from); a pair knows its own type and "
                        "documents; the type to write is --to-dtype")
    with _progress("converting", _size([source]) if from_kind is Kind.pair else _file_size(source)) as progress:
        if from_kind is not Kind.pair:
            pair = raw.from_raw(source, output, dtype, to_dtype, eod, from_kind is Kind.npy, overwrite, progress)
        elif to_kind is not Kind.pair:
            count = raw.to_raw(source, output, to_dtype, to_kind is Kind.npy, overwrite, progress)
            typer.echo(f"{output}: {count:,} tokens; the ends of documents are not kept but for their last tokens")
            return
        elif to_dtype is None:
            raise UserError("from a pair to a pair, --to-dtype says the type to write")
        else:
            pair = transfer.convert(source, output, raw.token_dtype(to_dtype), overwrite, progress)
    _print_pair(pair)


def _document(reader: IndexedReader, tokenizer: str, document: int, limit: int) -> dict[str, Any]:
    from megapt.data import tokenizers
    from megapt.data.describe import document_tokens

    if document >= reader.num_documents:
        raise UserError(f"{reader.prefix} has no document {document}; it has {reader.num_documents}, counted from 0")
    ids, length = document_tokens(reader, document, limit)
    model = tokenizers.load(tokenizer)
    if ids and not 0 <= min(ids) <= max(ids) < model.vocabulary:
        raise UserError(f"document {document} of {reader.prefix} holds token ids {min(ids)} to {max(ids)}, but "
                        f"{tokenizer} has ids below {model.vocabulary}; the data was built with another tokenizer")
    return {"number": document, "tokens": length, "shown": len(ids), "text": model.decode(ids)}


def _print_description(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(found["prefix"]), show_header=False)
    for name in ("documents", "sequences", "tokens"):
        table.add_row(name, f"{found[name]:,}")
    table.add_row("dtype", found["dtype"])
    table.add_row("bytes", f"{found['bytes']['bin']:,} in .bin, {found['bytes']['idx']:,} in .idx")
    if not found["packed"]:
        table.add_row("order", "not that of the .bin")
    if lengths := found["lengths"]:
        of = "" if lengths["sampled"] is None else f" (of {lengths['sampled']:,} sampled sequences, the mean of all)"
        words = [f"{name} {lengths[name]:,}" for name in ("min", "5%", "25%", "50%", "75%", "95%", "max")]
        table.add_row("lengths", f"{', '.join(words)}, mean {lengths['mean']:,.1f}{of}")
    table.add_row("first tokens", " ".join(map(str, found["first_tokens"])))
    table.add_row("fingerprint", found["fingerprint"])
    console = Console()
    console.print(table)
    if document := found.get("document"):
        console.print(f"document {document['number']}, {document['shown']:,} of {document['tokens']:,} tokens:")
        console.print(document["text"], markup=False, highlight=False)


def _print_report(prefix: str, report: Report, compared: bool, json: bool) -> None:
    if json:
        import dataclasses

        typer.echo(json_format.dumps({"prefix": prefix, **dataclasses.asdict(report)}, indent=2))
        return
    for finding in report.findings:
        typer.echo(f"{finding.count:,} x {finding}")
    for ending, digest in report.hashes.items():
        typer.echo(f"sha256 {digest}  {prefix}.{ending}" + (" (as written down)" * compared))
    state = "damaged" if report.findings else "sound"
    empty = f", {report.empty_sequences:,} of the sequences empty" if report.empty_sequences else ""
    typer.echo(f"{prefix} is {state}: {report.documents:,} documents, {report.sequences:,} sequences, "
               f"{report.tokens:,} tokens{empty}")


def _print_pair(pair: IndexedReader) -> None:
    typer.echo(f"{pair.prefix}.bin, {pair.prefix}.idx: {pair.num_documents:,} documents, {pair.num_sequences:,} "
               f"sequences, {pair.num_tokens:,} tokens of {pair.dtype.name}")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Progress]:
    """A bar over bytes on a terminal's stderr; elsewhere nothing, so that logs stay short."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    with Progress(TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                  console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _size(prefixes: list[str]) -> int:
    from megapt.data.indexed import open_pair

    return sum(open_pair(prefix)[1].size for prefix in prefixes)


def _file_size(path: str) -> int:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path} does not exist")
    return file.stat().st_size
