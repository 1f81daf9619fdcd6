"""`megapt data build` and `megapt tokenizer train`: from raw text to token files."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Literal

import typer

tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Text, .jsonl (both also as .gz and .zst) and .parquet files, folders of them, or - for JSON lines from "
        "standard input.",
    ),
]
TextKey = Annotated[str, typer.Option(help="Key of the text in JSON lines, column of the text in Parquet.")]


class TokenizerKind(StrEnum):
    bpe = "bpe"
    unigram = "unigram"


@tokenizer_app.command("train")
def train(
    inputs: Inputs,
    vocabulary: Annotated[int, typer.Option(min=1, help="Number of tokens, special ones included.")],
    output: Annotated[str, typer.Option(help="File to write: .json for bpe, .model for unigram.")],
    kind: Annotated[
        TokenizerKind, typer.Option(help="Byte-level BPE, or SentencePiece's unigram.")
    ] = TokenizerKind.bpe,
    special: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help="A token that text never yields, such as a mask; repeat it for more."),
    ] = None,
    text_key: TextKey = "text",
) -> None:
    """Train a tokenizer on text."""
    from megapt.data import tokenizers
    from megapt.data.documents import read_texts

    job = tokenizers.train_bpe if kind is TokenizerKind.bpe else tokenizers.train_sentencepiece
    trained = job(read_texts(inputs, text_key), vocabulary, output, special=special or [])
    typer.echo(f"{output}: {trained.vocabulary:,} tokens")


def build(
    inputs: Inputs,
    output: Annotated[
        str,
        typer.Option(
            metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx, PREFIX.report.json and PREFIX.lengths.png."
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="A tokenizer.json, a SentencePiece .model, a vocab.json beside its merges.txt, a folder with one of "
            'these, or "bytes".'
        ),
    ],
    text_key: TextKey = "text",
    append_eod: Annotated[
        bool, typer.Option(help="End every document with the end-of-document token.")
    ] = True,
    eod: Annotated[
        str | None, typer.Option(help="The end-of-document token; default: what the tokenizer says.")
    ] = None,
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="One sequence per sentence instead of one per document.")
    ] = False,
    invalid: Annotated[
        Literal["replace", "skip", "fail"],
        typer.Option(help="Documents that are not valid UTF-8: replace the faults, skip the document, or fail."),
    ] = "replace",
    dedup: Annotated[
        Literal["exact"] | None, typer.Option(help="exact: keep the first of documents with the same text.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that tokenize; default: the CPUs this process may use.")
    ] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files, and unfinished work with other arguments.")
    ] = False,
) -> None:
    """Tokenize text into a .bin/.idx pair. What was interrupted goes on when started again."""
    from megapt.data.build import build as job

    report = job(
        inputs,
        output,
        tokenizer,
        text_key=text_key,
        append_eod=append_eod,
        workers=workers,
        overwrite=overwrite,
        eod=eod,
        split_sentences=split_sentences,
        invalid=invalid,
        dedup=dedup,
    )
    typer.echo(
        f"{output}.bin, {output}.idx: {report.documents:,} documents, {report.tokens:,} tokens from "
        f"{report.bytes:,} bytes in {report.files:,} files, {report.seconds:.1f} s by {report.engine}"
    )
    for count, what in (
        (report.passed_over, "files were passed over: binary, or written by a build"),
        (report.replaced, "invalid characters became U+FFFD"),
        (report.skipped, "documents were left out: not valid UTF-8"),
        (report.duplicates, "documents were left out: seen before"),
    ):
        if count:
            typer.echo(f"{count:,} {what}", err=True)
