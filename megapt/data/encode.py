"""Work items into tokens, in this process or in workers, and out again in input order."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import numpy as np
import numpy.typing as npt

from megapt.data import pieces, tokenizers
from megapt.data.dedup import HASH
from megapt.data.documents import Invalid, Part, read_parts
from megapt.data.indexed import best_dtype
from megapt.data.pieces import WorkItem
from megapt.data.sentences import split_sentences
from megapt.errors import UserError

_BATCH = 4 << 20  # characters given to the tokenizer at once
_WAITING = 256 << 20  # bytes of input under way, above which no more is handed out

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Rules:
    """How documents become sequences; see `build.build`."""

    text_key: str
    append_eod: bool
    split_sentences: bool
    invalid: Invalid
    hashes: bool


@dataclass(frozen=True)
class Encoded:
    """A work item's documents.

    `tokens`: all of them, end to end. `lengths` [sequences]: tokens of each. `documents` [documents]: sequences of
    each. `bad` [documents]: to be left out for invalid text. `hashes` [documents] of their texts, or None. The first
    document goes on with the one before if `continues`, the last is not over if `open`. `bytes` read; `replaced`
    characters.
    """

    tokens: Integers
    lengths: Integers
    documents: Integers
    bad: npt.NDArray[np.bool_]
    hashes: npt.NDArray[Any] | None
    continues: bool
    open: bool
    bytes: int
    replaced: int


class Encoder:
    """Encodes work items; each process has its own."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, rules: Rules) -> None:
        self.tokenizer, self.rules = tokenizer, rules
        self.dtype = best_dtype(tokenizer.vocabulary)
        self.eod = tokenizer.eod if rules.append_eod else None

    def __call__(self, item: WorkItem) -> Encoded:
        parts = (part for piece in item.pieces for part in read_parts(piece, self.rules.text_key, self.rules.invalid))
        tokens: list[Integers] = []
        lengths: list[Integers] = []
        counts: list[Integers] = []
        marks: list[Part] = []  # the parts without their texts
        hashes: list[bytes] = []
        for batch in _batches(parts):
            flat, sizes, count = self._encode(batch)
            tokens.append(flat)
            lengths.append(sizes)
            counts.append(count)
            if self.rules.hashes:
                hashes += [hashlib.blake2b(part.text.encode(), digest_size=16).digest() for part in batch]
            marks += [Part("", part.first, part.last, part.bytes, part.replaced) for part in batch]
        read = sum(piece.stop - piece.start for piece in item.pieces if piece.kind != "parquet")
        read += sum(part.bytes for part in marks if item.pieces[0].kind == "parquet")  # files of these stand alone
        return self._join(tokens, lengths, counts, marks, hashes, read)

    def _encode(self, batch: list[Part]) -> tuple[Integers, Integers, Integers]:
        """Tokens, the length of each sequence and the number of sequences of each part."""
        texts = [part.text for part in batch]
        if self.rules.split_sentences:
            split = [split_sentences(text) for text in texts]
            counts = np.fromiter(map(len, split), np.int64, len(split))
            texts = [sentence for sentences in split for sentence in sentences]
        else:
            counts = np.ones(len(texts), np.int64)
        flat: Integers
        lengths: Integers
        flat, lengths = self.tokenizer.encode_flat(texts, self.dtype)
        # A sequence has tokens: what gave none is no sequence.
        ends = np.cumsum(counts)
        nonzero = np.concatenate([[0], np.cumsum(lengths > 0)])
        counts = nonzero[ends] - nonzero[ends - counts]
        lengths = lengths[lengths > 0]
        if self.eod is not None:
            flat, lengths = self._end_documents(flat, lengths, counts, batch, self.eod)
        return flat, lengths, counts

    def _end_documents(self, flat: Integers, lengths: Integers, counts: Integers, batch: list[Part],
                       eod: int) -> tuple[Integers, Integers]:
        """The end-of-document token behind the last sequence of every document that ends here with tokens."""
        last = np.fromiter((part.last for part in batch), bool, len(batch))
        alone = last & (counts == 0) & ~np.fromiter((part.first for part in batch), bool, len(batch))
        lengths = np.insert(lengths, np.cumsum(counts)[alone], 0)
        counts += alone
        sequences = np.cumsum(counts)[last & (counts > 0)] - 1
        ends = np.cumsum(lengths)[sequences]
        lengths[sequences] += 1
        return np.insert(flat, ends, eod), lengths

    def _join(self, tokens: list[Integers], lengths: list[Integers], counts: list[Integers], marks: list[Part],
              hashes: list[bytes], read: int) -> Encoded:
        """Parts of one document become one."""
        size, count = _concatenate(lengths), _concatenate(counts)
        starts = np.array([i for i, part in enumerate(marks) if part.first or i == 0], np.int64)
        replaced = np.fromiter((part.replaced for part in marks), np.int64, len(marks))
        digests = None
        if self.rules.hashes:
            groups = [hashes[a:b] for a, b in zip(starts, [*starts[1:], len(marks)], strict=True)]
            digests = np.array([combine(group) for group in groups], HASH)
        if len(starts) < len(marks):
            count, replaced = np.add.reduceat(count, starts), np.add.reduceat(replaced, starts)
            if not self.rules.split_sentences:
                ends = np.cumsum(count)
                owners = ends[count > 0] - count[count > 0]
                size = np.add.reduceat(size, owners) if len(size) else size
                count = np.minimum(count, 1)
        skip = self.rules.invalid == "skip"
        return Encoded(_concatenate(tokens, self.dtype), size, count, (replaced > 0) & skip, digests,
                       bool(marks) and not marks[0].first, bool(marks) and not marks[-1].last,
                       read, 0 if skip else int(replaced.sum()))


class WorkersDied(UserError):
    """A worker process is gone, which says nothing about the input."""


def combine(hashes: list[bytes]) -> bytes:
    """The hash of a document in parts."""
    return hashes[0] if len(hashes) == 1 else hashlib.blake2b(b"".join(hashes), digest_size=16).digest()


def encode_all(items: Iterable[WorkItem], workers: int, tokenizer: tokenizers.Tokenizer,
               rules: Rules) -> Generator[tuple[WorkItem, Encoded], None, None]:
    """Encoded work items in input order; with several workers, a few per worker are under way."""
    if workers == 1:
        encoder = Encoder(tokenizer, rules)
        yield from ((item, encoder(item)) for item in items)
        return
    fork = _may_fork()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork" if fork else "spawn"), _start_worker,
                               (tokenizer if fork else None, tokenizer.path, tokenizer.eod, rules, pieces.PIECE))
    waiting: deque[tuple[WorkItem, int, Future[Encoded]]] = deque()
    held = 0
    try:
        for item in items:
            size = sum(len(piece.data) if piece.data is not None else piece.cost for piece in item.pieces)
            waiting.append((item.without_data(), size, pool.submit(_encode, item)))
            held += size
            while len(waiting) >= 3 * workers or held > max(_WAITING, 2 * pieces.PIECE * workers):
                done, size, future = waiting.popleft()
                held -= size
                yield done, future.result()
        while waiting:
            done, _, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise WorkersDied(f"one of {workers} worker processes died, most often for lack of memory; start again with "
                          "fewer workers, and the build goes on where it stopped") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _may_fork() -> bool:
    """Whether workers may start by fork: they then have all that is loaded. Where other threads might hold a lock at
    that moment they start afresh."""
    return sys.platform == "linux" and threading.active_count() == 1 and "torch" not in sys.modules


_encoder: Encoder  # a worker process's own, set once when it starts


def _start_worker(tokenizer: tokenizers.Tokenizer | None, path: str, eod: int | None, rules: Rules,
                  piece: int) -> None:
    global _encoder
    pieces.PIECE = piece  # all processes cut alike
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    if tokenizer is None:
        tokenizer = tokenizers.load(path)
        tokenizer.eod = eod
        tokenizer.accelerate()
    _encoder = Encoder(tokenizer, rules)


def _die_with_parent() -> None:
    """A parent that is killed cannot stop its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode(item: WorkItem) -> Encoded:
    return _encoder(item)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _concatenate(arrays: list[Integers], dtype: npt.DTypeLike = np.int64) -> Integers:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
