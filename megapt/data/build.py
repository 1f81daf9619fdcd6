"""From text to `.bin/.idx`: tokenize with worker processes and write in input order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megapt.data import tokenizers
from megapt.data.indexed import IndexedWriter, best_dtype
from megapt.data.pieces import Piece, list_files, read_parts, work_items
from megapt.errors import UserError
from megapt.files import StrPath

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class BuildReport:
    """What a build read and wrote.

    `documents` (empty ones included) and `tokens` (end-of-document tokens included) written; `bytes` and
    `files` read; `seconds` taken; `replaced`: invalid characters that became U+FFFD; `skipped`: binary files
    in the folders given.
    """

    documents: int
    tokens: int
    bytes: int
    files: int
    seconds: float
    replaced: int
    skipped: int


@dataclass(frozen=True)
class _Encoded:
    """A work item's tokens end to end; part i has `lengths[i]` of them and ends its document if `last[i]`."""

    tokens: npt.NDArray[np.integer[Any]]
    lengths: list[int]
    last: list[bool]
    bytes: int
    replaced: int


class _Encoder:
    """Encodes work items; each process has its own."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, text_key: str, append_eod: bool) -> None:
        self.tokenizer, self.text_key = tokenizer, text_key
        self.tail = [tokenizer.eod] if append_eod and tokenizer.eod is not None else []

    def __call__(self, item: list[Piece]) -> _Encoded:
        texts: list[str] = []
        last: list[bool] = []
        continued: list[bool] = []
        replaced = 0
        for piece in item:
            parts, bad = read_parts(piece, self.text_key)
            replaced += bad
            for part in parts:
                texts.append(part.text)
                last.append(part.last)
                continued.append(piece.start > 0 and not piece.jsonl)
        rows = self.tokenizer.encode_batch(texts)
        for row, ends, goes_on in zip(rows, last, continued, strict=True):
            if ends and (row or goes_on):  # an empty document stays empty
                row.extend(self.tail)
        tokens = np.fromiter(itertools.chain.from_iterable(rows), best_dtype(self.tokenizer.vocabulary),
                             sum(map(len, rows)))
        read = sum(piece.stop - piece.start for piece in item)
        return _Encoded(tokens, [len(row) for row in rows], last, read, replaced)


def build(inputs: Iterable[StrPath], output_prefix: StrPath, tokenizer_path: StrPath, text_key: str = "text",
          append_eod: bool = True, workers: int = 1, progress: bool = True, overwrite: bool = False,
          eod: str | None = None) -> BuildReport:
    """Tokenize files and folders into `{output_prefix}.bin/.idx`, one sequence per document.

    A .jsonl holds a document per line under `text_key`; any other text file is one document. Folders are read
    recursively, in the order of their sorted paths (see `pieces.list_files`). A document of more than 8 MiB
    is encoded in pieces of about 4 MiB cut between lines, which bounds memory (some hundred MiB per worker)
    and, for byte-level tokenizers, leaves the tokens as they would be in one piece. `append_eod` ends each
    document that is not empty with the tokenizer's end-of-document token (`eod` names it where the tokenizer
    does not say).

    One worker is this process, in which the tokenizers library uses threads of its own; more are processes of
    one thread each. The output is the same for any number of `workers`, and appears only when whole.
    UserError if the output exists and `overwrite` is not set, if there is nothing to read, if a file cannot
    be used, or if the tokenizer has no end-of-document token to append.
    """
    began = time.monotonic()
    tokenizer = tokenizers.load(tokenizer_path, eod)
    if append_eod and tokenizer.eod is None:
        raise UserError(f"tokenizer {tokenizer.path} does not say which token ends a document; name it "
                        "(eod), or build without (append_eod off)")
    if workers < 1:
        raise UserError(f"{workers} workers are not possible; 1 or more are needed")
    writer = IndexedWriter(output_prefix, best_dtype(tokenizer.vocabulary))
    existing = [str(path) for path in (writer.bin_path, writer.idx_path) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{' and '.join(existing)} exist already; choose another output, or set overwrite")
    inputs = list(inputs)
    files, skipped = list_files(inputs)
    if not files:
        raise UserError(f"no text files in {', '.join(map(str, inputs)) or 'an empty list of inputs'}"
                        f" ({skipped} binary files passed over)")
    read = replaced = 0
    with (_progress(progress, sum(file.stat().st_size for file in files)) as bar, writer,
          closing(_encode_all(files, workers, tokenizer, text_key, append_eod)) as results):
        for result in results:
            _write(writer, result)
            read, replaced = read + result.bytes, replaced + result.replaced
            if bar is not None:
                seconds, documents = max(time.monotonic() - began, 1e-9), writer.num_documents
                bar.update(bar.task_ids[0], completed=read, documents=f"{documents:,}",
                           speed=f"{read / 1e6 / seconds:.1f}", rate=f"{documents / seconds:,.0f}")
        if writer.num_tokens == 0:
            raise UserError(f"the {len(files)} input files hold {writer.num_documents} documents and no "
                            "tokens; there is nothing to write")
    seconds = time.monotonic() - began
    return BuildReport(writer.num_documents, writer.num_tokens, read, len(files), seconds, replaced, skipped)


def _write(writer: IndexedWriter, result: _Encoded) -> None:
    at = 0
    for length, last in zip(result.lengths, result.last, strict=True):
        writer.extend(result.tokens[at:at + length])
        at += length
        if last:
            writer.end_document()


def _encode_all(files: Iterable[Path], workers: int, tokenizer: tokenizers.Tokenizer, text_key: str,
                append_eod: bool) -> Generator[_Encoded, None, None]:
    """Encoded work items in input order, with at most three per worker under way."""
    if workers == 1:
        yield from map(_Encoder(tokenizer, text_key, append_eod), work_items(files))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker,
                               (tokenizer.path, tokenizer.eod, text_key, append_eod))
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for item in work_items(files):
            waiting.append(pool.submit(_encode, item))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(f"one of {workers} worker processes died, most often for lack of memory; build with "
                        "fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: _Encoder  # a worker process's own, set once when it starts


def _start_worker(tokenizer_path: str, eod: int | None, text_key: str, append_eod: bool) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = tokenizers.load(tokenizer_path)
    tokenizer.eod = eod
    _encoder = _Encoder(tokenizer, text_key, append_eod)


def _encode(item: list[Piece]) -> _Encoded:
    return _encoder(item)


def _progress(show: bool, total: int) -> AbstractContextManager[Progress | None]:
    if not show:
        return nullcontext()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("tokenizing"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                   TextColumn("{task.fields[documents]} documents, {task.fields[rate]}/s"),
                   TextColumn("{task.fields[speed]} MB/s"), TimeRemainingColumn(),
                   console=Console(stderr=True))
    bar.add_task("tokenizing", total=total, documents="0", speed="0.0", rate="0")
    return bar
