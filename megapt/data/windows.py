"""Documents of text or of token files in windows that score each token once, and what was scored of them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megapt.batch import IGNORE, Documents, MicroBatch
from megapt.data.dataset import PAD
from megapt.data.documents import Part, read_parts
from megapt.data.indexed import IndexedReader
from megapt.data.pieces import STDIN, Source, list_sources, work_items
from megapt.data.remote import is_remote
from megapt.data.tokenizers import Tokenizer
from megapt.errors import UserError
from megapt.files import StrPath

Int64 = npt.NDArray[np.int64]

_CHUNK = 1 << 16  # tokens of an indexed document read and decoded at once
_TAIL = 16  # tokens decoded again before a chunk
_TEXT = 1 << 20  # characters encoded together


@dataclass(frozen=True)
class Piece:
    """Tokens of a document, or of a part of it; `first` and `last` say whether the document begins and ends here.

    size: bytes of UTF-8 text that they stand for, None where no tokenizer says; cost: bytes of input used up.
    """

    ids: Int64
    first: bool
    last: bool
    size: int | None
    cost: int


class Window(NamedTuple):
    """Neighbouring tokens [n + 1] of a document, n at most `sequence`: all but the last are read, all but the first
    are predicted, and of those the last `scored` count."""

    tokens: Int64
    scored: int


class Corpus:
    """The documents of .bin/.idx pairs (by prefix), and of text files and folders, one input after the other.

    names: of the inputs; total: bytes of all of them, None where only reading them tells what they hold.

    UserError for an input that does not exist or holds no text, for text without a tokenizer, and, while reading, for
    a token beyond those of the tokenizer, or without one beyond the model's `vocabulary`.
    """

    def __init__(
        self, inputs: Iterable[StrPath], tokenizer: Tokenizer | None, vocabulary: int, text_key: str = "text"
    ) -> None:
        self.names = [os.fspath(name) for name in inputs]
        self.tokenizer, self._vocabulary, self._text_key = tokenizer, vocabulary, text_key
        self._inputs = [self._open(name) for name in self.names]
        sizes = [_total(one) for one in self._inputs]
        self.total = None if None in sizes else sum(size or 0 for size in sizes)

    def pieces(self) -> Iterator[Piece]:
        """All documents, from the first on."""
        for one in self._inputs:
            yield from self._of_pair(one) if isinstance(one, IndexedReader) else self._of_text(one)

    def size(self, ids: Int64) -> int:
        """Bytes of the text that tokens stand for."""
        assert self.tokenizer is not None
        return len(self.tokenizer.decode(ids.tolist()).encode())

    def _open(self, name: str) -> IndexedReader | list[Source]:
        prefix = name.removesuffix(".idx").removesuffix(".bin")
        if is_remote(name) or Path(prefix + ".idx").is_file():
            return IndexedReader(prefix)
        if name == STDIN:
            raise UserError("standard input cannot be given to every rank, nor be read twice: write it to a file")
        sources, _ = list_sources([name])
        if not sources:
            raise UserError(f"no text files in {name}")
        if self.tokenizer is None:
            raise UserError(f"{name} is text, and the checkpoint's config names no tokenizer; name the one that the "
                            "model was trained with (--tokenizer)")  # fmt: skip
        return sources

    def _of_text(self, sources: list[Source]) -> Iterator[Piece]:
        assert self.tokenizer is not None
        parts = (
            part
            for item in work_items(sources)
            for piece in item.pieces
            for part in read_parts(piece, self._text_key)
        )
        while block := _take(parts):
            ids, lengths = self.tokenizer.encode_flat([part.text for part in block], np.int64)
            for part, own in zip(block, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
                yield Piece(own, part.first, part.last, len(part.text.encode()), part.bytes)

    def _of_pair(self, reader: IndexedReader) -> Iterator[Piece]:
        for document in range(reader.num_documents):
            start, stop = reader.token_range(*reader.document(document))
            tail = np.empty(0, np.int64)
            for at in range(start, max(stop, start + 1), _CHUNK):
                ids = reader.tokens(at, min(_CHUNK, stop - at)).astype(np.int64)
                self._check(reader, ids)
                size = None
                if self.tokenizer is not None:
                    # With what comes before: a character may lie across the cut, or a sign that decoding drops at the
                    # beginning of a text.
                    size = self.size(np.concatenate([tail, ids])) - self.size(tail)
                    tail = ids[-_TAIL:]
                yield Piece(ids, at == start, at + _CHUNK >= stop, size, len(ids) * reader.dtype.itemsize)

    def _check(self, reader: IndexedReader, ids: Int64) -> None:
        who, limit = "the model", self._vocabulary
        if self.tokenizer is not None:
            who, limit = f"the tokenizer {self.tokenizer.path}", self.tokenizer.vocabulary
        if len(ids) and not 0 <= ids.min() <= ids.max() < limit:
            raise UserError(f"{reader.prefix} holds tokens {ids.min()} to {ids.max()}, but {who} has {limit}: the data "
                            "was built with another tokenizer")  # fmt: skip


class Account:
    """What was read and scored of a corpus.

    tokens, windows: scored; documents: begun; read: bytes of input; unscored: first tokens of documents, which have
    nothing before them where no `start` token is put there.
    """

    def __init__(self, corpus: Corpus, start: int | None) -> None:
        self.corpus, self.start = corpus, start
        self.tokens = self.windows = self.documents = self.unscored = self.read = 0
        self._size: int | None = 0
        # Pieces of which not all is scored, and the tokens of the first of them that are.
        self._waiting: deque[tuple[Int64, int | None]] = deque()
        self._scored = 0

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces on their way into windows."""
        begins = False
        for piece in pieces:
            ids, size = piece.ids, piece.size
            begins = begins or piece.first
            self.documents += piece.first
            self.read += piece.cost
            if begins and len(ids):
                begins = False
                if self.start is None:
                    self.unscored += 1
                    # A character that goes on in the second token counts there.
                    size = None if size is None else size - len(self._text(ids[:1]).rstrip("\ufffd").encode())
                    ids = ids[1:]
            self._waiting.append((ids, size))
            yield piece

    def score(self, found: Iterable[Window]) -> Iterator[Window]:
        """The windows in the order of their tokens, as they are scored."""
        for window in found:
            self.windows += 1
            self.tokens += window.scored
            self._scored += window.scored
            while self._waiting and self._scored >= len(self._waiting[0][0]):
                ids, size = self._waiting.popleft()
                self._scored -= len(ids)
                self._size = None if self._size is None or size is None else self._size + size
            yield window

    def size(self) -> int | None:
        """Bytes of UTF-8 text that the scored tokens stand for, None where no tokenizer says."""
        if self._size is None or not self._scored:
            return self._size
        ids, size = self._waiting[0]  # the last window ended inside of it
        return None if size is None else self._size + len(self._text(ids[: self._scored]).rstrip("\ufffd").encode())

    def _text(self, ids: Int64) -> str:
        assert self.corpus.tokenizer is not None
        return self.corpus.tokenizer.decode(ids.tolist())


def windows(pieces: Iterable[Piece], sequence: int, stride: int, start: int | None) -> Iterator[Window]:
    """The windows of each document: at 0, stride, 2 x stride, ... until one reaches its end.

    Positions count from the `start` token, where there is one.
    """
    held, done = np.empty(0, np.int64), 1
    for piece in pieces:
        if piece.first:
            held, done = np.array([] if start is None else [start], np.int64), 1
        held = np.concatenate([held, piece.ids])
        while len(held) > sequence:
            yield Window(held[: sequence + 1], sequence + 1 - done)
            held, done = held[stride:], sequence + 1 - stride
        if piece.last and len(held) > done:
            yield Window(held, len(held) - done)


def pack(found: Iterable[Window], sequence: int) -> Iterator[list[Window]]:
    """Windows side by side in rows of `sequence` tokens, so that short documents do not cost a whole row each."""
    row: list[Window] = []
    room = sequence
    for window in found:
        length = len(window.tokens) - 1
        if length == sequence:
            yield [window]
            continue
        if length > room:
            yield row
            row, room = [], sequence
        row.append(window)
        room -= length
    if row:
        yield row


def micro_batch(rows: Sequence[Sequence[Window]], size: int, sequence: int) -> MicroBatch:
    """`size` rows of `sequence` tokens, those beyond `rows` and what windows do not fill being padding."""
    tokens = torch.full((size, sequence), PAD, dtype=torch.int64)
    labels = torch.full((size, sequence), IGNORE, dtype=torch.int64)
    lengths: list[int] = []
    for at, row in enumerate(rows):
        end = 0
        for window in row:
            begin, end = end, end + len(window.tokens) - 1
            tokens[at, begin:end] = torch.from_numpy(window.tokens[:-1])
            labels[at, end - window.scored : end] = torch.from_numpy(window.tokens[-window.scored :])
            lengths.append(end - begin)
        if end < sequence:
            lengths.append(sequence - end)
    lengths += [sequence] * (size - len(rows))
    # What follows a window that begins its row cannot influence it.
    alone = all(len(row) == 1 for row in rows)
    return MicroBatch(tokens, labels, None if alone else _documents(lengths))


def _documents(lengths: list[int]) -> Documents:
    size = torch.tensor(lengths)
    ends = size.cumsum(0)
    positions = torch.arange(int(ends[-1])) - (ends - size).repeat_interleave(size)
    return Documents(tuple(lengths), torch.cat([ends.new_zeros(1), ends]).to(torch.int32), positions)


def _take(parts: Iterator[Part]) -> list[Part]:
    """The next parts of together about _TEXT characters."""
    taken: list[Part] = []
    length = 0
    for part in parts:
        taken.append(part)
        length += len(part.text) + 1
        if length >= _TEXT:
            break
    return taken


def _total(one: IndexedReader | list[Source]) -> int | None:
    if isinstance(one, IndexedReader):
        return one.bin.size
    plain = all(not source.compression and source.kind != "parquet" for source in one)
    return sum(source.size for source in one) if plain else None
